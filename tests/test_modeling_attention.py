"""Attention outside vLLM, against a formula written out element by element."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genmodel.modeling import _vllm
from genmodel.modeling.attention import Backend, TrainableAttention, TrainableFlashAttention, packed_sequences

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 6, 9


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SLOPES = (0.5, 0.25, 0.125, 0.0625)


def qkv(*leading: int, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(*leading, heads * DIM) for heads in (HEADS, kv_heads, kv_heads))
    return q, k, v


def theirs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_heads: int = KV_HEADS,
    scale: float = DIM**-0.5,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: tuple[float, ...] | None = None,
) -> Tensor:
    """One sequence [T, ..], by loops over heads and tokens, from the definition."""
    out = torch.zeros_like(q)
    for h in range(HEADS):
        kv = h // (HEADS // kv_heads)
        for i in range(len(q)):
            seen = [j for j in range(len(q)) if (not causal or j <= i) and (window is None or abs(i - j) < window)]
            query = q[i, h * DIM : (h + 1) * DIM]
            scores = [float(query @ k[j, kv * DIM : (kv + 1) * DIM]) * scale for j in seen]
            if soft_cap is not None:
                scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
            if slopes is not None:
                scores = [score + slopes[h] * (j - i) for score, j in zip(scores, seen, strict=True)]
            total = sum(math.exp(score) for score in scores)
            for j, score in zip(seen, scores, strict=True):
                out[i, h * DIM : (h + 1) * DIM] += math.exp(score) / total * v[j, kv * DIM : (kv + 1) * DIM]
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("soft_cap", [None, 0.5])
@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_equals_the_formula(
    kv_heads: int, causal: bool, window: int | None, soft_cap: float | None, slopes: tuple[float, ...] | None
) -> None:
    q, k, v = qkv(TOKENS, kv_heads=kv_heads)
    options: dict[str, Any] = {"causal": causal, "soft_cap": soft_cap, "scale": 0.7}
    ours = TrainableAttention(HEADS, DIM, kv_heads, sliding_window=window, alibi_slopes=slopes, **options)(q, k, v)
    expected = theirs(q, k, v, kv_heads=kv_heads, window=window, slopes=slopes, **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_alibi_keeps_float32_s_precision_in_half() -> None:
    """Far back a slope times the distance has no room in bfloat16."""
    layer = TrainableAttention(HEADS, DIM, KV_HEADS, alibi_slopes=SLOPES)
    inputs = [x.bfloat16() for x in qkv(300)]
    wide = layer(*(x.double() for x in inputs))
    torch.testing.assert_close(layer(*inputs).double(), wide, rtol=0, atol=0.01)


def test_defaults() -> None:
    layer = TrainableAttention(HEADS, DIM)
    public = ("num_heads", "num_kv_heads", "head_dim", "scale", "sliding_window", "soft_cap", "causal", "dropout")
    assert [getattr(layer, name) for name in public] == [HEADS, HEADS, DIM, DIM**-0.5, None, None, True, 0.0]
    assert (layer.prefix, layer.backend) == ("", "auto")
    assert not list(layer.parameters())
    assert not layer.state_dict()
    q, k, v = qkv(TOKENS, kv_heads=HEADS)
    torch.testing.assert_close(layer(q, k, v), theirs(q, k, v, kv_heads=HEADS), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 2}, {"soft_cap": 0.5, "sliding_window": 3}, {"alibi_slopes": [0.5, 0.1]}],
)
@pytest.mark.parametrize("packed", [False, True])
def test_gradient_equals_finite_differences(options: dict[str, Any], packed: bool) -> None:
    layer = TrainableAttention(2, 3, 1, **options)
    bounds = torch.tensor([0, 3, 5]) if packed else None
    inputs = tuple(torch.randn(5, heads * 3, requires_grad=True) for heads in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda q, k, v: layer(q, k, v, cu_seqlens=bounds), inputs)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"soft_cap": 0.5}, {"alibi_slopes": SLOPES}])
def test_sequences_never_see_each_other(options: dict[str, Any]) -> None:
    """Packed, batched and one by one are the same, forward and backward."""
    layer = TrainableAttention(HEADS, DIM, KV_HEADS, **options)
    lengths = [4, 1, 4]
    bounds = torch.tensor([0, 4, 5, 9])
    whole = tuple(x.requires_grad_() for x in qkv(sum(lengths)))
    parts = list(zip(*(x.split(lengths) for x in whole), strict=True))
    alone = torch.cat([layer(*part) for part in parts])

    assert not torch.allclose(layer(*whole), alone), "without boundaries they must differ"
    explicit = layer(*whole, cu_seqlens=bounds)
    torch.testing.assert_close(explicit, alone, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(*whole, cu_seqlens=torch.tensor([0, 4, 4, 5, 9])), alone, rtol=0, atol=1e-14)
    with packed_sequences(bounds.to(torch.int32)):
        torch.testing.assert_close(layer(*whole), alone, rtol=0, atol=1e-14)
        torch.testing.assert_close(layer(*(x[None] for x in whole)), alone[None], rtol=0, atol=1e-14)
        with packed_sequences(torch.tensor([0, 9])):
            assert not torch.allclose(layer(*whole), alone), "the inner context counts"
        torch.testing.assert_close(layer(*whole), alone, rtol=0, atol=1e-14)
    assert not torch.allclose(layer(*whole), alone), "the context ends"

    # Exactly zero, not small: the last sequence's output has nothing to do with the others' inputs.
    for grad in torch.autograd.grad(explicit[5:].sum(), whole):
        assert not grad[:5].any()
        assert grad[5:].any()

    stacked = tuple(torch.stack([part[i] for part in (parts[0], parts[2])]) for i in range(3))
    rows = layer(*stacked)
    assert rows.shape == (2, 4, HEADS * DIM)
    torch.testing.assert_close(rows.flatten(0, 1), torch.cat([alone[:4], alone[5:]]), rtol=0, atol=1e-14)


def test_causal_gradient_is_exactly_zero_for_later_tokens() -> None:
    for options in ({}, {"sliding_window": 3}, {"soft_cap": 0.5}, {"alibi_slopes": SLOPES}):
        layer = TrainableAttention(HEADS, DIM, KV_HEADS, **options)
        inputs = tuple(x.requires_grad_() for x in qkv(TOKENS))
        for grad in torch.autograd.grad(layer(*inputs)[4].sum(), inputs):
            assert not grad[5:].any()
            assert grad[4].any()


@pytest.mark.parametrize("soft_cap", [None, 0.5])
def test_dropout_acts_in_training_only(soft_cap: float | None) -> None:
    inputs = qkv(TOKENS)
    layer = TrainableAttention(HEADS, DIM, KV_HEADS, dropout=0.5, soft_cap=soft_cap)
    without = TrainableAttention(HEADS, DIM, KV_HEADS, soft_cap=soft_cap)
    assert not torch.allclose(layer.train()(*inputs), without(*inputs))
    torch.testing.assert_close(layer.eval()(*inputs), without(*inputs), rtol=0, atol=0)


def test_half_precision_is_close_and_keeps_its_dtype() -> None:
    inputs = qkv(TOKENS)
    for options in ({}, {"sliding_window": 3}, {"soft_cap": 0.5}):
        layer = TrainableAttention(HEADS, DIM, KV_HEADS, **options)
        half = layer(*(x.to(torch.bfloat16) for x in inputs))
        assert half.dtype == torch.bfloat16
        # bfloat16 has 8 bits: inputs and output rounded to 2^-8 of values up to about 3
        torch.testing.assert_close(half.double(), layer(*inputs), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainableAttention(4, 8, 3), r"^num_heads \(4\) is not divisible by num_kv_heads \(3\)$"),
        (lambda: TrainableAttention(4, 8, 0), r"^num_heads \(4\) is not divisible by num_kv_heads \(0\)$"),
        (lambda: TrainableAttention(4, 8, sliding_window=0), r"^sliding_window must be at least 1 .* got 0$"),
        (lambda: TrainableAttention(4, 8, soft_cap=0.0), r"^soft_cap must be positive or None, got 0.0$"),
        (
            lambda: TrainableAttention(4, 8, alibi_slopes=[0.5]),
            r"^alibi_slopes must have one slope for each of this rank's 4 heads, got 1$",
        ),
        (lambda: TrainableAttention(4, 8, dropout=1.0), r"^dropout must be in \[0, 1\), got 1.0$"),
        (
            lambda: TrainableAttention(4, 8, backend="fast"),  # type: ignore[arg-type]
            r'^backend must be one of auto, flash, varlen, sdpa, got "fast"$',
        ),
        (lambda: TrainableFlashAttention(10, 4), r"^hidden_size \(10\) is not divisible by num_heads \(4\): pass head"),
        (lambda: TrainableFlashAttention(12, 6, 4), r"^num_heads \(6\) is not divisible by num_kv_heads \(4\)$"),
        (
            lambda: TrainableFlashAttention(8, 2, rotary=lambda p, q, k: (q, k))(torch.zeros(3, 8)),
            r"^this block rotates q and k: pass positions, forward\(hidden_states, positions\)$",
        ),
        (lambda: packed(torch.tensor([1, 3])), r"^cu_seqlens must begin with 0 and never decrease, got \[1, 3\]$"),
        (lambda: packed(torch.tensor([0, 3, 2])), r"^cu_seqlens must begin with 0 and never decrease"),
        (lambda: packed(torch.tensor([0.0, 3.0])), r"^cu_seqlens must be a one-dimensional integer tensor"),
        (lambda: packed(torch.tensor([0, 3])), r"^cu_seqlens ends at 3 but q has shape \[9, 24\]: packed sequences"),
        (
            lambda: TrainableAttention(4, 6, 2)(*qkv(2, 9), cu_seqlens=torch.tensor([0, 18])),
            r"^cu_seqlens ends at 18 but q has shape \[2, 9, 24\]",
        ),
        (
            lambda: TrainableAttention(4, 6, 4)(*qkv(9)),
            r"4 heads, 4 kv heads of 6 takes q \[.., 24\], k and v \[.., 24\] .* got \[9, 24\], \[9, 12\], \[9, 12\]$",
        ),
    ],
)
def test_bad_arguments_are_one_clear_line(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def packed(bounds: Tensor) -> None:
    with packed_sequences(bounds):
        TrainableAttention(HEADS, DIM, KV_HEADS)(*qkv(TOKENS))


def test_flash_backend_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    backends: tuple[Backend, ...] = ("flash", "varlen")
    for backend in backends:
        with pytest.raises(ValueError, match=rf'^backend="{backend}" needs .*: use backend="auto"$'):
            TrainableAttention(4, 8, backend=backend)
    TrainableAttention(4, 8, backend="sdpa")


def test_an_explicit_backend_that_cannot_is_refused() -> None:
    layer = TrainableAttention(HEADS, DIM, KV_HEADS, backend="varlen", soft_cap=1.0)
    with pytest.raises(ValueError, match=r'backend="varlen" needs CUDA .*; got cpu, torch.float64, head_dim 6, .*auto'):
        layer(*qkv(TOKENS))


def test_flash_attn_is_called_by_its_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs a GPU; its documented signature and window convention can be held without one."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
    ) -> Tensor:
        """As in flash-attn 2.7: window_size counts tokens besides the query's own, -1 is unlimited."""
        assert (q.shape, k.shape, v.shape) == ((TOKENS, HEADS, DIM), (TOKENS, KV_HEADS, DIM), (TOKENS, KV_HEADS, DIM))
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_k.diff().max())
        assert dropout_p == 0.25
        outs = []
        for start, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
            window = None if window_size[0] < 0 else window_size[0] + 1
            assert window_size[1] == (-1 if window is None else 0)
            parts = (x[start:end].flatten(1) for x in (q, k, v))
            slopes = None if alibi_slopes is None else tuple(alibi_slopes.tolist())
            assert slopes is None or alibi_slopes.dtype == torch.float32
            outs.append(
                theirs(
                    *parts, scale=softmax_scale, causal=causal, window=window, soft_cap=softcap or None, slopes=slopes
                )
            )
        return torch.cat(outs).view(TOKENS, HEADS, DIM)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    inputs = qkv(TOKENS)
    for bounds in (torch.tensor([0, 4, 9]), None):
        options: dict[str, Any]
        for options in ({}, {"sliding_window": 3}, {"soft_cap": 0.5, "sliding_window": 2}, {"alibi_slopes": SLOPES}):
            layer = TrainableAttention(HEADS, DIM, KV_HEADS, dropout=0.25, **options)
            expected = layer.eval()(*inputs, cu_seqlens=bounds)
            monkeypatch.setattr(layer, "_backend_for", lambda q, packed: "flash")
            torch.testing.assert_close(layer.train()(*inputs, cu_seqlens=bounds), expected, rtol=0, atol=1e-13)


def test_block_is_its_parts() -> None:
    rotated = []

    def rotary(positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        rotated.append((positions.shape, q.shape, k.shape))
        return q * 2, k * 3

    block = TrainableFlashAttention(HEADS * DIM, HEADS, KV_HEADS, rotary=rotary, bias=True)
    block.requires_grad_(False)
    x = torch.randn(2, 5, HEADS * DIM)
    positions = torch.arange(5).expand(2, 5)
    q, k, v = nn.functional.linear(x, block.qkv.weight, block.qkv.bias).split([HEADS * DIM] + 2 * [KV_HEADS * DIM], -1)
    attended = torch.stack([theirs(q[b] * 2, k[b] * 3, v[b]) for b in range(2)])
    expected = nn.functional.linear(attended, block.o_proj.weight, block.o_proj.bias)
    torch.testing.assert_close(block(x, positions), expected, rtol=0, atol=1e-13)
    assert rotated == [((2, 5), (2, 5, HEADS, DIM), (2, 5, KV_HEADS, DIM))]
    flat = torch.randn(5, HEADS * DIM)
    torch.testing.assert_close(block(flat, positions[0]), block(flat[None], positions[:1])[0], rtol=0, atol=1e-14)


class FakeEngineLayer(nn.Module):
    def __init__(self, _config: object, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        return q + 1


@pytest.fixture
def in_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm, "engine_config", object)
    monkeypatch.setattr(_vllm, "attention_layer", FakeEngineLayer)


@pytest.mark.usefixtures("in_engine")
def test_inside_the_engine_it_is_the_engines_layer() -> None:
    slopes = [0.5, 0.25, 0.125, 0.0625]
    layer = TrainableAttention(
        4, 8, 2, sliding_window=3, soft_cap=2.0, alibi_slopes=slopes, dropout=0.5, prefix="layers.0.attn"
    )
    assert isinstance(layer.engine_layer, FakeEngineLayer)
    assert layer.engine_layer.arguments == {
        "num_heads": 4,
        "head_dim": 8,
        "num_kv_heads": 2,
        "scale": 8**-0.5,
        "sliding_window": 3,
        "soft_cap": 2.0,
        "alibi_slopes": (0.5, 0.25, 0.125, 0.0625),
        "prefix": "layers.0.attn",
    }
    q = torch.randn(3, 32)
    assert torch.equal(layer(q, q, q), q + 1)
    assert TrainableFlashAttention(32, 4, prefix="layers.1").attn.prefix == "layers.1.attn"


@pytest.mark.usefixtures("in_engine")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainableAttention(4, 8), r'^inside vLLM every .* prefix=f"\{prefix\}.layers.\{i\}.attn" to layer i$'),
        (lambda: TrainableFlashAttention(32, 4), r"^inside vLLM every attention layer needs a name of its own"),
        (lambda: TrainableAttention(4, 8, causal=False, prefix="layers.0"), r"^layers.0: vLLM's .* in training only$"),
    ],
)
def test_the_engine_refuses_in_one_clear_line(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
