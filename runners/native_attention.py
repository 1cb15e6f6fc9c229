"""vLLM's own attention layers by plain PyTorch, over one whole sequence and with no KV cache.

The layer itself stays vLLM's, with whatever a subclass of it does on the way: only its implementation at the bottom
is replaced. What a layer was built with is taken down while it is built, and each argument is either evaluated here or
refused by name; so is a layer of a kind that is not known here. Nothing is left out in silence.

Legend of shape suffixes: T tokens, H query heads, K kv heads, D and E head dimensions of keys and of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genmodel.modeling import _vllm
from genmodel.modeling.attention import attend, visible

EVALUATED = frozenset(
    {
        "num_heads",
        "head_size",
        "scale",
        "num_kv_heads",
        "alibi_slopes",
        "logits_soft_cap",
        "per_layer_sliding_window",
        "prefix",
        "attn_type",
        "kv_sharing_target_layer_name",
        "head_size_v",
        "sinks",
        # These two say where a layer finds its window and the dtype of its KV cache, of which the layer is asked.
        "cache_config",
        "quant_config",
    }
)
"""Arguments of vLLM's attention layer that are evaluated."""
UNQUANTISED = ("auto", "half", "float", "float16", "bfloat16", "float32", "float64")
"""dtypes of a KV cache that holds keys and values as they are."""
BIDIRECTIONAL = "encoder_only"
"""vLLM's attn_type of layers in which a token sees those after it, too."""
_HARMLESS = {"forward", "extra_repr"}
"""What a subclass may have of its own and still attend as its base does; its forward is run."""


def evaluate(model: nn.Module) -> list[str]:
    """Let the attention layers of a model be plain PyTorch's.

    Returns:
        Why some cannot be: "layers.0.attn: ...". These give zeros.
    """
    layers = {name: module for name, module in model.named_modules() if _vllm.is_attention(module)}
    known = {getattr(layer, "layer_name", name): layer for name, layer in layers.items()}
    refused = []
    for name, module in layers.items():
        layer: Any = module
        reason = _refusal(layer)
        if reason:
            refused.append(f"{name}: {reason}")
        arguments = _vllm.attention_arguments(layer)
        if arguments is not None:
            layer.impl = _PlainAttention(layer, arguments, model, known, evaluated=not reason)
            layer.use_direct_call = True  # not as a custom operation, which is registered for one kind of device
    return refused


def _refusal(layer: Any) -> str:
    """What about a layer is not evaluated here; empty if all of it is."""
    kind = type(layer).__name__
    arguments = _vllm.attention_arguments(layer)
    if arguments is None:
        return f"a {kind} is not vLLM's Attention"
    if (attn_type := arguments.get("attn_type", "decoder")) not in ("decoder", BIDIRECTIONAL):
        return f"attn_type {attn_type} attends to another sequence"
    if not layer.kv_cache_dtype.startswith(UNQUANTISED):
        return f"its KV cache is quantised ({layer.kv_cache_dtype})"
    own = _vllm.attention_kind(layer)
    known = EVALUATED if own == "plain" else EVALUATED | {"attn_backend"}  # which these make for themselves
    if lacking := sorted(arguments.keys() - known):
        return f"{kind} with {', '.join(lacking)}"
    changed = _vllm.changed_of_attention(layer) - _HARMLESS
    if changed and own == "plain":
        return f"{kind} is an Attention with its own {', '.join(sorted(changed))}"
    return ""


class _PlainAttention:
    """Stands for a layer's implementation, and has the attributes of the one it stands for."""

    def __init__(
        self,
        layer: Any,
        arguments: Mapping[str, Any],
        model: nn.Module,
        layers: Mapping[str, Any],
        *,
        evaluated: bool,
    ) -> None:
        self._instead_of = layer.impl
        self._evaluated = evaluated
        self._layers = layers
        self._shares = arguments.get("kv_sharing_target_layer_name")
        self._causal = arguments.get("attn_type") != BIDIRECTIONAL
        self._soft_cap = arguments.get("logits_soft_cap") or None
        self._sinks = _where_it_is(model, arguments.get("sinks"))
        slopes = arguments.get("alibi_slopes")
        self._slopes_H = None if slopes is None else torch.as_tensor(slopes, dtype=torch.float32)
        self._chunk: int | None = getattr(layer, "attention_chunk_size", None)
        self.keys_values: tuple[Tensor, Tensor] | None = None
        """Those of the sequence that was seen last, for layers that share them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instead_of, name)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *_: Any,
        output: Tensor,
        **__: Any,
    ) -> Tensor:
        """Attention of q [T, H, D] into `output` [T, H, E]."""
        if not self._evaluated:
            return output.zero_()
        if self._shares is not None:
            key, value = self._layers[self._shares].impl.keys_values
        assert key is not None
        assert value is not None, "only a layer that shares another's keys and values has none of its own"
        self.keys_values = key, value
        q_HTD, k_KTD, v_KTE = (x.transpose(0, 1)[None] for x in (query, key, value))
        out_HTE = attend(
            q_HTD,
            k_KTD,
            v_KTE,
            scale=self._instead_of.scale,
            visible_TT=self._visible(len(query), layer.sliding_window),
            causal=self._causal,
            soft_cap=self._soft_cap,
            slopes_H=self._slopes_H,
            sinks_H=self._sinks(),
        )
        return output.copy_(out_HTE[0].transpose(0, 1))

    def _visible(self, tokens: int, window: int | None) -> Tensor | None:
        """bool [T, T], None for all that causality lets a token see."""
        if window is None and self._chunk is None:
            return None
        seen = visible(tokens, window, causal=self._causal)
        if self._chunk is not None:
            chunk = torch.arange(tokens) // self._chunk
            seen &= chunk[:, None] == chunk
        return seen


def _where_it_is(model: nn.Module, tensor: Tensor | None) -> Callable[[], Tensor | None]:
    """What gives a model's tensor by its name, for a buffer is another object once the model has changed its dtype."""
    if tensor is None:
        return lambda: None
    named: Iterator[tuple[str, Tensor]] = model.named_buffers()
    name = next((name for name, buffer in named if buffer is tensor), None)
    return (lambda: tensor) if name is None else (lambda: model.get_buffer(name))
