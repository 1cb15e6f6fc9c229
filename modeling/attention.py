"""Attention that trains in PyTorch and is vLLM's own attention inside a vLLM worker.

Legend of shape suffixes: B batch rows, T tokens, H query heads, K kv heads, D head dimension,
N packed sequences.

Outside vLLM every path is differentiable. vLLM's `flash_attn_varlen_func` is deliberately not among
them: it has no backward, and a module that calls it in training cuts the graph without a word.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling import _vllm
from genmodel.modeling.layers import QKVParallelLinear, RowParallelLinear
from genmodel.modeling.parallel_context import ParallelContext

Backend = Literal["auto", "flash", "varlen", "sdpa"]
Rotary = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(positions [..], q [.., H, D], k [.., K, D]) -> (q, k), rotated, same shapes."""


@dataclass(frozen=True, slots=True)
class _Packing:
    """Boundaries of sequences laid end to end, read once so that a GPU is waited for once."""

    cu_seqlens: Tensor  # int32 [N + 1]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> _Packing:
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
            raise ValueError(
                "cu_seqlens must be a one-dimensional integer tensor of sequence boundaries such as [0, 3, 8], "
                f"got shape {list(cu_seqlens.shape)}, {cu_seqlens.dtype}"
            )
        bounds = cu_seqlens.tolist()
        lengths = tuple(end - start for start, end in pairwise(bounds))
        if bounds[0] != 0 or min(lengths) < 0:
            raise ValueError(f"cu_seqlens must begin with 0 and never decrease, got {bounds}")
        return cls(cu_seqlens.to(torch.int32), lengths)


_ambient_packing: ContextVar[_Packing | None] = ContextVar("genmodel_packing", default=None)


@contextlib.contextmanager
def packed_sequences(cu_seqlens: Tensor) -> Iterator[None]:
    """Tell every TrainableAttention called inside where the packed sequences begin and end.

    The training-side twin of vLLM's forward context: a model whose forward takes only
    (input_ids, positions) can be run on several sequences laid end to end.

    Args:
        cu_seqlens: int [N + 1], 0 followed by the running sum of the N lengths.

    Raises:
        ValueError: not boundaries; and, in the attention, not of as many tokens as it was given.
    """
    token = _ambient_packing.set(_Packing.of(cu_seqlens))
    try:
        yield
    finally:
        _ambient_packing.reset(token)


def visible(tokens: int, window: int | None, *, causal: bool, device: torch.device | None = None) -> Tensor:
    """bool [T, T]: whether token i (row) sees token j (column), as TrainableAttention's arguments have it."""
    index = torch.arange(tokens, device=device)
    distance_TT = index[:, None] - index
    visible_TT = distance_TT >= 0 if causal else torch.ones_like(distance_TT, dtype=torch.bool)
    if window is not None:
        visible_TT = visible_TT & (distance_TT.abs() < window)
    return visible_TT


def attend(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    *,
    scale: float,
    visible_TT: Tensor | None = None,
    causal: bool = True,
    soft_cap: float | None = None,
    slopes_H: Tensor | None = None,
    sinks_H: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T) v by torch's scaled_dot_product_attention, or by plain tensor math where that cannot.

    Args:
        visible_TT: whether token i (row) sees token j (column); None leaves that to `causal`.
        soft_cap, slopes_H, dropout: as in TrainableAttention.
        sinks_H: a score for each head that takes its share of the softmax and gives nothing (GPT-OSS).

    Returns:
        [B, H, T, E], E being the value's head dimension.
    """
    group = q_BHTD.shape[1] // k_BKTD.shape[1]
    if soft_cap is None and slopes_H is None and sinks_H is None:
        return F.scaled_dot_product_attention(
            q_BHTD,
            k_BKTD,
            v_BKTE,
            attn_mask=visible_TT,
            dropout_p=dropout,
            is_causal=causal and visible_TT is None,
            scale=scale,
            enable_gqa=group != 1,
        )
    # SDPA has no place for the cap and the sinks, and rounds a bias to the dtype of q. At least float32, as inside
    # the kernels.
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    k_BHTD, v_BHTE = k_BKTD.repeat_interleave(group, 1), v_BKTE.repeat_interleave(group, 1)
    scores_BHTT = q_BHTD.to(wide) @ k_BHTD.to(wide).mT * scale
    if soft_cap is not None:
        scores_BHTT = soft_cap * torch.tanh(scores_BHTT / soft_cap)
    if slopes_H is not None:
        index = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
        scores_BHTT = scores_BHTT + slopes_H[:, None, None] * (index - index[:, None])
    if visible_TT is None:
        visible_TT = visible(q_BHTD.shape[2], None, causal=causal, device=q_BHTD.device)
    scores_BHTT = scores_BHTT.masked_fill(~visible_TT, float("-inf"))
    if sinks_H is not None:
        column_BHT1 = sinks_H.to(wide)[:, None, None].expand(*scores_BHTT.shape[:3], 1)
        scores_BHTT = torch.cat([scores_BHTT, column_BHT1], -1)
    weights_BHTT = F.dropout(scores_BHTT.softmax(-1)[..., : k_BHTD.shape[2]], dropout)
    return (weights_BHTT @ v_BHTE.to(wide)).to(q_BHTD.dtype)


class TrainableAttention(nn.Module):
    """softmax(scale * q k^T) v for this rank's heads; has no parameters.

    Built while vLLM builds a model, it is vLLM's own Attention layer with the paged KV cache.
    Built anywhere else it is differentiable.

    Args:
        num_heads: query heads on this rank.
        head_dim: size of one head.
        num_kv_heads: key and value heads on this rank, None for as many as query heads. Query head
            h reads kv head h // (num_heads / num_kv_heads).
        scale: factor on q k^T, None for head_dim ** -0.5.
        causal: a token sees itself and what comes before it. vLLM needs True.
        sliding_window: how many tokens a token sees, itself included: i sees j if i - j < window
            (without `causal` also j - i < window).
        soft_cap: scores become soft_cap * tanh(scores / soft_cap) before the mask (Gemma 2).
        alibi_slopes: one for each query head of this rank: slope * (j - i) is added to i's score of j,
            after the soft cap (Press et al. 2021, https://arxiv.org/abs/2108.12409).
        dropout: probability on the attention weights, in training mode only, never inside vLLM.
        prefix: this layer's own name in the model, e.g. "layers.3.attn"; vLLM keys the KV cache by it.
        backend: what computes it outside vLLM. "flash" is the flash-attn package, "varlen" is
            torch's own, both for CUDA in float16 and bfloat16; "sdpa" is torch's
            scaled_dot_product_attention (plain tensor math for soft_cap and alibi_slopes), anywhere
            in any dtype.
            "auto" takes the first of these that can, but "sdpa" for whole sequences of one length
            that only causality masks: on CUDA none is as fast at that.

    Raises:
        ValueError: head counts that do not divide, arguments out of range, a backend that is not
            installed; inside vLLM also an empty prefix or causal=False.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        *,
        scale: float | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        alibi_slopes: Sequence[float] | None = None,
        dropout: float = 0.0,
        prefix: str = "",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.causal = causal
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap
        self.alibi_slopes = None if alibi_slopes is None else tuple(float(slope) for slope in alibi_slopes)
        self.dropout = dropout
        self.prefix = prefix
        self.backend = backend
        self._check_arguments()

        self.engine_layer: nn.Module | None = None
        config = _vllm.engine_config()
        if config is None:
            _check_installed(backend)
            return
        if not prefix:
            raise ValueError(
                "inside vLLM every attention layer needs a name of its own: "
                'pass for example prefix=f"{prefix}.layers.{i}.attn" to layer i'
            )
        if not causal:
            raise ValueError(f"{prefix}: vLLM's decoder attention is causal, causal=False works in training only")
        self.engine_layer = _vllm.attention_layer(
            config,
            num_heads=self.num_heads,
            head_dim=head_dim,
            num_kv_heads=self.num_kv_heads,
            scale=self.scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            alibi_slopes=self.alibi_slopes,
            prefix=prefix,
        )

    def _check_arguments(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not divisible by num_kv_heads ({self.num_kv_heads})")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1 (the token itself) or None, got {self.sliding_window}")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap must be positive or None, got {self.soft_cap}")
        if self.alibi_slopes is not None and len(self.alibi_slopes) != self.num_heads:
            raise ValueError(
                f"alibi_slopes must have one slope for each of this rank's {self.num_heads} heads, "
                f"got {len(self.alibi_slopes)}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            q: [T, H * D] or [B, T, H * D]; each batch row is a sequence of its own.
            k, v: [T, K * D] or [B, T, K * D].
            cu_seqlens: int [N + 1], boundaries of N sequences laid end to end in [T, ..] or
                [1, T, ..]. None means those of `packed_sequences`, and without these one sequence.
                Inside vLLM the engine knows the boundaries and this is ignored.

        Returns:
            q's shape and dtype.

        Raises:
            ValueError: shapes or boundaries that do not fit, or an explicit backend that cannot
                compute this (device, dtype, soft_cap, dropout).
        """
        if self.engine_layer is not None:
            out: Tensor = self.engine_layer(q, k, v)
            return out
        self._check_shapes(q, k, v)
        packing = _ambient_packing.get() if cu_seqlens is None else _Packing.of(cu_seqlens)
        tokens = q.shape[-2]
        batch = q.shape[0] if q.dim() == 3 else 1
        q_BTHD = q.reshape(batch, tokens, self.num_heads, self.head_dim)
        k_BTKD = k.reshape(batch, tokens, self.num_kv_heads, self.head_dim)
        v_BTKD = v.reshape(batch, tokens, self.num_kv_heads, self.head_dim)
        if packing is not None and (batch != 1 or sum(packing.lengths) != tokens):
            raise ValueError(
                f"cu_seqlens ends at {sum(packing.lengths)} but q has shape {list(q.shape)}: "
                "packed sequences are laid end to end, [tokens, ..] or [1, tokens, ..]"
            )
        backend = self._backend_for(q, packed=packing is not None)
        if backend == "sdpa":
            return self._sdpa(q_BTHD, k_BTKD, v_BTKD, packing).reshape(q.shape)
        if packing is None:
            bounds = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
            packing = _Packing(bounds, (tokens,) * batch)
        kernel = self._flash if backend == "flash" else self._varlen
        return kernel(q_BTHD.flatten(0, 1), k_BTKD.flatten(0, 1), v_BTKD.flatten(0, 1), packing).reshape(q.shape)

    def _check_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        kv_shape = (*q.shape[:-1], self.num_kv_heads * self.head_dim)
        good_q = q.dim() in (2, 3) and q.shape[-1] == self.num_heads * self.head_dim
        if not good_q or k.shape != kv_shape or v.shape != kv_shape:
            raise ValueError(
                f"attention of {self.num_heads} heads, {self.num_kv_heads} kv heads of {self.head_dim} takes "
                f"q [.., {self.num_heads * self.head_dim}], k and v [.., {self.num_kv_heads * self.head_dim}] "
                f"with one or two leading dimensions, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )

    def _backend_for(self, q: Tensor, *, packed: bool) -> Backend:
        dropout = self.dropout if self.training else 0.0
        half_on_cuda = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        # Both kernels build on FlashAttention-2: head dimensions of multiples of 8, up to 256.
        fits = half_on_cuda and self.head_dim % 8 == 0 and self.head_dim <= 256
        able: dict[Backend, bool] = {
            "flash": fits,
            "varlen": fits and not dropout and self.soft_cap is None and self.alibi_slopes is None,
            "sdpa": True,
        }
        if self.backend == "auto":
            plain = not packed and self.sliding_window is None and self.soft_cap is None and self.alibi_slopes is None
            return "sdpa" if plain else next(name for name, can in able.items() if can and _installed(name))
        if not able[self.backend]:
            needs = "CUDA tensors in float16 or bfloat16 with a head_dim divisible by 8 and at most 256"
            needs += ", no dropout, no soft_cap and no alibi_slopes" if self.backend == "varlen" else ""
            raise ValueError(
                f'backend="{self.backend}" needs {needs}; got {q.device.type}, {q.dtype}, head_dim {self.head_dim}, '
                f"dropout {dropout}, soft_cap {self.soft_cap}, alibi_slopes {self.alibi_slopes}: "
                'use backend="auto"'
            )
        return self.backend

    def _window(self) -> tuple[int, int]:
        """FlashAttention's (tokens seen to the left, to the right), not counting the token itself; -1 is all."""
        left = -1 if self.sliding_window is None else self.sliding_window - 1
        return (left, 0) if self.causal else (left, left)

    def _flash(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: _Packing) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        longest = max(packing.lengths)
        out: Tensor = flash_attn_varlen_func(
            q_THD,
            k_TKD,
            v_TKD,
            packing.cu_seqlens,
            packing.cu_seqlens,
            longest,
            longest,
            dropout_p=self.dropout if self.training else 0.0,
            softmax_scale=self.scale,
            causal=self.causal,
            window_size=(-1, -1) if self.sliding_window is None else self._window(),
            softcap=self.soft_cap or 0.0,
            alibi_slopes=None if self.alibi_slopes is None else self._slopes(q_THD.device),
        )
        return out

    def _varlen(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packing: _Packing) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(packing.lengths)
        group = self.num_heads // self.num_kv_heads
        grouped: dict[str, Any] = {}
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # not in torch 2.11
            grouped["enable_gqa"] = group > 1
        elif group > 1:
            k_TKD, v_TKD = k_TKD.repeat_interleave(group, 1), v_TKD.repeat_interleave(group, 1)
        out = varlen_attn(
            q_THD,
            k_TKD,
            v_TKD,
            packing.cu_seqlens,
            packing.cu_seqlens,
            longest,
            longest,
            scale=self.scale,
            window_size=self._window(),
            **grouped,
        )
        assert isinstance(out, Tensor)
        return out

    def _sdpa(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, packing: _Packing | None) -> Tensor:
        qkv = [x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD)]
        if packing is None:
            return self._sdpa_rows(*qkv).transpose(1, 2)
        sequences = zip(*(x.split(packing.lengths, 2) for x in qkv), strict=True)
        return torch.cat([self._sdpa_rows(*sequence) for sequence in sequences], 2).transpose(1, 2)

    def _sdpa_rows(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        return attend(
            q_BHTD,
            k_BKTD,
            v_BKTD,
            scale=self.scale,
            visible_TT=self._visible(q_BHTD) if self.sliding_window is not None else None,
            causal=self.causal,
            soft_cap=self.soft_cap,
            slopes_H=None if self.alibi_slopes is None else self._slopes(q_BHTD.device),
            dropout=self.dropout if self.training else 0.0,
        )

    def _slopes(self, device: torch.device) -> Tensor:
        """float32 [H]."""
        return torch.tensor(self.alibi_slopes, dtype=torch.float32, device=device)

    def _visible(self, q_BHTD: Tensor) -> Tensor:
        return visible(q_BHTD.shape[2], self.sliding_window, causal=self.causal, device=q_BHTD.device)

    def extra_repr(self) -> str:
        """What print(module) shows in the brackets."""
        shown = ("num_heads", "num_kv_heads", "head_dim", "scale", "sliding_window", "soft_cap", "prefix")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class TrainableFlashAttention(nn.Module):
    """The whole attention block: project to q, k, v, rotate, attend, project back.

    Args:
        hidden_size: size of the hidden states.
        num_heads, num_kv_heads: head counts of the whole model, over all ranks; None for as many kv
            heads as heads.
        head_dim: size of one head, None for hidden_size / num_heads.
        dropout, scale, sliding_window, soft_cap: as in TrainableAttention.
        bias: biases on both projections.
        rotary: (positions [..], q [.., H, D], k [.., K, D]) -> (q, k), or None for none.
        parallel_context: None means a process on its own.
        prefix: this block's own name in the model, e.g. "layers.3.attn".

    Attributes:
        qkv: the QKVParallelLinear.
        attn: the TrainableAttention with this rank's heads.
        o_proj: the RowParallelLinear.

    Raises:
        ValueError: heads that cannot be spread evenly; what TrainableAttention raises.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        rotary: Rotary | None = None,
        parallel_context: ParallelContext | None = None,
        prefix: str = "",
        scale: float | None = None,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size ({hidden_size}) is not divisible by num_heads ({num_heads}): pass head_dim")
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.rotary = rotary
        self.qkv = QKVParallelLinear(
            hidden_size,
            num_heads,
            num_heads if num_kv_heads is None else num_kv_heads,
            self.head_dim,
            bias,
            parallel_context=parallel_context,
        )
        self.attn = TrainableAttention(
            self.qkv.num_heads,
            self.head_dim,
            self.qkv.num_kv_heads,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            dropout=dropout,
            prefix=f"{prefix}.attn" if prefix else "",
        )
        self.o_proj = RowParallelLinear(num_heads * self.head_dim, hidden_size, bias, parallel_context=parallel_context)

    def forward(
        self, hidden_states: Tensor, positions: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """[T, hidden_size] or [B, T, hidden_size] -> the same shape.

        Args:
            hidden_states: the block's input, full on every rank.
            positions: int [T] or [B, T], for the rotary.
            cu_seqlens: as in TrainableAttention.

        Raises:
            ValueError: there is a rotary and no positions.
        """
        q, k, v = self.qkv(hidden_states)
        if self.rotary is not None:
            if positions is None:
                raise ValueError("this block rotates q and k: pass positions, forward(hidden_states, positions)")
            q_HD, k_KD = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
            q_HD, k_KD = self.rotary(positions, q_HD, k_KD)
            q, k = q_HD.flatten(-2), k_KD.flatten(-2)
        out: Tensor = self.o_proj(self.attn(q, k, v, cu_seqlens=cu_seqlens))
        return out


def _installed(backend: Backend) -> bool:
    if backend == "flash":
        return importlib.util.find_spec("flash_attn") is not None
    if backend == "varlen":
        return _torch_varlen_is_usable()
    return True


def _torch_varlen_is_usable() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")
    # Its first release (torch 2.10) knew no windows.
    return {"window_size", "scale"} <= set(inspect.signature(varlen.varlen_attn).parameters)


def _check_installed(backend: Backend) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f'backend must be one of {", ".join(get_args(Backend))}, got "{backend}"')
    if backend == "flash" and not _installed(backend):
        raise ValueError('backend="flash" needs the flash-attn package, which is not installed: use backend="auto"')
    if backend == "varlen" and not _installed(backend):
        raise ValueError(
            f'backend="varlen" needs torch.nn.attention.varlen with windows, '
            f'which torch {torch.__version__} does not have: use backend="auto"'
        )
