"""What decoders vary: windows in some layers, partial rotary positions or ALiBi, query and key norms, soft caps.

The decoder of dense with another attention, in one file, for training and for vLLM, at any tensor parallel size. Every
variation is a setting; the names are those of the Hugging Face configurations that have it.

References:
    Beltagy et al. 2020, "Longformer", https://arxiv.org/abs/2004.05150 (attention in a sliding window)
    Gemma Team 2024, "Gemma 2", https://arxiv.org/abs/2408.00118 (every other layer windowed; soft caps)
    Black et al. 2022, "GPT-NeoX-20B", https://arxiv.org/abs/2204.06745 (rotary positions for a part of each head)
    Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", https://arxiv.org/abs/2302.05442
        (norms on queries and keys, here RMSNorm within each head, as in Qwen 3 and Gemma 3)
    Press et al. 2021, "Train Short, Test Long", https://arxiv.org/abs/2108.12409 (ALiBi)

Legend of shape suffixes: T tokens (any leading dimensions), C hidden size, H query heads, K kv heads, D head dimension,
R the rotated part of a head, V vocabulary. H and K are this rank's share.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from genmodel.modeling.attention import TrainableAttention
from genmodel.modeling.collectives import copy_to_group
from genmodel.modeling.layers import QKVParallelLinear, RowParallelLinear
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense
from genmodel.reference_models.dense import MLP, RMSNorm, rms_norm, rotary_table, rotate


@dataclass(kw_only=True, slots=True, frozen=True)
class Config(dense.Config):
    """The shape of the model. The defaults turn everything on but ALiBi, for a model whose scores are small."""

    sliding_window: int | None = 24
    layer_types: tuple[str, ...] = ()
    """ "sliding_attention" or "full_attention" for each layer; without it, every other layer is windowed."""
    partial_rotary_factor: float = 0.5
    use_qk_norm: bool = True
    attn_logit_softcapping: float | None = 2.0
    final_logit_softcapping: float | None = 8.0
    alibi: bool = False
    """Instead of rotary positions."""

    @classmethod
    def from_hf(cls, hf_config: Any) -> Self:
        """From a Hugging Face config, or anything with its attributes.

        Raises:
            ValueError: as dense's; a type for another number of layers; a rotated part of a head that is not even.
        """
        shared = asdict(dense.Config.from_hf(hf_config))
        own = {name: getattr(hf_config, name) for name in cls.__dataclass_fields__ if hasattr(hf_config, name)}
        config = cls(**(own | shared | {"layer_types": tuple(own.get("layer_types") or ())}))
        layers = config.num_hidden_layers
        if len(config.layer_types) not in (0, layers):
            raise ValueError(f"layer_types names {len(config.layer_types)} layers, num_hidden_layers is {layers}")
        if config.rotary_dim % 2:
            raise ValueError(f"the rotated part of a head is {config.rotary_dim} of {config.head_dim}: it must be even")
        return config

    @property
    def rotary_dim(self) -> int:
        """R."""
        return int(self.head_dim * self.partial_rotary_factor)

    def window(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees, itself included; None for all."""
        windowed = self.layer_types[layer] == "sliding_attention" if self.layer_types else layer % 2 == 0
        return self.sliding_window if windowed else None


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 / heads), its square, its cube, ...; between those of a power of two for other numbers of heads."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]


class HeadNorm(RMSNorm):
    """RMSNorm within each of this rank's heads, with one weight for all heads of all ranks."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        super().__init__(config.head_dim, config.rms_norm_eps)
        self.context = context

    def forward(self, x_THD: Tensor) -> Tensor:
        """[T, H, D] -> [T, H, D]."""
        # Each rank's heads give the weight a part of its gradient, which copy_to_group sums up.
        return rms_norm(x_THD, copy_to_group(self.weight, self.context), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with everything that Config turns on."""

    def __init__(self, config: Config, context: ParallelContext, index: int) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rotary_dim, self.alibi = dim, config.rotary_dim, config.alibi
        self.qkv = QKVParallelLinear(size, heads, kv_heads, dim, parallel_context=context)
        self.q_norm = HeadNorm(config, context) if config.use_qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config, context) if config.use_qk_norm else nn.Identity()
        first = context.get_tensor_parallel_rank() * self.qkv.num_heads
        self.attn = TrainableAttention(
            self.qkv.num_heads,
            dim,
            self.qkv.num_kv_heads,
            sliding_window=config.window(index),
            soft_cap=config.attn_logit_softcapping,
            alibi_slopes=alibi_slopes(heads)[first : first + self.qkv.num_heads] if config.alibi else None,
            prefix=f"layers.{index}.attn",
        )
        self.o_proj = RowParallelLinear(heads * dim, size, parallel_context=context)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        q, k, v = self.qkv(x_TC)  # [T, H * D], [T, K * D], [T, K * D]
        q_THD = self.q_norm(q.unflatten(-1, (-1, self.head_dim)))
        k_TKD = self.k_norm(k.unflatten(-1, (-1, self.head_dim)))
        if not self.alibi:
            q_THD, k_TKD = self.rotated(q_THD, cos, sin), self.rotated(k_TKD, cos, sin)
        out_TC: Tensor = self.o_proj(self.attn(q_THD.flatten(-2), k_TKD.flatten(-2), v))
        return out_TC

    def rotated(self, x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The first R of each head are rotated, the others keep what they are."""
        turned, kept = x_THD.split([self.rotary_dim, self.head_dim - self.rotary_dim], -1)
        return torch.cat([rotate(turned, cos, sin), kept], -1)


class Layer(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream that it adds to."""

    def __init__(self, config: Config, context: ParallelContext, index: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, context, index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, context)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        x_TC = x_TC + self.attn(self.attn_norm(x_TC), cos, sin)
        out_TC: Tensor = x_TC + self.mlp(self.mlp_norm(x_TC))
        return out_TC


class Hybrid(dense.Dense):
    """The model, with the methods vLLM calls; a plain PyTorch module in training."""

    config: Config

    def make_layer(self, context: ParallelContext, index: int) -> nn.Module:
        return Layer(self.config, context, index)

    def rotary_table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, R / 2]."""
        return rotary_table(positions, self.config.rotary_dim, self.config.rope_theta, dtype)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[.., C] -> [.., V], on every rank."""
        logits_TV = super().compute_logits(hidden_states)
        cap = self.config.final_logit_softcapping
        return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)


def factory(vllm_config: Any, parallel_context: ParallelContext) -> Hybrid:
    """What is registered: `pytest --genmodel=genmodel.reference_models.hybrid:factory`."""
    return Hybrid(Config.from_hf(vllm_config.model_config.hf_config), parallel_context)
