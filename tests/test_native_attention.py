"""What vLLM's attention layers compute, by plain PyTorch: all of it, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.encoder_only_attention import EncoderOnlyAttention

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.modeling import _vllm
from genmodel.reference_models.vllm_layers import VllmDense
from genmodel.runners import checkpoint, native_attention, standalone
from genmodel.runners.session import Session, TargetOptions, UnusableTarget

EVALUATED = (
    "Sinks",
    "SinksInABuffer",
    "ThreeDimensions",
    "OwnForward",
    "SharedKeysAndValues",
    "SharedAndGiven",
    "Capped",
    "Sloped",
    "Chunked",
)
REFUSED = {
    "OwnCache": "Windowed is an Attention with its own get_kv_cache_spec",
    "AnotherSequence": "attn_type encoder_decoder attends to another sequence",
    "OwnBackend": "Attention with attn_backend",
    "NewArgument": "Attention with temperature",
}


def options(name: str, reference: str | None = None) -> TargetOptions:
    return TargetOptions(spec=f"native_targets:{name}", tensor_parallel_sizes=(1,), reference=reference)


OPTIONS = {name: options(name) for name in (*EVALUATED, *REFUSED)}
REFERRED = options("OwnBackend", "genmodel.reference_models.dense:factory")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session([*OPTIONS.values(), REFERRED]) as running:
        yield running


@pytest.mark.parametrize("name", EVALUATED)
def test_a_right_model_is_its_own_reference(session: Session, name: str) -> None:
    """However its layers are built or called, the engine agrees with them in plain PyTorch."""
    check = catalogue.get("logits.values")
    verdict = catalogue.judge(check, session.collect(OPTIONS[name], check.needs | {"inspection"}))
    assert verdict.status is Status.PASSED, verdict


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(session: Session, name: str) -> None:
    """In one line that says which layer, what about it, and what to do."""
    with pytest.raises(UnusableTarget) as raised:
        session.collect(OPTIONS[name], {"inspection"})
    said = str(raised.value)
    assert f"layers.0.attn.attn: {REFUSED[name]} (and 2 more)" in said
    assert "--genmodel-reference" in said
    assert "\n" not in said


def test_with_another_reference_it_need_not_be_known(session: Session) -> None:
    check = catalogue.get("logits.values")
    verdict = catalogue.judge(check, session.collect(REFERRED, check.needs | {"inspection"}))
    assert verdict.status is Status.PASSED, verdict


HEADS, KV_HEADS, SIZE, VALUE_SIZE, TOKENS = 4, 2, 32, 20, 11


@pytest.fixture
def world(tmp_path: Any) -> Iterator[None]:
    """A world of one in which vLLM's layers can be built."""
    checkpoint.write_config(tmp_path, checkpoint.TINY_CONFIG, "VllmDense", "float32")
    _vllm.register_config()
    _vllm.register("VllmDense", VllmDense)
    found = _vllm.model_config(str(tmp_path), "float32")
    with _vllm.native_world(found), _vllm.attention_arguments_kept(), standalone.default_dtype(torch.float64):
        found.compilation_config.static_forward_context.clear()
        yield


def evaluated(layer: nn.Module) -> nn.Module:
    assert native_attention.evaluate(nn.ModuleDict({"layer": layer})) == []
    return layer


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """[T, heads, size] each; `seen` is bool [T, T]."""
    group = HEADS // KV_HEADS
    heads = []
    for head in range(HEADS):
        scores = q[:, head] @ k[:, head // group].T * 0.3
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, head // group])
    return torch.cat(heads, -1)


@pytest.mark.usefixtures("world")
def test_values_of_another_size() -> None:
    """head_size_v, which vLLM's CPU kernels do not have."""
    layer = evaluated(Attention(HEADS, SIZE, 0.3, num_kv_heads=KV_HEADS, prefix="layers.0.a", head_size_v=VALUE_SIZE))
    q, k, v = torch.randn(TOKENS, HEADS, SIZE), torch.randn(TOKENS, KV_HEADS, SIZE), torch.randn(TOKENS, KV_HEADS, 20)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(q, k, v), by_hand(q, k, v, seen))
    torch.testing.assert_close(layer(q.flatten(1), k.flatten(1), v.flatten(1)), by_hand(q, k, v, seen))


@pytest.mark.usefixtures("world")
def test_a_bidirectional_layer_sees_what_comes_after() -> None:
    layer = evaluated(EncoderOnlyAttention(HEADS, SIZE, 0.3, num_kv_heads=KV_HEADS, prefix="layers.0.a"))
    q, k, v = (torch.randn(TOKENS, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    torch.testing.assert_close(layer(q, k, v), by_hand(q, k, v, torch.ones(TOKENS, TOKENS, dtype=torch.bool)))


@pytest.mark.usefixtures("world")
def test_a_quantised_cache_and_other_kinds_of_layers_are_refused() -> None:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    quantised: Any = Attention(HEADS, SIZE, 0.3, prefix="layers.0.a")
    quantised.kv_cache_dtype = "fp8_e4m3"

    class Recurrent(nn.Module, AttentionLayerBase):
        def get_attn_backend(self) -> Any: ...
        def get_kv_cache_spec(self, vllm_config: Any) -> Any: ...

    found = native_attention.evaluate(nn.ModuleDict({"quantised": quantised, "state": Recurrent()}))
    assert found == [
        "quantised: its KV cache is quantised (fp8_e4m3)",
        "state: a Recurrent is not vLLM's Attention",
    ]
