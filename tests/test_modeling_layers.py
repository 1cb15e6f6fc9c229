"""Layers and collectives: TP=n is the same function, with the same gradients, as TP=1."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distributed import run_ranks
from genmodel.modeling.attention import TrainableFlashAttention, packed_sequences
from genmodel.modeling.collectives import copy_to_group, gather_from_group, reduce_from_group
from genmodel.modeling.layers import (
    ColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    shard_of,
)
from genmodel.modeling.parallel_context import GroupMember, ParallelContext
from genmodel.reference_models import dense, gpt

HIDDEN, VOCAB = 24, 13  # 13: neither 2 nor 4 ranks divide it, and of 5 ranks the last has rows of padding only


def rank_of(rank: int, size: int) -> ParallelContext:
    """That rank's shapes and shards, without processes."""
    return ParallelContext(tensor_parallel=GroupMember(rank, size))


# Modules to compare. Each is built from a context alone, runs on the inputs of `inputs_for` and
# uses the layers as a model does, so that the sharded outputs are never looked at directly.


class Mlp(nn.Module):
    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(HIDDEN, [16, 16], bias=True, parallel_context=context)
        self.down = RowParallelLinear(16, HIDDEN, bias=True, parallel_context=context)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Vocabulary(nn.Module):
    def __init__(self, context: ParallelContext, tied: bool) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, parallel_context=context)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = ParallelLMHead(VOCAB, HIDDEN, bias=True, parallel_context=context)
        if tied:
            self.head.tie_weights(self.embedding)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.embedding(ids)))
        return logits


class Attention(nn.Module):
    def __init__(self, context: ParallelContext, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.block = TrainableFlashAttention(
            HIDDEN, heads, kv_heads, head_dim=8, bias=True, parallel_context=context, sliding_window=4, soft_cap=3.0
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.norm(x))
        return out


class Language(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.tensor([0, 1, 2, 3, 0, 1, 2])
        with packed_sequences(torch.tensor([0, 4, 7])):
            logits: Tensor = self.model.compute_logits(self.model(ids, positions))
        return logits


def language_config(**changes: Any) -> dict[str, Any]:
    common = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "vocab_size": VOCAB,
    }
    return common | changes


def dense_config(**changes: Any) -> dense.Config:
    return dense.Config(**language_config(num_key_value_heads=2, head_dim=8, **changes))


CASES: dict[str, Callable[[ParallelContext], nn.Module]] = {
    "mlp": Mlp,
    "gathered": lambda c: ColumnParallelLinear(HIDDEN, [8, 12], bias=True, gather_output=True, parallel_context=c),
    "vocabulary": lambda c: Vocabulary(c, tied=False),
    "tied vocabulary": lambda c: Vocabulary(c, tied=True),
    "grouped kv heads": lambda c: Attention(c, 8, 4),
    "two kv heads": lambda c: Attention(c, 8, 2),
    "multi-query": lambda c: Attention(c, 4, 1),
    "dense": lambda c: Language(dense.Dense(dense_config(), c)),
    "tied dense": lambda c: Language(dense.Dense(dense_config(tie_word_embeddings=True), c)),
    "gpt": lambda c: Language(gpt.GPT(gpt.Config(**language_config(max_position_embeddings=16)), c)),
}
TAKES_IDS = {"vocabulary", "tied vocabulary", "dense", "tied dense", "gpt"}


def inputs_for(name: str) -> Tensor:
    torch.manual_seed(3)
    # The first and last id, both sides of the shards' edges, a repetition, and an id for every rank.
    return torch.tensor([0, 12, 9, 6, 7, 12, 3]) if name in TAKES_IDS else torch.randn(2, 7, HIDDEN)


def run_case(name: str, context: ParallelContext, state: dict[str, Tensor] | None) -> dict[str, Any]:
    """Output, loss and every gradient; with `state`, after loading TP=1's full tensors."""
    torch.manual_seed(0)
    module = CASES[name](context)
    for_norms = torch.Generator().manual_seed(1)
    for param in module.parameters():
        if not hasattr(param, "partition"):  # replicated norms and biases, away from 1 and 0
            nn.init.uniform_(param, 0.5, 1.5, generator=for_norms)
    if state is not None:
        for key, param in module.named_parameters():
            param.data.fill_(float("nan"))  # what is not loaded shows
            getattr(param, "weight_loader", lambda param, full: param.data.copy_(full))(param, state[key])
    x = inputs_for(name)
    x.requires_grad_(x.is_floating_point())
    output = module(x)
    # A loss in which every output element has a weight of its own, computed alike on every rank.
    loss = (output * torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)).sum()
    loss.backward()
    gradients = {key: param.grad for key, param in module.named_parameters()}
    assert all(type(grad) is Tensor for grad in gradients.values()), "a gradient is still a distributed tensor"
    with torch.inference_mode():
        inference = module(inputs_for(name))
    return {
        "output": output.detach(),
        "inference": inference.clone(),
        "input gradient": x.grad,
        "gradients": gradients,
        "parameters": {key: param.detach() for key, param in module.named_parameters()},
        "module": module,
    }


def tp1(name: str) -> dict[str, Any]:
    return run_case(name, ParallelContext(), None)


def assert_equal(ours: Tensor | None, theirs: Tensor | None, what: str) -> None:
    """Equal but for the order of summation: 1e-12 relative to the largest element, in float64."""
    assert (ours is None) == (theirs is None), what
    if ours is None or theirs is None:
        return
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=1e-12 * max(1.0, theirs.abs().max().item()), msg=lambda m: f"{what}: {m}"
    )


def compare_all_cases() -> dict[str, int]:
    """On each rank: every case against TP=1, which each rank computes for itself."""
    torch.set_default_dtype(torch.float64)
    context = ParallelContext.from_group(dist.group.WORLD)
    compared = {}
    for name in CASES:
        theirs = tp1(name)
        for state in (None, theirs["parameters"]):  # drawn under the same seed, and loaded
            ours = run_case(name, context, state)
            for key in ("output", "inference", "input gradient"):
                assert_equal(ours[key], theirs[key], f"{name}, {key}")
            params = dict(ours["module"].named_parameters())
            for key, param in params.items():
                assert_equal(param, shard_of(param, theirs["parameters"][key]), f"{name}, {key}")
                expected = shard_of(param, theirs["gradients"][key])
                assert expected.abs().max() > 0, f"{name}, {key}: a vacuous comparison"
                assert_equal(param.grad, expected, f"{name}, gradient of {key}")
            compared[name] = len(params)
    return compared


def check_collectives_and_context() -> None:
    torch.set_default_dtype(torch.float64)
    group = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    context = ParallelContext.from_group(group)
    assert (context.get_tensor_parallel_rank(), context.get_tensor_parallel_world_size()) == (rank, size)
    assert context.get_tensor_parallel_group() is group
    assert (context.world_size, context.in_engine) == (size, False)
    mesh = context.device_mesh
    assert mesh is not None
    assert mesh is context.device_mesh
    assert mesh.mesh_dim_names == ("tp",)
    assert mesh.size() == size
    assert copy.deepcopy(context) is context

    # float32 too, each against its definition; every rank's loss weighs the result alike.
    for dtype in (torch.float32, torch.float64):
        x = torch.full((2, 3), rank + 1.0, dtype=dtype, requires_grad=True)
        weights = torch.arange(6, dtype=dtype).view(2, 3)
        (copy_to_group(x, context) * weights * (rank + 1)).sum().backward()
        assert_equal(x.grad, weights * sum(range(1, size + 1)), "copy")
        x.grad = None
        total = reduce_from_group(x, context)
        assert torch.equal(total, torch.full((2, 3), float(sum(range(1, size + 1))), dtype=dtype))
        (total * weights).sum().backward()
        assert_equal(x.grad, weights, "reduce")
        x.grad = None
        gathered = gather_from_group(x, context, 0)
        assert torch.equal(gathered[:, 0], torch.arange(1.0, size + 1, dtype=dtype).repeat_interleave(2))
        weights = torch.arange(6.0 * size, dtype=dtype).view(2 * size, 3)
        (gathered * weights).sum().backward()
        assert_equal(x.grad, weights[2 * rank : 2 * rank + 2], "gather")

    from torch.distributed.device_mesh import init_device_mesh

    two_dims = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    from_mesh = ParallelContext.from_mesh(two_dims)
    assert from_mesh.get_tensor_parallel_world_size() == size
    assert (from_mesh.get_data_parallel_rank(), from_mesh.get_data_parallel_size()) == (0, 1)
    assert from_mesh.get_pipeline_parallel_group() is None
    assert torch.equal(reduce_from_group(torch.ones(2), from_mesh), torch.full((2,), float(size)))
    with pytest.raises(ValueError, match=r"dimensions \('dp', 'tp'\), none of them is one of \('a', 'b', 'c'\)"):
        ParallelContext.from_mesh(two_dims, tensor_parallel="a", pipeline_parallel="b", data_parallel="c")

    with pytest.raises(IndexError):  # on every rank, so that none is left waiting
        VocabParallelEmbedding(VOCAB, 4, parallel_context=context)(torch.tensor([VOCAB]))


def everything_on_ranks() -> dict[str, int]:
    check_collectives_and_context()
    return compare_all_cases()


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_equals_one_rank(size: int) -> None:
    for compared in run_ranks(everything_on_ranks, size):
        assert set(compared) == set(CASES)
        assert compared["dense"] == 2 * 6 + 3


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("on purpose")
    dist.barrier()


def test_run_ranks_reports_a_failing_rank() -> None:
    with pytest.raises(AssertionError, match="on purpose"):
        run_ranks(fail_on_rank_one, 2, timeout=60)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_shards_put_together_are_the_full_tensor(size: int) -> None:
    torch.manual_seed(0)
    full = torch.randn(VOCAB, HIDDEN)
    pieces = []
    for rank in range(size):
        weight = VocabParallelEmbedding(VOCAB, HIDDEN, parallel_context=rank_of(rank, size)).weight
        assert weight.full_shape == (VOCAB, HIDDEN)  # type: ignore[attr-defined]
        weight.weight_loader(weight, full)  # type: ignore[attr-defined]
        pieces.append(weight.detach())
    assert torch.equal(torch.cat(pieces)[:VOCAB], full)
    assert not torch.cat(pieces)[VOCAB:].any(), "padded rows are zero"


def test_fused_shards_by_segment() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(8 * 4, 6), torch.randn(2 * 4, 6), torch.randn(2 * 4, 6)
    for rank in range(4):
        layer = QKVParallelLinear(6, 8, 2, 4, parallel_context=rank_of(rank, 4))
        assert (layer.num_heads, layer.num_kv_heads, layer.kv_replicas) == (2, 1, 2)
        for name, tensor in {"q": q, "k": k, "v": v}.items():
            layer.weight.weight_loader(layer.weight, tensor, name)  # type: ignore[attr-defined]
        head = rank // 2
        expected = torch.cat([q[8 * rank : 8 * rank + 8], k[4 * head : 4 * head + 4], v[4 * head : 4 * head + 4]])
        assert torch.equal(layer.weight, expected)
        assert torch.equal(shard_of(layer.weight, torch.cat([q, k, v])), expected)

        gate, up = torch.randn(8, 6), torch.randn(12, 6)
        merged = ColumnParallelLinear(6, [8, 12], parallel_context=rank_of(rank, 4))
        merged.weight.weight_loader(merged.weight, gate, 0)  # type: ignore[attr-defined]
        merged.weight.weight_loader(merged.weight, up, 1)  # type: ignore[attr-defined]
        expected = torch.cat([gate[2 * rank : 2 * rank + 2], up[3 * rank : 3 * rank + 3]])
        assert torch.equal(merged.weight, expected)


def test_one_rank_equals_torch() -> None:
    torch.manual_seed(0)
    ours = ColumnParallelLinear(6, 8, bias=True)
    theirs = nn.Linear(6, 8)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(ours(x), theirs(x))
    # the same distribution: uniform within 1 / sqrt(fan_in) of the full layer, also on a rank of many
    wide = RowParallelLinear(400, 300, parallel_context=rank_of(1, 4)).weight
    assert wide.shape == (300, 100)
    assert wide.abs().max() <= 1 / 20
    assert wide.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)


def test_initial_shards_differ_between_ranks() -> None:
    weights = []
    for rank in range(2):
        torch.manual_seed(0)
        weights.append(QKVParallelLinear(6, 4, 2, 4, parallel_context=rank_of(rank, 2)).weight)
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "to", "to_empty"])
def test_metadata_survives(how: str) -> None:
    layer = ColumnParallelLinear(6, 8, bias=True, parallel_context=rank_of(1, 2))
    if how == "deepcopy":
        layer = copy.deepcopy(layer)
    elif how == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif how == "to":
        layer = layer.to(torch.float64)
    else:
        layer = layer.to("meta").to_empty(device="cpu")
    for name in ("weight", "bias"):
        param: Any = getattr(layer, name)
        full = torch.randn(param.full_shape)
        param.weight_loader(param, full)
        assert torch.equal(param, full[4:].to(param.dtype)), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ColumnParallelLinear(4, 7, parallel_context=rank_of(0, 2)), r"^out_features \(7\) .* size \(2\)$"),
        (lambda: ColumnParallelLinear(4, [8, 7], parallel_context=rank_of(0, 2)), r"^out_features \(7\)"),
        (lambda: RowParallelLinear(7, 4, parallel_context=rank_of(0, 2)), r"^in_features \(7\) .* size \(2\)$"),
        (lambda: QKVParallelLinear(8, 5, 2, 4), r"^num_heads \(5\) .* num_kv_heads \(2\)$"),
        (lambda: QKVParallelLinear(8, 3, 3, 4, parallel_context=rank_of(0, 2)), r"^num_heads \(3\) .* size \(2\)$"),
        (lambda: QKVParallelLinear(8, 12, 6, 4, parallel_context=rank_of(0, 4)), r"^num_kv_heads \(6\) .* size \(4\)"),
        (
            lambda: ParallelLMHead(9, 4).tie_weights(VocabParallelEmbedding(8, 4)),
            r"^cannot tie a head of \[9, 4\] \(this rank: \[9, 4\]\) to an embedding of \[8, 4\]",
        ),
    ],
)
def test_bad_geometry_is_one_clear_line(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "shard_id", "message"),
    [
        ((15, 6), None, r"shape \[15, 6\] but the full parameter has \[16, 6\] \(this rank's shard of it: \[8, 6\]\)"),
        ((8, 6), None, r"shape \[8, 6\] but the full parameter has \[16, 6\]"),  # already cut: refused, not guessed
        ((6, 16), None, r"shape \[6, 16\] but the full parameter has \[16, 6\]"),
        ((8,), "q", r"shard 'q' has shape \[8\] but that shard of the full parameter has \[8, 6\]"),
        ((8, 6), "k", r"shard 'k' has shape \[8, 6\] but that shard of the full parameter has \[4, 6\]"),
        ((8, 6), 0, r"no shard 0 in this parameter, it has \['q', 'k', 'v'\]"),
    ],
)
def test_weight_loader_refuses(shape: tuple[int, ...], shard_id: str | int | None, message: str) -> None:
    layer = QKVParallelLinear(6, 4, 2, 2, parallel_context=rank_of(1, 2))
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=message) as caught:
        layer.weight.weight_loader(layer.weight, torch.zeros(shape), shard_id)  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    assert torch.equal(layer.weight, before)


def test_a_described_rank_cannot_run() -> None:
    layer = RowParallelLinear(8, 4, parallel_context=rank_of(0, 2))
    with pytest.raises(RuntimeError, match=r"tensor parallel size 2 but no process group: build .*from_group"):
        layer(torch.zeros(1, 4))


def test_shard_of_a_replicated_parameter() -> None:
    norm = nn.LayerNorm(4)
    full = torch.randn(4)
    assert shard_of(norm.weight, full) is full
    with pytest.raises(ValueError, match=r"shape \[5\] but the parameter has \[4\]"):
        shard_of(norm.weight, torch.randn(5))
