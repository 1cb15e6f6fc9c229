"""Weights that hide nothing, prompts that reach everything, and what is said of weights that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from correct_models import buffers
from genmodel import ParallelContext, TrainableAttention
from genmodel.conformance.agreement import NOISE_FACTOR, ULP_FACTOR
from genmodel.reference_models import dense, gpt, moe
from genmodel.runners import checkpoint, standalone
from genmodel.runners.workload import GENERATED, shared_workload

SEEDS = (0, 1, 2)
PROMPTS = [torch.tensor(request.prompt) for request in shared_workload(331, 256, 0)]
Mutation = Callable[[nn.Module], None]


def adversarial(module: Any, seed: int, **config: Any) -> standalone.Standalone:
    """A reference model with the weights a target without weights gets."""
    hf_config = SimpleNamespace(**checkpoint.TINY_CONFIG | config)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    model = module.factory(vllm_config, ParallelContext()).eval()
    built = standalone.Standalone(model, False, vllm_config)
    standalone.load(built, checkpoint.adversarial_weights(model, standalone.checkpoint_shapes(model), seed))
    return built


@torch.no_grad()
def logits(built: standalone.Standalone) -> Tensor:
    return torch.cat([built.logits(prompt) for prompt in PROMPTS])


def without_attention(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, TrainableAttention):
            module.register_forward_hook(lambda _, __, out: torch.zeros_like(out))


def heads_alike(model: nn.Module) -> None:
    """Every query head becomes a copy of the first."""
    for module in model.modules():
        if hasattr(module, "qkv"):
            width = module.attn.head_dim
            rows = module.qkv.weight.data[:width].repeat(module.attn.num_heads, 1)
            module.qkv.weight.data[: len(rows)] = rows


def fresh_norms(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)


def no_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()


def positions_swapped(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda input_ids, positions: forward(input_ids, positions.flip(0))


CASES = [
    (dense, without_attention),
    (dense, heads_alike),
    (dense, fresh_norms),
    (dense, positions_swapped),
    (gpt, without_attention),
    (gpt, heads_alike),
    (gpt, fresh_norms),
    (gpt, no_biases),
    (gpt, positions_swapped),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("module", "mutation"), CASES, ids=lambda x: x.__name__.rpartition(".")[2])
def test_everything_matters(module: Any, mutation: Mutation, seed: int) -> None:
    """Without any one part, hardly any position keeps its top ten."""
    right = logits(adversarial(module, seed))
    built = adversarial(module, seed)
    mutation(built.model)
    wrong = logits(built)
    kept = (right.topk(10).indices == wrong.topk(10).indices).all(-1).float().mean()
    assert kept < 0.05


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("module", [dense, gpt], ids=["dense", "gpt"])
def test_logits_have_a_real_spread(module: Any, seed: int) -> None:
    """The best token stands out, and not always the same one does."""
    scores = logits(adversarial(module, seed))
    assert 2.0 < scores.std() < 5.0
    assert len(scores.argmax(-1).unique()) > 331 / 10


def test_weights_are_the_seed_s_and_the_name_s() -> None:
    """The same again for the same seed; a parameter more or less changes no other."""
    model = adversarial(dense, 0).model
    shapes = standalone.checkpoint_shapes(model)
    first = checkpoint.adversarial_weights(model, shapes, 5)
    fewer = checkpoint.adversarial_weights(model, dict([*shapes.items()][3:]), 5)
    other = checkpoint.adversarial_weights(model, shapes, 6)
    assert all(torch.equal(first[name], fewer[name]) for name in fewer)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_tied_and_padded_parameters_appear_as_in_a_checkpoint() -> None:
    """A tied head is not saved twice; shapes are those of the whole model."""
    shapes = standalone.checkpoint_shapes(adversarial(gpt, 0).model)
    assert [name for name, shape in shapes.items() if shape == (331, 128)] == ["embed_tokens.weight"]


def test_a_weight_centred_on_zero_stays_there() -> None:
    """Norms that scale by 1 + weight begin at zero, others at one."""
    model = nn.ModuleDict({"a": nn.LayerNorm(500), "b": nn.LayerNorm(500)})
    nn.init.zeros_(model["b"].weight)
    made = checkpoint.adversarial_weights(model, {"a.weight": (500,), "b.weight": (500,), "a.bias": (500,)}, 0)
    assert made["a.weight"].mean() == pytest.approx(1.0, abs=0.1)
    assert made["b.weight"].mean() == pytest.approx(0.0, abs=0.1)
    assert made["a.bias"].abs().mean() > 0.05


def test_persistent_buffers_are_moved_as_far_as_their_values_mean_nothing(tmp_path: Path) -> None:
    """Of every kind; and new weights move them too."""
    config = SimpleNamespace(**checkpoint.TINY_CONFIG)
    model = buffers.factory(SimpleNamespace(model_config=SimpleNamespace(hf_config=config)), ParallelContext())
    model.register_buffer("variance", torch.linspace(0.5, 2.0, 20))
    model.register_buffer("minus_infinity", torch.full((3, 3), -torch.inf))
    model.register_buffer("unwritten", torch.tensor([float("nan"), 3.0]))
    rotary = nn.Module()
    rotary.register_buffer("inv_freq", torch.tensor([1.0, 0.1]))
    model.rotary_emb = rotary
    made = checkpoint.adversarial_buffers(model, 0)
    names = {"scale", "shift", "tokens", "mask", "empty", "variance", "unwritten", "rotary_emb.inv_freq"}
    assert set(made) == names  # once, under the first of two names; nothing that a file of weights may not have
    assert made.keys() == checkpoint.adversarial_buffers(model, 0).keys()
    assert bool(made["unwritten"].isfinite().all())
    for name in ("tokens", "mask", "rotary_emb.inv_freq"):
        assert torch.equal(made[name], model.get_buffer(name))
    for name in ("scale", "shift", "variance"):
        assert 0.05 < float((made[name] - model.get_buffer(name)).abs().mean()) < 0.5
    assert bool((made["variance"] > 0).all())
    checkpoint.save_weights(tmp_path, made)
    (tmp_path / "config.json").write_text("{}")
    checkpoint.save_refit_weights(tmp_path, 0)
    moved = checkpoint.read_weights(tmp_path / "refit")
    same = {name for name in made if torch.equal(moved[name], made[name])}
    assert same == {"tokens", "mask", "empty", "rotary_emb.inv_freq"}
    assert bool((moved["variance"] > 0).all())
    assert all(not torch.equal(moved[name] / made[name], torch.ones(made[name].shape)) for name in names - same)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "no *.safetensors file"),
        ({"w": torch.tensor([1.0, float("nan")])}, "NaN or infinity in w"),
        ({"w": torch.tensor([1.0, float("inf")]), "v": torch.ones(1)}, "NaN or infinity in w"),
    ],
)
def test_unusable_weights_are_refused(tmp_path: Path, tensors: dict[str, Tensor] | None, message: str) -> None:
    if tensors is not None:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message.replace("*", r"\*")) as caught:
        checkpoint.read_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_config_names_the_architecture(tmp_path: Path) -> None:
    checkpoint.write_config(tmp_path, {"architectures": ["Theirs"], "auto_map": {}, "n_embd": 3}, "Ours", "float32")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"model_type": "genmodel", "architectures": ["Ours"], "n_embd": 3, "torch_dtype": "float32"}


@settings(deadline=None, max_examples=60)
@given(vocab=st.integers(2, 200_000), length=st.integers(GENERATED + 2, 4096), seed=st.integers(0, 2**31))
def test_every_workload_fits(vocab: int, length: int, seed: int) -> None:
    """Whatever the model's size, every request fits it and has tokens it knows."""
    requests = shared_workload(vocab, length, seed)
    assert len({request.name for request in requests}) == len(requests) >= 9
    for request in requests:
        assert 1 <= len(request.prompt) <= length - request.max_tokens
        assert all(0 <= token < vocab for token in request.prompt)


def test_the_workload_reaches_what_it_is_for() -> None:
    """One token, two tokens, a block crossed while decoding, a long shared prefix, the longest there can be."""
    prompts = {request.name: request.prompt for request in shared_workload(331, 256, 0)}
    assert len(prompts["one_token"]) == 1
    assert len(prompts["two_tokens"]) == 2
    assert len(prompts["block_crossing"]) < 32 < len(prompts["block_crossing"]) + GENERATED
    assert len(prompts["longest"]) + GENERATED == 256
    shared = [a == b for a, b in zip(prompts["long_prefix_a"], prompts["long_prefix_b"], strict=False)].index(False)
    assert shared >= 64
    assert {0, 330} <= set(prompts["vocabulary_edges"])
    assert sum(request.temperature > 0 for request in shared_workload(331, 256, 0)) == 1


def test_the_rows_of_a_step_take_every_number_from_all_requests_to_one() -> None:
    """A remainder that ranks lose when they deal rows out shows in the plain scenario."""
    requests = shared_workload(331, 256, 0)
    decoding = [sum(request.max_tokens > step for request in requests) for step in range(1, GENERATED)]
    assert set(decoding) == set(range(1, len(requests) + 1))
    assert sum(len(request.prompt) for request in requests) % 8 == 7


def test_a_model_too_short_to_generate_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        shared_workload(331, GENERATED, 0)


EPSILONS = [(1e-3, seed) for seed in SEEDS] + [(1e-5, 0), (1e-6, 0)]
"""The tiny configuration's, and those of published models."""


@pytest.mark.parametrize(("epsilon", "seed"), EPSILONS)
@pytest.mark.parametrize("module", [dense, gpt, moe], ids=["dense", "gpt", "moe"])
def test_every_norm_shows_its_epsilon(module: Any, epsilon: float, seed: int) -> None:
    """Ten times the epsilon, or none to speak of, in any one norm moves some logit far beyond what is allowed."""
    config = {"rms_norm_eps": epsilon, "layer_norm_eps": epsilon}
    rounded = logits(adversarial(module, seed, **config)).double()
    built = adversarial(module, seed, **config)
    built.model.double()
    right = logits(built)
    noise = (rounded - right).abs().amax(1)
    allowed = NOISE_FACTOR * noise.clamp(min=noise.median()) + ULP_FACTOR * 2**-23 * right.abs().max()
    norms = [norm for norm in built.model.modules() if hasattr(norm, "eps")]
    assert len(norms) == 7
    for norm in norms:
        assert norm.eps == epsilon
        for changed, least in ((10 * epsilon, 10), (epsilon / 1000, 10 if epsilon >= 1e-5 else 3)):
            norm.eps = changed
            assert ((logits(built) - right).abs().amax(1) / allowed).max() > least
        norm.eps = epsilon


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_weights_do_not_vanish(dtype: torch.dtype) -> None:
    """Not even in float16, and no weight changes that has not to."""
    table = checkpoint.adversarial_weights(nn.ModuleDict({"e": nn.Embedding(331, 8)}), {"e.weight": (331, 8)}, 0)
    made = table["e.weight"]
    found = checkpoint.rounded(made, dtype)
    assert (found != 0).all()
    usual = made.abs() >= torch.finfo(dtype).tiny
    assert torch.equal(found[usual], made[usual].to(dtype))
    assert made.abs().amax(1).min() < 1e-11
