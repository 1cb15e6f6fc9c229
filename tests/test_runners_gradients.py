"""Gradient evidence of correct models of all kinds raises no alarm; that of broken ones is in test_mutants."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from evidence_samples import clean
from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense, dtensor
from genmodel.runners import checkpoint, derivatives, gradients, low_precision, standalone
from genmodel.runners.choices import SameChoices
from genmodel.runners.coding import local


def in_float32(model: Any) -> None:
    """Norms that compute in float32 whatever comes in, as many models' do."""

    def forward(self: dense.RMSNorm, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    for module in model.modules():
        if isinstance(module, dense.RMSNorm):
            module.forward = forward.__get__(module)


def with_kinks(model: Any) -> None:
    """relu instead of silu: a loss with tens of thousands of kinks."""
    for layer in model.layers:

        def forward(x: Tensor, mlp: Any = layer.mlp) -> Tensor:
            gate, up = mlp.gate_up(x).chunk(2, -1)
            out: Tensor = mlp.down(F.relu(gate) * up)
            return out

        layer.mlp.forward = forward


def with_dropout(model: Any) -> None:
    """Dropout as it should be."""
    model.dropout = nn.Dropout(0.2)
    norm = model.norm.forward
    model.norm.forward = lambda x: model.dropout(norm(x))


def as_it_is(model: Any) -> None:
    """The reference model."""


def with_scalars(model: Any) -> None:
    """Parameters of shape [1] and [], whose direction is a sign."""
    model.gain = nn.Parameter(torch.ones(1, dtype=torch.float64))
    model.shift = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    norm = model.norm.forward
    model.norm.forward = lambda x: norm(x) * model.gain + model.shift


def with_an_empty_parameter(model: Any) -> None:
    """A table without rows, which nothing can move."""
    model.unused = nn.Parameter(torch.empty(0, 128))


def with_constant_q_and_k(model: Any) -> None:
    """Attention to all earlier tokens alike."""
    for layer in model.layers:
        attend = layer.attn.attn
        layer.attn.attn = nn.Module()
        layer.attn.attn.inner = attend
        layer.attn.attn.forward = lambda q, k, v, a=attend: a(torch.zeros_like(q), torch.ones_like(k), v)
        size = layer.attn.qkv.weight.shape[0] - attend.num_kv_heads * attend.head_dim
        layer.attn.qkv.weight.data[:size] = 0  # q and k of it are not used


def with_few_positions(model: Any) -> None:
    """Learned positions for 24 tokens, whatever the config says."""
    model.embed_positions = nn.Embedding(24, 128, dtype=torch.float64)
    forward = model.forward
    model.forward = lambda input_ids, positions: forward(
        None, positions, inputs_embeds=model.embed_tokens(input_ids) + model.embed_positions(positions)
    )


def for_flattened_tokens_only(model: Any) -> None:
    """As vLLM passes them."""
    forward = model.forward

    def flattened(input_ids: Tensor, positions: Tensor) -> Tensor:
        (tokens,) = input_ids.shape
        out: Tensor = forward(input_ids, positions.view(tokens))
        return out

    model.forward = flattened


def for_flattened_tokens_that_stay_so(model: Any) -> None:
    """A batch is flattened on the way in, and stays so: nothing is claimed of rows."""
    forward = model.forward
    model.forward = lambda input_ids, positions: forward(input_ids.flatten(), positions.flatten())


def for_tokens_first(model: Any) -> None:
    """Two dimensions are [tokens, batch]."""
    forward = model.forward

    def turned(input_ids: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = forward(input_ids.mT, positions.mT) if input_ids.dim() == 2 else forward(input_ids, positions)
        return out.transpose(0, 1) if input_ids.dim() == 2 else out

    model.forward = turned


def with_functional_dropout(model: Any) -> None:
    """Dropout that no module declares, in the right place."""
    norm = model.norm.forward
    model.norm.forward = lambda x: F.dropout(norm(x), 0.2, training=model.training)


def with_layers_skipped_in_training(model: Any) -> None:
    """Stochastic depth, which draws from Python's generator and from numpy's."""
    draws = (random.random, np.random.rand)
    for layer, draw in zip(model.layers, draws, strict=True):
        layer.forward = lambda x, *rest, inner=layer.forward, draw=draw: (
            x if model.training and draw() < 0.4 else inner(x, *rest)
        )


def with_a_generator_of_its_own(model: Any) -> None:
    """Dropout that no seed reaches."""
    generator = torch.Generator().manual_seed(5)
    norm = model.norm.forward

    def forward(x: Tensor) -> Tensor:
        out: Tensor = norm(x)
        if model.training:
            out = out * (torch.rand(out.shape[-1], generator=generator) > 0.1).to(out.dtype)
        return out

    model.norm.forward = forward


def with_a_buffer_that_training_moves(model: Any) -> None:
    """Each pass in training mode is another one, as where the loads of experts are balanced."""
    model.register_buffer("bias", torch.zeros(128, dtype=torch.float64))
    norm = model.norm.forward

    def forward(x: Tensor) -> Tensor:
        out: Tensor = norm(x) + model.bias
        if model.training:
            with torch.no_grad():
                model.bias += 0.1 * out.reshape(-1, out.shape[-1]).mean(0)
        return out

    model.norm.forward = forward


def with_its_own_backward(model: Any) -> None:
    """silu by hand, in any dtype."""
    for layer in model.layers:

        def forward(x: Tensor, mlp: Any = layer.mlp) -> Tensor:
            gate, up = mlp.gate_up(x).chunk(2, -1)
            out: Tensor = mlp.down(Silu.apply(gate) * up)
            return out

        layer.mlp.forward = forward


class Silu(torch.autograd.Function):
    """x sigmoid(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        half: Tensor = x.sigmoid()
        return gradient * half * (1 + x * (1 - half))


def with_rotary_frequencies_in_a_buffer(model: Any) -> None:
    """Which bfloat16 rounds, and the angles with it."""
    dim, theta = model.config.head_dim, model.config.rope_theta
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    model.register_buffer("frequencies", theta**-exponents)

    def table(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[..., None, None].to(model.frequencies.dtype) * model.frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)

    model.rotary_table = table


def in_no_other_dtype(model: Any) -> None:
    """A tensor that no conversion reaches."""
    one = torch.ones(128, 128, dtype=torch.float64).tril().triu()
    norm = model.norm.forward
    model.norm.forward = lambda x: norm(x) @ one


def _checkpointed(model: Any, *, reentrant: bool, always: bool) -> None:
    model.dropout = nn.Dropout(0.3)
    for layer in model.layers:

        def forward(x: Tensor, *rest: Tensor, inner: Any = layer.forward) -> Tensor:
            def run(x: Tensor, *rest: Tensor) -> Tensor:
                out: Tensor = model.dropout(inner(x, *rest))
                return out

            if not (model.training or always):
                return run(x, *rest)
            out: Tensor = torch.utils.checkpoint.checkpoint(run, x, *rest, use_reentrant=reentrant)
            return out

        layer.forward = forward


def checkpointed(model: Any) -> None:
    """Activations are computed again in backward."""
    _checkpointed(model, reentrant=False, always=False)


def checkpointed_by_reentrance(model: Any) -> None:
    """The same by the older implementation."""
    _checkpointed(model, reentrant=True, always=False)


def always_checkpointed(model: Any) -> None:
    """In evaluation too."""
    _checkpointed(model, reentrant=False, always=True)


def always_checkpointed_by_reentrance(model: Any) -> None:
    """In evaluation too."""
    _checkpointed(model, reentrant=True, always=True)


def with_a_folded_norm(model: Any) -> None:
    """Where no gradients are taken, layers read a product of two weights, which they keep until gradients are taken."""
    folded: dict[Any, Tensor] = {}
    for layer in model.layers:

        def forward(x: Tensor, *tables: Tensor, layer: Any = layer) -> Any:
            x = x + layer.attn(layer.attn_norm(x), *tables)
            if torch.is_grad_enabled():
                folded.pop(layer, None)
                return x + layer.mlp(layer.mlp_norm(x))
            if layer not in folded or folded[layer].dtype != x.dtype:
                folded[layer] = layer.mlp.gate_up.weight * layer.mlp_norm.weight
            alike = dense.rms_norm(x, torch.ones_like(layer.mlp_norm.weight), layer.mlp_norm.eps)
            gate, up = F.linear(alike, folded[layer]).chunk(2, -1)
            return x + layer.mlp.down(F.silu(gate) * up)

        layer.forward = forward


def that_takes_any_keyword(model: Any) -> None:
    """And drops what it does not know, the boundaries of packed sequences too."""
    forward = model.forward

    def outer(input_ids: Any, positions: Any, inputs_embeds: Any = None, **_: Any) -> Any:
        return forward(input_ids, positions, inputs_embeds=inputs_embeds)

    model.forward = outer


NOT_JUDGED: dict[Any, dict[str, str]] = {
    for_flattened_tokens_only: {"batch": "raises ValueError"},
    for_flattened_tokens_that_stay_so: {"batch": "flattened tokens only"},
    for_tokens_first: {"batch": "takes [tokens, batch]"},
    with_a_generator_of_its_own: {"training_mode": "under one seed differ"},
    in_no_other_dtype: {"float32": "does not run so", "bfloat16": "does not run so: RuntimeError", "autocast": ""},
}
"""What cannot be judged of a variant, and why."""

VARIANTS = [
    *(
        (variant, seed)
        for variant in (as_it_is, in_float32, with_kinks, with_dropout, with_scalars)
        for seed in range(3)
    ),
    (with_an_empty_parameter, 0),
    (with_constant_q_and_k, 0),
    (with_few_positions, 0),
    (for_flattened_tokens_only, 0),
    (for_flattened_tokens_that_stay_so, 0),
    (for_tokens_first, 0),
    (with_functional_dropout, 0),
    (with_layers_skipped_in_training, 0),
    (with_a_generator_of_its_own, 0),
    (with_a_buffer_that_training_moves, 0),
    (with_its_own_backward, 0),
    (with_rotary_frequencies_in_a_buffer, 0),
    (in_no_other_dtype, 0),
    (with_a_folded_norm, 0),
    (that_takes_any_keyword, 0),
    (checkpointed, 0),
    (checkpointed_by_reentrance, 0),
    (always_checkpointed, 0),
    (always_checkpointed_by_reentrance, 0),
]
RANDOM_IN_TRAINING = {
    with_dropout,
    with_functional_dropout,
    with_layers_skipped_in_training,
    with_a_generator_of_its_own,
    checkpointed,
    checkpointed_by_reentrance,
    always_checkpointed,
    always_checkpointed_by_reentrance,
}
"""Variants that gradients.dropout is about."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant checkpointing under no_grad
@pytest.mark.parametrize(("variant", "seed"), VARIANTS)
def test_a_correct_model_raises_no_alarm(variant: Any, seed: int) -> None:
    """Every gradient check passes, or has nothing to say and says why; weights, buffers and the seed stay."""
    hf_config = SimpleNamespace(**checkpoint.TINY_CONFIG | {"num_hidden_layers": 2})
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    with standalone.build(dense.factory, config, torch.float64) as built:
        weights = checkpoint.adversarial_weights(built.model, standalone.checkpoint_shapes(built.model), seed)
        standalone.load(built, weights)
        variant(built.model)
        built.model.eval()
        before = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
        torch.manual_seed(17)
        measured = gradients.measure(built, seed)
        assert torch.initial_seed() == 17
        after = built.model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert not any(module.training for module in built.model.modules())
    evidence = replace(clean(), gradients=measured)
    verdicts = {c.function.__name__: catalogue.judge(c, evidence) for c in catalogue.select(groups=["gradients"])}
    broken = [v for v in verdicts.values() if v.status not in (Status.PASSED, Status.NOT_APPLICABLE)]
    assert not broken, broken
    assert (verdicts["dropout"].status is Status.PASSED) is (variant in RANDOM_IN_TRAINING)
    for name in ("training_mode", "batch", "float32", "bfloat16", "autocast"):
        reason = NOT_JUDGED.get(variant, {}).get(name)
        assert verdicts[name].status is (Status.PASSED if reason is None else Status.NOT_APPLICABLE), verdicts[name]
        assert (reason or "") in verdicts[name].reason
    assert measured.lengths == ((17, 9) if variant is with_few_positions else (41, 9))
    assert measured.packing is not None
    judged = {name for name, norms in measured.attention_inputs.items() if min(norms) > 0}
    exempt = set(measured.unjudged_attention_inputs)
    assert judged == set(measured.attention_inputs) or variant is with_constant_q_and_k
    assert all(name.startswith(("q", "k")) for name in exempt)
    assert bool(exempt) is (variant is with_constant_q_and_k)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 5)])
def test_a_direction_has_length_one_whatever_is_drawn(shape: tuple[int, ...]) -> None:
    """Half of all signs are against those of the gradient; of one element that would be all of it."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        guides = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        for chosen in ([], guides, [guides[0], -guides[0]], [None, guides[1]], [torch.zeros(shape)]):
            found = derivatives.direction(torch.Size(shape), chosen, generator)
            assert float(found.norm()) == pytest.approx(1)
        found = derivatives.direction(torch.Size(shape), guides[:1], generator)
        assert float((found * guides[0]).sum()) > 0.5 * float(guides[0].norm())


@pytest.mark.parametrize("kink", [1.5e-7, 1.5e-6, 1.5e-3])
def test_a_kink_nearby_does_not_bend_a_derivative(kink: float) -> None:
    """Of a loss of usual size."""
    numeric, noise = derivatives.by_differences(lambda step: 6.0 + 13.5 * step + 2.0 * max(0.0, step - kink), 6.0)
    assert abs(numeric - 13.5) <= noise < 1e-4


def test_rounding_is_to_a_neighbour_in_bfloat16_and_right_on_average() -> None:
    """As likely up as the value is near the upper one; what bfloat16 has stays."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator, dtype=torch.float64)
    draws = torch.stack([low_precision.stochastically(values, generator) for _ in range(400)])
    assert torch.equal(draws.to(torch.bfloat16).double(), draws)
    ulp = torch.finfo(torch.bfloat16).eps * values.abs()
    assert bool(((draws - values).abs() <= ulp).all())
    assert bool(((draws.mean(0) - values).abs() <= 0.2 * ulp).all())
    exact = values.to(torch.bfloat16).double()
    assert torch.equal(low_precision.stochastically(exact, generator), exact)


def test_choices_are_made_again_as_the_first_time() -> None:
    """By topk, sort, max and argmax; values and gradients are those of what was chosen."""

    def choose(scores: Tensor) -> tuple[Tensor, ...]:
        best, which = scores.topk(2, -1)
        ordered, order = scores.sort(-1, descending=True)
        top, first = scores.max(0)
        return best, which, ordered, order, top, first, scores.argmax(-1), scores.argmin(0)

    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    other = (-scores).requires_grad_()
    with SameChoices() as choices:
        once = choose(scores)
        choices.again()
        twice = choose(other)
    for part in (1, 3, 5, 6, 7):
        assert torch.equal(once[part], twice[part])
    for part in (0, 2, 4):
        assert torch.equal(once[part], -twice[part])
    (gradient,) = torch.autograd.grad(twice[0].sum(), other)
    assert torch.equal(gradient, torch.zeros_like(scores).scatter(-1, once[1], 1.0))


def parallelised_at_any_size(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Every sharded parameter a DTensor, on a single rank too."""
    model = dtensor.Decoder(dense.Config.from_hf(vllm_config.model_config.hf_config))
    mesh = parallel_context.device_mesh
    assert mesh is not None, "a model standalone has a process group"
    return parallelize_module(model, mesh, dtensor.PLAN)


def test_dtensors_of_one_rank_are_measured_like_the_tensors_they_are() -> None:
    """The same losses and derivatives to the last bit, and weights that end as they began."""
    hf_config = SimpleNamespace(**checkpoint.TINY_CONFIG | {"num_hidden_layers": 1})
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    found = []
    for target in (dtensor.factory, parallelised_at_any_size):
        with standalone.build(target, config, torch.float64) as built:
            kinds = {type(p) for p in built.model.parameters()}
            weights = checkpoint.adversarial_weights(built.model, standalone.checkpoint_shapes(built.model), 0)
            standalone.load(built, weights)
            found.append(gradients.measure(built, 0))
            assert all(torch.equal(local(p), weights[name].double()) for name, p in built.model.named_parameters())
    assert DTensor in kinds
    assert found[0] == found[1]
