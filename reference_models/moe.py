"""A mixture of experts: each token's MLP is a few of many, chosen by a router, and one that all tokens share.

The decoder of dense with another MLP, in one file, for training and for vLLM, at any tensor parallel size.

The experts are one wide SwiGLU whose hidden units belong to them in blocks. The router scales a token's blocks, by
zero where it did not choose them, so that shapes depend on no choice and all experts share two matrix products and
one all-reduce; each of them is cut along its hidden units. A model of a size at which that arithmetic matters would
gather each expert's tokens instead: the same function.

References:
    Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
        https://arxiv.org/abs/1701.06538
    Jiang et al. 2024, "Mixtral of Experts", https://arxiv.org/abs/2401.04088 (top-k weights that sum to one)
    Dai et al. 2024, "DeepSeekMoE", https://arxiv.org/abs/2401.06066 (narrow experts, shared experts)
    Qwen Team 2024, "Qwen1.5-MoE" (the names of the configuration)

Legend of shape suffixes: T tokens (any leading dimensions), C hidden size, E experts, A experts a token is given to,
F this rank's share of one expert's intermediate size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling.collectives import copy_to_group
from genmodel.modeling.layers import ColumnParallelLinear, RowParallelLinear
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense
from genmodel.reference_models.dense import MLP, Attention, RMSNorm


@dataclass(kw_only=True, slots=True, frozen=True)
class Config(dense.Config):
    """The shape of the model; the names are those of a Qwen2-MoE config.json."""

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 96
    norm_topk_prob: bool = True

    @classmethod
    def from_hf(cls, hf_config: Any) -> Self:
        """From a Hugging Face config, or anything with its attributes.

        Raises:
            ValueError: as dense's, and if a token is to be given to more experts than there are.
        """
        shared = asdict(dense.Config.from_hf(hf_config))
        own = [name for name in cls.__dataclass_fields__ if name not in shared and hasattr(hf_config, name)]
        config = cls(**shared, **{name: getattr(hf_config, name) for name in own})
        if not 1 <= config.num_experts_per_tok <= config.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({config.num_experts_per_tok}) has to be from 1 to "
                f"num_experts ({config.num_experts})"
            )
        return config


class Router(nn.Module):
    """Each token's weight for every expert: softmax, all but the best A set to zero, scaled to sum to one.

    In float32 at least: what it computes is compared, and bfloat16 has only 256 steps between 1 and 2.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] -> [T, E]."""
        wide = torch.promote_types(x_TC.dtype, torch.float32)
        share_TE = F.linear(x_TC.to(wide), self.weight.to(wide)).softmax(-1)
        best_TA, index_TA = share_TE.topk(self.chosen, -1)
        if self.renormalise:
            best_TA = best_TA / best_TA.sum(-1, keepdim=True)
        return torch.zeros_like(share_TE).scatter(-1, index_TA, best_TA).to(x_TC.dtype)


class Experts(nn.Module):
    """sum over e of weight_e * down_e(silu(gate_e x) * up_e x)."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        super().__init__()
        each = [config.moe_intermediate_size] * config.num_experts
        self.context = context
        self.gate_up = ColumnParallelLinear(config.hidden_size, [*each, *each], parallel_context=context)
        self.down = RowParallelLinear(each, config.hidden_size, parallel_context=context)

    def forward(self, x_TC: Tensor, weight_TE: Tensor) -> Tensor:
        """[T, C], [T, E] -> [T, C]."""
        gate_up = self.gate_up(x_TC).unflatten(-1, (2, weight_TE.shape[-1], -1))
        gate_TEF, up_TEF = gate_up.unbind(-3)
        # Each rank's hidden units give the weights a part of their gradient, which copy_to_group sums up.
        weight_TE = copy_to_group(weight_TE, self.context)
        h_TEF = F.silu(gate_TEF) * up_TEF * weight_TE.unsqueeze(-1)
        out_TC: Tensor = self.down(h_TEF.flatten(-2))
        return out_TC


class Mixture(nn.Module):
    """The experts a token is given to, and the shared one."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, context)
        self.shared = MLP(config.hidden_size, config.shared_expert_intermediate_size, context)

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        out_TC: Tensor = self.experts(x_TC, self.router(x_TC)) + self.shared(x_TC)
        return out_TC


class Layer(nn.Module):
    """Attention and the mixture, each on a normalised copy of the residual stream that it adds to."""

    def __init__(self, config: Config, context: ParallelContext, prefix: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, context, f"{prefix}.attn")
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mixture(config, context)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        x_TC = x_TC + self.attn(self.attn_norm(x_TC), cos, sin)
        out_TC: Tensor = x_TC + self.mlp(self.mlp_norm(x_TC))
        return out_TC


class MixtureOfExperts(dense.Dense):
    """The model, with the methods vLLM calls; a plain PyTorch module in training."""

    config: Config

    def make_layer(self, context: ParallelContext, index: int) -> nn.Module:
        return Layer(self.config, context, f"layers.{index}")


def factory(vllm_config: Any, parallel_context: ParallelContext) -> MixtureOfExperts:
    """What is registered: `pytest --genmodel=genmodel.reference_models.moe:factory`."""
    return MixtureOfExperts(Config.from_hf(vllm_config.model_config.hf_config), parallel_context)
