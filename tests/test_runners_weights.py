"""Coded checkpoints, in real workers and in standalone groups: what is read off them, and no false alarm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import six_targets
from coded_samples import change_codes, change_misfit, change_ranks, change_reload, rank_codes, whole_codes
from evidence_samples import change_inspection, clean
from genmodel import ParallelContext
from genmodel.conformance import catalogue
from genmodel.conformance.placement import Checkpoint, homes, place
from genmodel.conformance.verdict import Status
from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import GroupMember
from genmodel.reference_models import dense
from genmodel.runners import coding, weights_audit
from genmodel.runners.checkpoint import TINY_CONFIG, read_weights
from genmodel.runners.evidence import (
    CHANGED,
    PADDING,
    UNLOADED,
    CodedTensor,
    Evidence,
    Failure,
    LoadProbes,
    RankGradients,
    WeightAudit,
)
from genmodel.runners.inspection import attention_layers
from genmodel.runners.session import Session, TargetOptions

DENSE = "genmodel.reference_models.dense:factory"
CHECKS = [
    check
    for check in catalogue.all_checks()
    if check.group in ("weights", "parallelism") or check.id in ("gradients.parallel", "gradients.norm")
]
SCENARIOS = {"inspection", "weights", "parallel_gradients"}


# Codes -----------------------------------------------------------------------------------------------------


def test_every_element_has_a_code_of_its_own(tmp_path: Path) -> None:
    save_file({"b": torch.randn(3, 4), "a": torch.randn(5), "n": torch.arange(7)}, tmp_path / "1.safetensors")
    save_file({"c": torch.randn(()).reshape(())}, tmp_path / "2.safetensors")
    codes = coding.coded(tmp_path)
    assert set(codes) == {"a", "b", "c"}  # integers stay what they are
    found = torch.cat([coding.decode(coding.values(codes[name])).flatten() for name in ("a", "b", "c")])
    assert found.tolist() == list(range(1, 5 + 12 + 1 + 1))
    loaded = dict(coding.recoded([("n", torch.arange(7)), ("a", torch.zeros(5))], codes))
    assert torch.equal(loaded["n"], torch.arange(7))
    assert loaded["a"].tolist() == [1, 3, 5, 7, 9]


def test_matrices_that_repeat_each_other_share_their_codes(tmp_path: Path) -> None:
    """A redundant copy of a tied head is no tensor of its own; constants are alike by accident."""
    table = torch.randn(6, 4)
    weights = {"head": table.clone(), "embed": table, "ones": torch.ones(6, 4), "more": torch.ones(6, 4)}
    save_file(weights, tmp_path / "model.safetensors")
    codes = coding.coded(tmp_path)
    assert codes["head"] == codes["embed"]
    assert codes["ones"] != codes["more"]


def test_codes_are_exact_however_many_there_are(tmp_path: Path) -> None:
    """Beyond what float32 counts to there is a load for each digit, and codes are wide where they have to be."""
    last = CodedTensor(shape=(1,), first_code=coding.LARGEST)
    assert coding.digits({"last": last}) == range(1)
    assert coding.decode(coding.values(last)).item() == coding.LARGEST
    for first, dtype in ((coding.LARGEST - 1, torch.int32), (2**31 - 2, torch.int64), (2**46 - 3, torch.int64)):
        tensor = CodedTensor(shape=(2, 2), first_code=first)
        digits = coding.digits({"w": tensor})
        assert digits == range(2)
        values = [coding.values(tensor, digit) for digit in digits]
        assert all(bool((value % 2 == 1).all()) and float(value.max()) < 2**24 for value in values)
        codes = coding.joined([{"w": coding.decode(value)} for value in values])["w"]
        assert (codes.tolist(), codes.dtype) == ([[first, first + 1], [first + 2, first + 3]], dtype)
    save_file({"n": torch.arange(7)}, tmp_path / "model.safetensors")
    with pytest.raises(coding.Uncodable, match="no weights"):
        coding.coded(tmp_path)


CHANGES = [lambda w: w + 1, lambda w: 2 * w, lambda w: -w, lambda w: w / 3]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_value_is_no_code(change: Any) -> None:
    assert set(coding.decode(change(torch.tensor([7.0, 1001.0, 65.0]))).tolist()) == {CHANGED}


@pytest.mark.parametrize("change", CHANGES[:3])
def test_a_value_changed_in_any_digit_is_no_code(change: Any) -> None:
    """Although its other digit may be what another element's is: the high one is 1 for millions of elements."""
    tensor = CodedTensor(shape=(3,), first_code=5 * coding.LARGEST - 1)
    low, high = (coding.values(tensor, digit) for digit in range(2))
    for changed in ((change(low), high), (low, change(high)), (change(low), change(high))):
        codes = coding.joined([{"w": coding.decode(values)} for values in changed])["w"]
        assert codes.tolist() == [CHANGED] * 3


def test_what_no_digit_was_loaded_into_shows_and_tied_tensors_stay_one() -> None:
    found = torch.tensor([float("nan"), 0.0, 0.0, float("nan"), 5.0])
    other = torch.tensor([float("nan"), 0.0, 3.0, 1.0, 3.0])
    codes = coding.joined([coding.decoded({"a": found, "b": found}), coding.decoded({"a": other, "b": other})])
    assert codes["a"].tolist() == [UNLOADED, PADDING, CHANGED, CHANGED, 3 + coding.LARGEST]
    assert codes["a"] is codes["b"]


def test_a_checkpoint_in_several_files_is_read_as_its_index_says(tmp_path: Path) -> None:
    """As vLLM does: a file that the index does not name is no part of it."""
    save_file({"a": torch.randn(3, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.randn(4)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"a": torch.randn(3, 2), "other.b": torch.randn(4)}, tmp_path / "consolidated.safetensors")
    assert set(coding.coded(tmp_path)) == {"a", "b", "other.b"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    assert set(coding.coded(tmp_path)) == set(read_weights(tmp_path)) == {"a", "b"}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-00002-of-00002\.safetensors, which is not there"):
        read_weights(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of safetensors files"):
        read_weights(tmp_path)


def test_what_was_not_loaded_shows() -> None:
    layer = nn.Linear(3, 2)
    coding.poison([layer.weight, torch.arange(3)])
    layer.weight.data[0, :2] = torch.tensor([0.0, 5.0])
    assert coding.decode(layer.weight).tolist() == [[PADDING, 3, UNLOADED], [UNLOADED] * 3]
    assert bool(layer.bias.isfinite().all())


# Places ----------------------------------------------------------------------------------------------------


def test_slices_are_found_whatever_the_layout() -> None:
    whole = torch.arange(1, 61).reshape(10, 6)
    for part in (whole[2:5], whole[:, 3:], whole[[0, 1, 5, 6]][:, 2:4], whole, whole[4:4], whole.flatten()[7:20]):
        found = place(part, whole)
        assert found.ordered
        assert found.foreign == 0
        assert torch.equal(whole.flatten()[found.positions], part)
    padded = torch.cat([whole[8:], torch.zeros(1, 6, dtype=whole.dtype)])
    assert place(padded, whole).ordered
    assert place(padded, whole).positions[-1].tolist() == [-1] * 6
    for part in (whole.flip(0), whole[:, [1, 0]], whole[:2].reshape(6, 2), whole.flatten()[[3, 2]]):
        assert not place(part, whole).ordered
    assert place(whole + 3, whole).foreign == 3


def checkpoint_of(shapes: dict[str, tuple[int, ...]]) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """A coded checkpoint of these shapes, and its tensors' codes."""
    tensors, first = {}, 1
    for name, shape in shapes.items():
        tensors[name] = CodedTensor(shape=shape, first_code=first)
        first += math.prod(shape)
    codes = {n: coding.decode(coding.values(tensor)) for n, tensor in tensors.items()}
    return Checkpoint(tensors), codes


def test_whole_matrices_of_one_kind_may_be_dealt_out_in_any_order() -> None:
    checkpoint, codes = checkpoint_of(
        {
            **{f"experts.{i}.{name}": (4, 3) for i in range(4) for name in ("gate", "up")},
            "fused": (4, 6, 3),
            "bias": (4, 6),
            "q": (6, 3),
            "k": (4, 3),
            "one": (),
        }
    )
    ups = [codes[f"experts.{i}.up"] for i in range(4)]
    gates = [codes[f"experts.{i}.gate"] for i in range(4)]
    stacked, joined, qk = torch.stack(ups), torch.cat(ups), torch.cat([codes["q"], codes["k"]])
    pairs = torch.cat([m for pair in zip(gates, ups, strict=True) for m in pair])
    dealt = [2, 0]
    placement = set(checkpoint.placements(codes["fused"][dealt], codes["fused"]))
    assert placement == {(4, (2, 0))}
    right = [
        (stacked[dealt], stacked),
        (codes["fused"][dealt], codes["fused"]),
        (torch.cat([ups[2][:2], ups[0][:2]]), joined),
        (torch.cat([gates[2], ups[2], gates[0], ups[0]]), pairs),
        (torch.cat([codes["q"][2:4], codes["k"][:2]]), qk),
        (codes["one"], codes["one"]),
        (codes["fused"][:0], codes["fused"]),
    ]
    for part, whole in right:
        assert not checkpoint.out_of_order(part, whole, ())
    assert checkpoint.out_of_order(codes["bias"][dealt], codes["bias"], ())
    assert not checkpoint.out_of_order(codes["bias"][dealt], codes["bias"], placement)
    wrong = [
        (stacked[dealt].flip(1), stacked),
        (stacked[dealt].flip(2), stacked),
        (stacked[dealt].transpose(1, 2).reshape(2, 4, 3), stacked),
        (torch.cat([ups[2].flip(0), ups[0]]), joined),
        (torch.stack([ups[0], ups[2]], 1).flatten(0, 1), joined),
        (torch.cat([codes["k"][:2], codes["q"][:2]]), qk),
        (torch.stack([gates[0], ups[0]])[[1, 0]], torch.stack([gates[0], ups[0]])),
        (codes["bias"][[1, 3]].flip(0), codes["bias"]),
    ]
    for part, whole in wrong:
        assert checkpoint.out_of_order(part, whole, placement)


def test_modules_spread_over_the_ranks_are_recognised_by_their_elements() -> None:
    """Experts that every rank numbers from 0."""
    whole = {f"experts.{i}.w": torch.arange(1, 7) + 6 * i for i in range(4)} | {"norm": torch.arange(90, 94)}
    second = {"experts.0.w": whole["experts.2.w"], "experts.1.w": whole["experts.3.w"], "norm": whole["norm"]}
    assert homes(second, whole) == {"experts.0.w": "experts.2.w", "experts.1.w": "experts.3.w", "norm": "norm"}


def test_a_tensor_whose_values_loading_changes_is_not_missed() -> None:
    """An offset folded into the norm is the author's business; a discarded head is not."""
    checkpoint = Checkpoint(clean().coded_checkpoint)
    whole = whole_codes()
    folded = whole | {"norm.weight": torch.full_like(whole["norm.weight"], CHANGED)}
    assert checkpoint.absent([folded]) == {"norm.weight": 64}
    assert checkpoint.followed(folded) == set(checkpoint.tensors) - {"norm.weight"}
    discarded = folded | {"head.weight": whole["embed.weight"]}
    assert "head.weight" in checkpoint.followed(discarded)
    assert checkpoint.absent(rank_codes(rank, 2) for rank in range(2)) == {}


# Verdicts --------------------------------------------------------------------------------------------------


def judged(check_id: str, evidence: Evidence) -> Any:
    return catalogue.judge(catalogue.get(check_id), evidence)


def test_values_that_load_weights_changes_are_left_out_and_named() -> None:
    evidence = change_codes(clean(), "norm.weight", lambda codes: torch.full_like(codes, CHANGED))
    verdict = judged("weights.every_element", evidence)
    assert verdict.status is Status.PASSED
    assert verdict.measurements[-1].detail == "norm.weight"


def test_padding_of_a_vocabulary_need_not_be_loaded() -> None:
    def unloaded(codes: torch.Tensor) -> torch.Tensor:
        return torch.where(codes == PADDING, UNLOADED, codes)

    evidence = change_codes(clean(), "head.weight", unloaded, sizes=(2,))
    assert judged("weights.all_loaded", evidence).status is Status.PASSED
    assert judged("parallelism.vocabulary", evidence).status is Status.PASSED


def test_hidden_states_that_ranks_share_are_not_compared() -> None:
    """Each has a part of them, so that they differ."""

    def shared(rank: RankGradients) -> RankGradients:
        part = slice(4 * rank.rank, 4 * rank.rank + 4)
        assert rank.undropped is not None
        return replace(rank, trained=rank.trained[:, part], undropped=rank.undropped[:, part])

    verdict = judged("gradients.parallel", change_ranks(clean(), shared))
    assert verdict.status is Status.PASSED, verdict
    assert not any("in training" in measurement.what for measurement in verdict.measurements)
    assert any("in training" in measurement.what for measurement in judged("gradients.parallel", clean()).measurements)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_a_checkpoint_that_cannot_be_coded_is_not_judged(check: catalogue.Check) -> None:
    verdict = catalogue.judge(check, replace(clean(), uncoded="too large", weights={}, parallel_gradients={}))
    assert verdict.status is Status.NOT_APPLICABLE
    assert verdict.reason == "too large"


def test_a_model_that_cannot_run_at_one_rank_and_need_not() -> None:
    failure = Failure(kind="raised", scenario="weights", message="needs two ranks")
    evidence = clean()
    alone = replace(
        evidence,
        target=replace(evidence.target, tensor_parallel_sizes=(2,)),
        weights={**evidence.weights, 1: failure},
        parallel_gradients={**evidence.parallel_gradients, 1: failure},
    )
    verdicts = [catalogue.judge(check, alone) for check in CHECKS]
    assert {v.status for v in verdicts} == {Status.PASSED, Status.NOT_APPLICABLE}
    assert judged("weights.all_loaded", alone).status is Status.PASSED
    assert "needs two ranks" in judged("weights.local_order", alone).reason


def test_a_model_that_cannot_be_loaded_twice_is_not_judged_by_it() -> None:
    again = "RuntimeError: packed already"
    verdict = judged("weights.any_order", change_reload(clean(), 0, refused=again))
    assert verdict.status is Status.NOT_APPLICABLE
    assert verdict.reason == f"the model cannot be loaded twice: {again}"


def test_whole_matrices_and_rows_beyond_the_vocabulary_may_be_left_out() -> None:
    stacked = replace(clean().coded_checkpoint["norm.weight"], shape=(4, 4, 4))
    evidence = change_misfit(clean(), 2, tensor="norm.weight")
    assert judged("weights.wrong_shape_refused", clean()).status is Status.PASSED
    assert judged("weights.wrong_shape_refused", evidence).status is Status.FAILED
    evidence.coded_checkpoint = {**evidence.coded_checkpoint, "norm.weight": stacked}
    assert judged("weights.wrong_shape_refused", evidence).status is Status.PASSED
    inside = change_misfit(evidence, 2, tensor="norm.weight", dimension=1)
    assert judged("weights.wrong_shape_refused", inside).status is Status.FAILED


# Loading, with no worker around it ---------------------------------------------------------------------------


class Tiny(nn.Module):
    """A matrix, a vector, a number, a stack, a scale and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(6, 4))
        self.vector = nn.Parameter(torch.empty(2))
        self.number = nn.Parameter(torch.empty(()))
        self.stack = nn.Parameter(torch.empty(3, 4, 4))
        self.register_buffer("scale", torch.ones(5))
        self.register_buffer("table", torch.arange(3))


def loading_of(model: nn.Module, load: Any = load_weights) -> tuple[weights_audit._Loading, dict[str, torch.Tensor]]:
    """A model as the audit has it, loaded once; `load(model, weights)` is its loader."""
    state = {name: torch.ones_like(tensor) for name, tensor in Tiny().state_dict().items()}
    codes, first = {}, 1
    for name, tensor in state.items():
        if tensor.is_floating_point():
            codes[name] = CodedTensor(shape=tuple(tensor.shape), first_code=first)
            first += tensor.numel()
    loading = weights_audit._Loading(model, lambda change: load(model, change(iter(state.items()))), codes)
    return loading, loading.held()


def probed(model: nn.Module, load: Any = load_weights) -> LoadProbes:
    loading, held = loading_of(model, load)
    reloads = tuple(weights_audit._reload(loading, held))
    assert not any(reload.refused or reload.different for reload in reloads), reloads
    audit = replace(clean().weights[1][0], codes=held, reloads=reloads)  # type: ignore[index]
    return weights_audit._probe(loading, audit, held)


def taken(probes: LoadProbes) -> set[str]:
    return {f"{misfit.tensor} {misfit.change}" for misfit in probes.misfits if misfit.refused is None}


def test_genmodel_s_own_loader_refuses_all_that_does_not_fit() -> None:
    probes = probed(Tiny())
    assert taken(probes) == set()
    assert {misfit.tensor for misfit in probes.misfits} == {"matrix", "vector", "number", "stack", "scale"}
    changes = [misfit.change for misfit in probes.misfits if misfit.tensor == "matrix"]
    sides = [
        f"{what} along dimension {i}" for i in range(2) for what in ("one longer", "one shorter", "of one element")
    ]
    assert changes == [*sides, "transposed", "of the same elements in twice as many rows", "of integers"]
    assert probes.integers == ()


def copied(model: nn.Module, weights: Any) -> None:
    state = model.state_dict()
    for name, tensor in weights:
        state[name].copy_(tensor)


def reassigned(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data - 1


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.mul_(2),
        lambda tensor: tensor[..., 0].zero_(),
        lambda tensor: tensor.data.neg_(),
        lambda tensor: tensor.unsqueeze_(0),
        reassigned,
    ],
)
def test_a_loader_that_changes_what_it_is_given(change: Any) -> None:
    """As it goes, or once it has seen all; in another tensor over the same memory, or in the caller's own."""

    def at_once(model: nn.Module, weights: Any) -> None:
        for name, tensor in weights:
            copied(model, [(name, tensor)])
            if name == "matrix":
                change(tensor)

    def at_last(model: nn.Module, weights: Any) -> None:
        kept = dict(weights)
        copied(model, kept.items())
        change(kept["matrix"])

    def failing(model: nn.Module, weights: Any) -> None:
        at_last(model, weights)
        if hasattr(model, "packed"):
            raise RuntimeError("packed already")
        model.packed = True

    assert weights_audit._changed_arguments(loading_of(Tiny(), copied)[0]) == ()
    for load in (at_once, at_last, failing):
        assert weights_audit._changed_arguments(loading_of(Tiny(), load)[0]) == ("matrix",)


def test_what_copy_takes_is_a_conversion() -> None:
    """It repeats and converts, and never cuts."""
    probes = probed(Tiny(), copied)
    assert {m.converts for m in probes.misfits if m.refused is None} == {True}
    ones = {
        f"{name} of one element along dimension {i}"
        for name, dims in (("matrix", 2), ("stack", 3))
        for i in range(dims)
    }
    ones |= {f"{name} of one element along dimension 0" for name in ("vector", "scale")}
    assert taken(probes) == ones | {f"{n} of integers" for n in ("matrix", "vector", "number", "stack", "scale")}


def test_a_loader_that_turns_a_transposed_matrix_has_understood() -> None:
    def turned(model: nn.Module, weights: Any) -> None:
        load_weights(model, ((n, t.T if tuple(t.shape) == (4, 6) else t) for n, t in weights))

    def viewed(model: nn.Module, weights: Any) -> None:
        load_weights(model, ((n, t.reshape(6, 4) if tuple(t.shape) == (4, 6) else t) for n, t in weights))

    def made_to_fit(model: nn.Module, weights: Any) -> None:
        load_weights(model, ((n, t.T.reshape(6, 4) if tuple(t.shape) == (12, 2) else t) for n, t in weights))

    assert taken(probed(Tiny(), turned)) == set()
    assert taken(probed(Tiny(), viewed)) == {"matrix transposed"}
    assert taken(probed(Tiny(), made_to_fit)) == {"matrix of the same elements in twice as many rows"}


def test_buffers_and_tables_that_are_not_loaded_show() -> None:
    def parameters_only(model: nn.Module, weights: Any) -> None:
        names = dict(model.named_parameters())
        load_weights(model, ((name, tensor) for name, tensor in weights if name in names))

    _, held = loading_of(Tiny(), parameters_only)
    assert held["scale"].tolist() == [UNLOADED] * 5
    assert "table" not in held
    assert probed(Tiny(), parameters_only).integers == ("table",)
    assert loading_of(Tiny())[1]["scale"].min() > 0


def test_a_loader_that_goes_by_the_order_of_arrival_shows() -> None:
    def by_arrival(model: nn.Module, weights: Any) -> None:
        """Swaps rows of the matrix if the vector came before it."""
        pairs = dict(weights)
        if list(pairs).index("vector") < list(pairs).index("matrix"):
            pairs["matrix"] = pairs["matrix"].flip(0)
        load_weights(model, pairs.items())

    loading, held = loading_of(Tiny(), by_arrival)
    found = {reload.order: reload.different for reload in weights_audit._reload(loading, held)}
    assert (found["as before"], found["reversed"]) == ((), ("matrix",))


def test_a_second_load_that_is_refused_ends_it() -> None:
    seen: list[int] = []

    def once(model: nn.Module, weights: Any) -> None:
        seen.append(1)
        if len(seen) > 1:
            raise RuntimeError("packed already")
        load_weights(model, weights)

    loading, held = loading_of(Tiny(), once)
    (reload,) = weights_audit._reload(loading, held)
    assert reload.refused == "RuntimeError: packed already"


def described(size: int, codes: dict[str, CodedTensor]) -> tuple[WeightAudit, ...]:
    """What the reference model's ranks hold, of groups larger than this machine has cores for."""
    coded = {name: coding.values(tensor) for name, tensor in codes.items()}
    config = dense.Config.from_hf(SimpleNamespace(**TINY_CONFIG))
    audits = []
    for rank in range(size):
        model = dense.Dense(config, ParallelContext(tensor_parallel=GroupMember(rank, size)))
        coding.poison(model.parameters())
        load_weights(model, coded.items())
        audits.append(
            WeightAudit(
                tensor_parallel_size=size,
                rank=rank,
                world_size=size,
                codes=coding.decoded(dict(model.named_parameters(remove_duplicate=False))),
                tied=(),
                attention=tuple(attention_layers(model)),
                probes=None,
            )
        )
    return tuple(audits)


def of_sizes(*sizes: int) -> Evidence:
    codes, following = {}, 1
    for name, parameter in dense.Dense(dense.Config.from_hf(SimpleNamespace(**TINY_CONFIG))).named_parameters():
        codes[name] = CodedTensor(shape=tuple(parameter.shape), first_code=following)
        following += parameter.numel()
    evidence = change_inspection(
        clean(),
        hidden_size=128,
        vocab_size=331,
        embed=replace(clean().inspection.embed, reads=("embed_tokens.weight",)),  # type: ignore[union-attr]
        logits=replace(clean().inspection.logits, reads=("lm_head.weight",)),  # type: ignore[union-attr]
    )
    return replace(
        evidence,
        target=replace(evidence.target, tensor_parallel_sizes=sizes),
        coded_checkpoint=codes,
        weights={size: described(size, codes) for size in sizes},
    )


@pytest.fixture(scope="module")
def four_ranks() -> Evidence:
    return of_sizes(1, 2, 4)


@pytest.mark.parametrize("check", [c for c in CHECKS if c.group != "gradients"], ids=lambda check: check.id)
def test_four_ranks_with_two_kv_heads(check: catalogue.Check, four_ranks: Evidence) -> None:
    verdict = catalogue.judge(check, four_ranks)
    probed = check.id.endswith("_refused") or check.id == "weights.any_order"
    assert verdict.status is (Status.NOT_APPLICABLE if probed else Status.PASSED), verdict


def test_a_kv_head_that_too_few_ranks_hold(four_ranks: Evidence) -> None:
    """Rank 1 has the head of ranks 2 and 3, so that rank 0 is alone with the other."""
    audits: Any = four_ranks.weights[4]
    name = "layers.1.attn.qkv.weight"
    mixed = torch.cat([audits[1].codes[name][:32], audits[2].codes[name][32:]])
    wrong = (audits[0], replace(audits[1], codes={**audits[1].codes, name: mixed}), *audits[2:])
    verdict = judged("parallelism.kv_replication", replace(four_ranks, weights={**four_ranks.weights, 4: wrong}))
    assert verdict.status is Status.FAILED
    assert "on rank 0 shares a kv head with 0 other ranks instead of 1" in verdict.measurements[-1].detail


# Real workers ----------------------------------------------------------------------------------------------


def with_separate_projections(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """A model that joins q, k and v, and gate and up, of its checkpoint, and folds one into its norms."""
    model: Any = dense.factory(vllm_config, parallel_context)
    shards = {".q.": (".qkv.", "q"), ".k.": (".qkv.", "k"), ".v.": (".qkv.", "v")}
    shards |= {".gate.": (".gate_up.", 0), ".up.": (".gate_up.", 1)}

    def load(weights: Any) -> set[str]:
        parameters, loaded = dict(model.named_parameters()), set()
        for name, tensor in weights:
            old = next((part for part in shards if part in name), None)
            own, shard = (name, None) if old is None else (name.replace(old, shards[old][0]), shards[old][1])
            parameter = parameters[own]
            if hasattr(parameter, "weight_loader"):
                parameter.weight_loader(parameter, tensor, shard)
            else:
                parameter.data.copy_(tensor + 1)
            loaded.add(own)
        return loaded

    model.load_weights = load
    return model  # type: ignore[no-any-return]


def raises_on_rank_1_in_training(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    model: Any = dense.factory(vllm_config, parallel_context)
    if parallel_context.get_tensor_parallel_rank() == 1 and not parallel_context.in_engine:
        forward = model.layers[1].forward

        def broken(*arguments: Any) -> Any:
            if torch.is_grad_enabled():
                raise FloatingPointError("on this rank only")
            return forward(*arguments)

        model.layers[1].forward = broken
    return model  # type: ignore[no-any-return]


TARGETS = {
    "dense": TargetOptions(spec=DENSE),
    "gpt": TargetOptions(spec="genmodel.reference_models.gpt:factory"),
    "native": TargetOptions(spec="vllm.model_executor.models.llama:LlamaForCausalLM"),
    "class": TargetOptions(spec="six_targets:PlainClass", dtype="bfloat16"),
    "lambda": TargetOptions(spec="a lambda", target=six_targets.lambda_, tensor_parallel_sizes=(2,)),
    "closure": TargetOptions(spec="a closure", target=six_targets.make_closure(six_targets.FIXED)),
    "callable object": TargetOptions(spec="an object", target=six_targets.Builder(2)),
    "vLLM-style class": TargetOptions(spec="six_targets:StyledForVllm"),
    "one kv head": TargetOptions(spec=DENSE, config="mutants.weight_mutants:ONE_KV_HEAD"),
    "tied": TargetOptions(spec=DENSE, config="mutants.weight_mutants:TIED"),
    "scalar parameters": TargetOptions(spec="correct_models.scalar_parameters:factory"),
    "placed experts": TargetOptions(spec="correct_models.placed_experts:factory"),
    "buffers": TargetOptions(spec="correct_models.buffers:factory", dtype="bfloat16"),
    "more elements than float32 counts": TargetOptions(spec=DENSE, config="mutants.weight_mutants:LARGE"),
}
INAPPLICABLE = {
    "gpt": {"weights.tied"},
    "scalar parameters": {"weights.tied"},
    "buffers": {"weights.tied"},
    "native": {"gradients.parallel", "gradients.norm", "weights.conversion_refused"},
    "one kv head": set[str](),
}
ADVISED = {"placed experts": {"weights.conversion_refused"}}
"""Recommended checks that are right to fail: `copy_` takes what is there."""


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(TARGETS.values()) as running:
        yield running


@pytest.mark.parametrize("name", TARGETS)
def test_a_correct_model_raises_no_alarm(session: Session, name: str) -> None:
    """And what does not apply is known: fewer kv heads than ranks, only where there are."""
    evidence = session.collect(TARGETS[name], SCENARIOS)
    verdicts = [catalogue.judge(check, evidence) for check in CHECKS]
    broken = [v for v in verdicts if v.status not in (Status.PASSED, Status.NOT_APPLICABLE)]
    assert {v.check for v in broken} == ADVISED.get(name, set()), broken
    inapplicable = {v.check for v in verdicts if v.status is Status.NOT_APPLICABLE}
    assert inapplicable == INAPPLICABLE.get(name, set()) | (
        set() if name == "one kv head" else {"parallelism.kv_replication"}
    )
    assert set(evidence.weights) == {1, 2}  # the whole model, to compare with, also where only TP=2 was asked for
    assert [audit.world_size for audit in evidence.weights[2]] == [2, 2]  # type: ignore[union-attr]


def test_what_a_rank_of_a_worker_holds(session: Session) -> None:
    evidence: Any = session.collect(TARGETS["dense"], SCENARIOS)
    (whole,), (first, second) = evidence.weights[1], evidence.weights[2]
    assert whole.codes["embed_tokens.weight"].shape == (331, 128)
    assert first.codes["embed_tokens.weight"].shape == second.codes["embed_tokens.weight"].shape == (166, 128)
    assert torch.equal(whole.codes["embed_tokens.weight"][:166], first.codes["embed_tokens.weight"])
    assert second.codes["embed_tokens.weight"][-1].tolist() == [PADDING] * 128
    assert sum(math.prod(t.shape) for t in evidence.coded_checkpoint.values()) == sum(
        codes.numel() for codes in whole.codes.values()
    )
    assert "no layers.0.attn.genmodel_unknown.weight" in whole.probes.unknown_refused
    assert {o.tensor for o in whole.probes.omissions if o.refused is None} == set()
    assert (whole.probes.omissions[0].exempt, second.probes) == (False, None)
    assert evidence.parallel_gradients[2][1].loss == pytest.approx(evidence.parallel_gradients[1][0].loss, rel=1e-12)


def test_the_holes_in_vllm_s_guard_are_known(session: Session) -> None:
    """vLLM misses norms, and none of what its own linear layers and embeddings hold."""
    evidence: Any = session.collect(TARGETS["native"], SCENARIOS)
    omissions = evidence.weights[1][0].probes.omissions
    assert {o.exempt for o in omissions if o.refused is None} == {True}
    assert {o.exempt for o in omissions if o.refused is not None} == {False}
    assert all(o.left for o in omissions if o.refused is None)


def test_tied_embeddings_are_seen(session: Session) -> None:
    evidence: Any = session.collect(TARGETS["tied"], SCENARIOS)
    assert evidence.weights[2][1].tied == (("embed_tokens.weight", "lm_head.weight"),)
    assert "lm_head.weight" not in evidence.coded_checkpoint


def test_an_author_s_own_checkpoint_and_load_weights(session: Session, tmp_path: Path) -> None:
    """Other names, fused on the way in, norms one larger than in the checkpoint."""
    torch.manual_seed(0)
    size, inner = 128, TINY_CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), (331, size))
    shapes["norm.weight"] = (size,)
    for i in range(3):
        shapes |= {f"layers.{i}.{name}_norm.weight": (size,) for name in ("attn", "mlp")}
        shapes |= {f"layers.{i}.attn.{n}.weight": (rows, size) for n, rows in (("q", 128), ("k", 64), ("v", 64))}
        shapes |= {f"layers.{i}.mlp.{name}.weight": (inner, size) for name in ("gate", "up")}
        shapes |= {f"layers.{i}.attn.o_proj.weight": (size, size), f"layers.{i}.mlp.down.weight": (size, inner)}
    save_file({name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    options = TargetOptions(spec="separate", target=with_separate_projections, weights=tmp_path)
    evidence = session.collect(options, SCENARIOS)
    verdicts = {check.id: catalogue.judge(check, evidence) for check in CHECKS}
    broken = [v for v in verdicts.values() if v.status not in (Status.PASSED, Status.NOT_APPLICABLE)]
    assert {v.check for v in broken} == {"weights.conversion_refused"}, broken  # `copy_` takes what is there
    followed = verdicts["weights.every_element"].measurements[-1]
    assert followed.measured == 7
    assert "layers.0.attn_norm.weight" in followed.detail


def test_a_rank_that_raises_in_training_ends_the_group_and_nothing_else(session: Session) -> None:
    options = TargetOptions(spec="raises", target=raises_on_rank_1_in_training)
    evidence = session.collect(options, {"inspection", "parallel_gradients"})
    found = evidence.parallel_gradients[2]
    assert isinstance(found, Failure)
    assert (found.rank, found.message) == (1, "FloatingPointError: on this rank only")
    assert judged("gradients.parallel", evidence).status is Status.FAILED
    assert judged("weights.replicated", session.collect(options, SCENARIOS)).status is Status.PASSED
