"""Gradient evidence of correct models of all kinds raises no alarm; that of broken ones is in test_mutants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from evidence_samples import clean
from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense, dtensor
from genmodel.runners import checkpoint, gradients, standalone
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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", [as_it_is, in_float32, with_kinks, with_dropout])
def test_a_correct_model_raises_no_alarm(variant: Any, seed: int) -> None:
    """Every gradient check passes, or has nothing to say, under every seed."""
    hf_config = SimpleNamespace(**checkpoint.TINY_CONFIG | {"num_hidden_layers": 2})
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    with standalone.build(dense.factory, config, torch.float64) as built:
        weights = checkpoint.adversarial_weights(built.model, standalone.checkpoint_shapes(built.model), seed)
        standalone.load(built, weights)
        variant(built.model)
        before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
        measured = gradients.measure(built, seed)
        assert all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())
    evidence = replace(clean(), gradients=measured)
    verdicts = [catalogue.judge(check, evidence) for check in catalogue.select(groups=["gradients"])]
    broken = [v for v in verdicts if v.status not in (Status.PASSED, Status.NOT_APPLICABLE)]
    assert not broken, broken
    assert measured.declares_dropout is (variant is with_dropout)
    assert measured.packing is not None
    assert all(min(norms) > 0 for norms in measured.attention_inputs.values())


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
