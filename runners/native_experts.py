"""vLLM's own layers of routed experts by plain PyTorch.

The layer stays vLLM's: its router, its shared experts, and what it does before and after. Only the kernel at the
bottom is replaced, which exists in an engine alone, once the experts' weights are packed for it. What is not known
here is refused by name.

Legend of shape suffixes: T tokens, K experts of a token, N rows of one expert, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling import _vllm


def _halves(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Of all gates, and then all that they are multiplied with."""

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    return gated


def _swiglu_of_gpt_oss(x: Tensor) -> Tensor:
    """Clamped, with gates and what they are multiplied with in turns, as GPT-OSS has it."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _halves(F.silu),
    "gelu": _halves(F.gelu),
    "gelu_tanh": _halves(lambda x: F.gelu(x, approximate="tanh")),
    "swigluoai": _swiglu_of_gpt_oss,
}
"""By vLLM's names for them."""
_SETTINGS = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
"""Of the activation, which only some of vLLM's kernels read."""


def evaluate(model: nn.Module) -> list[str]:
    """Let the layers of routed experts of a model be plain PyTorch's.

    Returns:
        Why some cannot be: "layers.0.mlp.experts: ...". These give zeros.
    """
    refused = []
    for name, module in model.named_modules():
        if not _vllm.is_experts(module):
            continue
        layer: Any = module
        if reason := _refusal(layer):
            refused.append(f"{name}: {reason}")
            layer.forward = _zeros
        else:
            _vllm.call_experts_directly(layer)
            layer.routed_experts.quant_method.apply = _apply
    return refused


def _refusal(layer: Any) -> str:
    """What about a layer is not evaluated here; empty if all of it is."""
    kind = type(layer).__name__
    experts, router = getattr(layer, "routed_experts", None), getattr(layer, "router", None)
    if kind != "MoERunner" or experts is None or router is None:
        return f"a {kind} is not the layer of experts that is known"
    if (method := type(experts.quant_method).__name__) != "UnquantizedFusedMoEMethod":
        return f"its experts are quantised ({method})"
    if type(router).__name__ != "CPURouter" or router.scoring_func not in ("softmax", "sigmoid"):
        return f"its router is a {type(router).__name__} of {getattr(router, 'scoring_func', 'its own')} scores"
    if experts.activation.value not in ACTIVATIONS:
        return f"its experts have the activation {experts.activation.value}"
    if given := [name for name in _SETTINGS if getattr(experts, name, None) is not None]:
        return f"its experts have {', '.join(given)}"
    config = experts.moe_config
    padded = (config.hidden_dim, config.intermediate_size_per_partition)
    if padded != (config.hidden_dim_unpadded, config.intermediate_size_per_partition_unpadded):
        return "its experts' weights are padded"
    return "" if experts.expert_map is None else "its experts are not all on this rank"


def _zeros(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(hidden_states)


def _apply(layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **_: Any) -> Tensor:
    """Each token's experts' sum [T, C] of x [T, C], with weights and ids [T, K]."""
    activation = ACTIVATIONS[layer.activation.value]
    up_bias, down_bias = getattr(layer, "w13_bias", None), getattr(layer, "w2_bias", None)
    weights_TK = topk_weights.to(x.dtype)
    out_TC = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        weight_N1 = weights_TK[token, slot, None]
        x_NC = x[token]
        if layer.apply_router_weight_on_input:
            x_NC = x_NC * weight_N1
        h = F.linear(x_NC, layer.w13_weight[expert], None if up_bias is None else up_bias[expert])
        y_NC = F.linear(activation(h), layer.w2_weight[expert], None if down_bias is None else down_bias[expert])
        out_TC.index_add_(0, token, y_NC if layer.apply_router_weight_on_input else y_NC * weight_N1)
    return out_TC
