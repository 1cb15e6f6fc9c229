"""A dense decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The architecture of Llama 2 and 3, in one file, for training and for vLLM, at any tensor parallel size.

References:
    Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models", https://arxiv.org/abs/2307.09288
    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", https://arxiv.org/abs/1910.07467
    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", https://arxiv.org/abs/2104.09864
    Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models", https://arxiv.org/abs/2305.13245
    Shazeer 2020, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202
    Shoeybi et al. 2019, "Megatron-LM", https://arxiv.org/abs/1909.08053

Legend of shape suffixes: T tokens (any leading dimensions: [tokens] or [batch, tokens]),
C hidden size, H query heads, K kv heads, D head dimension, F intermediate size, V vocabulary.
H, K and F are this rank's share; C and V are full on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling.attention import TrainableAttention
from genmodel.modeling.layers import (
    ColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from genmodel.modeling.parallel_context import ParallelContext


@dataclass(kw_only=True, slots=True, frozen=True)
class Config:
    """The shape of the model; the names are those of a Llama config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, hf_config: Any) -> Self:
        """From a Hugging Face config, or anything with its attributes.

        Raises:
            ValueError: an attribute is missing, or asks for a rotary scaling that is not here.
        """
        required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [name for name in required if not hasattr(hf_config, name)]
        if missing:
            raise ValueError(f"the config has no {', '.join(missing)}; dense needs {', '.join(required)}")
        # transformers 5 moved rope_theta into rope_parameters; older ones have rope_scaling beside it.
        rope: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            rope |= getattr(hf_config, name, None) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"dense has plain rotary positions only, the config asks for rope_type {kind!r}")
        heads = hf_config.num_attention_heads
        return cls(
            **{name: getattr(hf_config, name) for name in required},
            num_key_value_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            rms_norm_eps=getattr(hf_config, "rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", getattr(hf_config, "rope_theta", 10_000.0)),
            tie_word_embeddings=getattr(hf_config, "tie_word_embeddings", False),
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistics in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        return rms_norm(x_TC, self.weight, self.eps)


def rms_norm(x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, over the last dimension."""
    wide = x_TC.to(torch.promote_types(x_TC.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x_TC.dtype) * weight_C


def rotary_table(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim), [T, 1, D / 2], in float32 at least.

    The angles are float64: at position 100,000 a float32 angle is already off by 0.004. Computed
    anew in each forward pass, so that no buffer can be cast, lost or left on the meta device.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_T.device) / head_dim
    angles = positions_T[..., None, None].to(torch.float64) * theta**-exponents
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of each head by the table's angles (the "neox" pairing)."""
    left, right = x_THD.to(cos.dtype).chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x_THD.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; prefix names it for vLLM's KV cache."""

    def __init__(self, config: Config, context: ParallelContext, prefix: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv = QKVParallelLinear(config.hidden_size, heads, kv_heads, self.head_dim, parallel_context=context)
        self.attn = TrainableAttention(self.qkv.num_heads, self.head_dim, self.qkv.num_kv_heads, prefix=prefix)
        self.o_proj = RowParallelLinear(heads * self.head_dim, config.hidden_size, parallel_context=context)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        q, k, v = self.qkv(x_TC)  # [T, H * D], [T, K * D], [T, K * D]
        q = rotate(q.unflatten(-1, (-1, self.head_dim)), cos, sin).flatten(-2)
        k = rotate(k.unflatten(-1, (-1, self.head_dim)), cos, sin).flatten(-2)
        out_TC: Tensor = self.o_proj(self.attn(q, k, v))
        return out_TC


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, size: int, inner: int, context: ParallelContext) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(size, [inner, inner], parallel_context=context)
        self.down = RowParallelLinear(inner, size, parallel_context=context)

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        gate_TF, up_TF = self.gate_up(x_TC).chunk(2, -1)
        out_TC: Tensor = self.down(F.silu(gate_TF) * up_TF)
        return out_TC


class Layer(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream that it adds to."""

    def __init__(self, config: Config, context: ParallelContext, prefix: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, context, f"{prefix}.attn")
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, context)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        x_TC = x_TC + self.attn(self.attn_norm(x_TC), cos, sin)
        out_TC: Tensor = x_TC + self.mlp(self.mlp_norm(x_TC))
        return out_TC


class Dense(nn.Module):
    """The model, with the methods vLLM calls; a plain PyTorch module in training."""

    def __init__(self, config: Config, parallel_context: ParallelContext | None = None) -> None:
        super().__init__()
        context = parallel_context if parallel_context is not None else ParallelContext()
        self.config = config
        size, vocab = config.hidden_size, config.vocab_size
        self.embed_tokens = VocabParallelEmbedding(vocab, size, parallel_context=context)
        self.layers = nn.ModuleList(self.make_layer(context, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = ParallelLMHead(vocab, size, parallel_context=context)
        if config.tie_word_embeddings:
            self.lm_head.tie_weights(self.embed_tokens)
        with torch.no_grad():
            self.embed_tokens.weight.mul_(0.02)  # Llama's initializer_range; matters most when tied

    def make_layer(self, context: ParallelContext, index: int) -> nn.Module:
        """What relatives of this model have of their own: one layer, called as `layer(x_TC, cos, sin)`."""
        return Layer(self.config, context, f"layers.{index}")

    def rotary_table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, D / 2]."""
        return rotary_table(positions, self.config.head_dim, self.config.rope_theta, dtype)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """int [T] -> [T, C]."""
        x_TC: Tensor = self.embed_tokens(input_ids)
        return x_TC

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids and their positions, int [tokens] or [batch, tokens], to hidden states [.., C].

        The arguments are vLLM's: `inputs_embeds` [.., C] replaces `input_ids` where given;
        `intermediate_tensors` belongs to pipeline parallelism, which this model does not have.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "pass input_ids or inputs_embeds"
            inputs_embeds = self.embed_input_ids(input_ids)
        x_TC = inputs_embeds
        cos, sin = self.rotary_table(positions, x_TC.dtype)
        for layer in self.layers:
            x_TC = layer(x_TC, cos, sin)
        out_TC: Tensor = self.norm(x_TC)
        return out_TC

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[.., C] -> [.., V], on every rank."""
        logits_TV: Tensor = self.lm_head(hidden_states)
        return logits_TV


def factory(vllm_config: Any, parallel_context: ParallelContext) -> Dense:
    """What is registered: `pytest --genmodel=genmodel.reference_models.dense:factory`."""
    return Dense(Config.from_hf(vllm_config.model_config.hf_config), parallel_context)
