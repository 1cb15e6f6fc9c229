"""The reference models in real vLLM, and the one of vLLM's own layers outside it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.modeling import _vllm
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense
from genmodel.reference_models.vllm_layers import VllmDense
from genmodel.runners import checkpoint, standalone
from genmodel.runners.session import Session, TargetOptions

OF_DENSE = {"vllm_layers": "VllmDense", "megatron": "factory", "dtensor": "factory"}
ALIBI = checkpoint.TINY_CONFIG | {"alibi": True, "attn_logit_softcapping": None}
HYBRID = "genmodel.reference_models.hybrid:factory"
OPTIONS = {
    name: TargetOptions(
        spec=f"genmodel.reference_models.{name}:{attribute}", reference="genmodel.reference_models.dense:factory"
    )
    for name, attribute in OF_DENSE.items()
} | {
    "moe": TargetOptions(spec="genmodel.reference_models.moe:factory"),
    "hybrid": TargetOptions(spec=HYBRID),
    "hybrid with ALiBi": TargetOptions(spec=HYBRID, config="test_reference_models_in_vllm:ALIBI"),
}
SCENARIOS = {"inspection", "gradients", "parallel_gradients", "weights", "reference", "plain"}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """One pool of hosts for all of them."""
    with Session(OPTIONS.values()) as running:
        yield running


NEEDS_MEGATRON = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEEDS_MEGATRON if name == "megatron" else ()) for name in OPTIONS]
)
def test_conforms(session: Session, name: str) -> None:
    """At TP=1 and TP=2, forward, backward and loading: no check that applies fails."""
    evidence = session.collect(OPTIONS[name], SCENARIOS)
    verdicts = [
        catalogue.judge(check, evidence)
        for check in catalogue.all_checks()
        if check.needs <= SCENARIOS and check.group != "interface"
    ]
    bad = [verdict for verdict in verdicts if verdict.status not in (Status.PASSED, Status.NOT_APPLICABLE)]
    assert not bad, bad
    assert sum(verdict.status is Status.PASSED for verdict in verdicts) > 15


@pytest.fixture
def tiny_directory(tmp_path: Any) -> str:
    """A directory with a config.json only."""
    checkpoint.write_config(tmp_path, checkpoint.TINY_CONFIG, "VllmDense", "float32")
    _vllm.register_config()
    _vllm.register("VllmDense", VllmDense)
    return str(tmp_path)


def test_vllm_layers_load_projections_fused_or_not(tiny_directory: str) -> None:
    """A checkpoint with q, k, v, gate and up as tensors of their own is the same model as the fused one."""
    config = _vllm.model_config(tiny_directory, "float32")
    ours = dense.factory(config, ParallelContext())
    fused = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in fused.items():
        if ".qkv." in name:
            parts = zip("qkv", tensor.split([4 * 32, 2 * 32, 2 * 32]), strict=True)
            apart |= {name.replace("qkv", f"{x}_proj"): part for x, part in parts}
        elif ".gate_up." in name:
            parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
            apart |= {name.replace("gate_up", f"{x}_proj"): part for x, part in parts}
        else:
            apart[name] = tensor
    with standalone.build(VllmDense, config, torch.float32) as built, torch.no_grad():
        model: Any = built.model
        assert model.load_weights(apart.items()) == set(fused)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter[: len(fused[name])], fused[name]), name
        with pytest.raises(ValueError, match=r"^VllmDense has no layers.0.attn.qkv.bias for .*q_proj.bias$"):
            model.load_weights([("layers.0.attn.q_proj.bias", torch.zeros(128))])
