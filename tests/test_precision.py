"""Dtypes that modules compute in and the range of their values: right models pass, whatever they upcast on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense, gpt, moe
from genmodel.runners import precision
from genmodel.runners.session import Session, TargetOptions
from mutants.precision_mutants import head_in_float32, residual_in_float32

Change = Callable[[Any], None]


def as_it_is(_: Any) -> None:
    pass


def norm_weights_in_float32(model: Any) -> None:
    """Norms keep their parameters in float32 whatever the rest is in."""
    for norm in [model.norm, *(n for layer in model.layers for n in (layer.attn_norm, layer.mlp_norm))]:
        norm.weight.data = norm.weight.data.float()
        norm.forward = lambda x, forward=norm.forward: forward(x).to(x.dtype)


def loss_in_float32(model: Any) -> None:
    """A copy of the logits for the loss, in training only: no number changes."""
    compute = model.compute_logits
    model.compute_logits = lambda hidden: compute(hidden).float() if model.training_side else compute(hidden)


def dropout_in_training(model: Any) -> None:
    """Scales what it keeps, by a number that not every dtype holds."""
    model.dropout = nn.Dropout(0.1)
    forward = model.norm.forward
    model.norm.forward = lambda x: model.dropout(forward(x))


def fast_norm_in_the_engine(model: Any) -> None:
    """PyTorch's own norm, which computes in float32 inside, where training spells it out."""
    norm = model.norm
    if not model.training_side:
        norm.forward = lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def table_made_at_first_use(model: Any) -> None:
    """Of gains by position, in float32: an engine has used it before anybody looks."""
    norm, kept = model.norm, {}
    forward = norm.forward

    def scaled(x: torch.Tensor) -> torch.Tensor:
        if not kept:
            kept["gain"] = 1 + 1e-3 * torch.sin(torch.arange(3.0))
        return forward(x) * kept["gain"][0].to(x.dtype)

    norm.forward = scaled


def other_forms_in_training(model: Any) -> None:
    """The same numbers from other code: a norm over rows by vmap.

    And a float32 statistic for the trainer, which nothing is computed from.
    """
    if not model.training_side:
        return
    model.layers[1].attn_norm.forward = torch.vmap(model.layers[1].attn_norm.forward)
    mlp = model.layers[2].mlp.forward

    def counted(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = mlp(x)
        model.largest = out.float().logsumexp(-1).square().mean()
        return out

    model.layers[2].mlp.forward = counted


def variant(module: Any, change: Change) -> Callable[..., nn.Module]:
    def factory(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
        from genmodel.modeling._vllm import engine_config

        model = module.factory(vllm_config, parallel_context)
        model.training_side = engine_config() is None
        change(model)
        return model  # type: ignore[no-any-return]

    return factory


RIGHT = {
    "dense": variant(dense, as_it_is),
    "gpt": variant(gpt, as_it_is),
    "moe": variant(moe, as_it_is),
    "head": variant(dense, head_in_float32),
    "residual": variant(dense, residual_in_float32),
    "norms": variant(dense, norm_weights_in_float32),
    "loss": variant(dense, loss_in_float32),
    "dropout": variant(dense, dropout_in_training),
    "fast norm": variant(dense, fast_norm_in_the_engine),
    "table": variant(dense, table_made_at_first_use),
    "other forms": variant(dense, other_forms_in_training),
}
OPTIONS = {name: TargetOptions(spec=f"right:{name}", target=factory) for name, factory in RIGHT.items()}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(OPTIONS.values()) as running:
        yield running


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_raises_no_alarm(session: Session, name: str) -> None:
    evidence = session.collect(OPTIONS[name], {"inspection", "precision", "bfloat16"})
    for check in ("logits.module_dtypes", "logits.float16_range"):
        verdict = catalogue.judge(catalogue.get(check), evidence)
        assert verdict.status is Status.PASSED, verdict
    computed = evidence.precision
    assert not isinstance(computed, (str, type(None)))
    assert computed.modules["lm_head"] == ("float32" if name == "head" else "bfloat16")
    assert computed.modules["layers.1"] == ("float32" if name == "residual" else "bfloat16")


def test_a_copy_in_float32_is_what_it_is_a_copy_of() -> None:
    computed = torch.randn(5, dtype=torch.bfloat16)
    assert precision.significant(computed.float()) is torch.bfloat16
    assert precision.significant(torch.randn(5)) is torch.float32
    assert precision.significant(torch.randn(5, dtype=torch.float16)) is torch.float16


def test_masks_are_no_values() -> None:
    """Minus infinity and the smallest number of a dtype, which attention masks are made of."""
    model = nn.Sequential(nn.Identity())
    model.compute_logits = lambda hidden: hidden  # type: ignore[assignment]
    with precision.watched(model) as seen:
        model(torch.tensor([3.0, -torch.inf, torch.finfo(torch.float32).min, -5.0]))
        model.compute_logits(torch.ones(1))  # type: ignore[operator]
    assert seen.largest == {"": 5.0, "0": 5.0, "compute_logits": 1.0}
    assert "compute_logits" in vars(model)
    assert not model._forward_hooks
