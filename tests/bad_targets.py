"""Targets that are wrong in one way each, for the messages their authors get."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from genmodel import ParallelContext, TrainableAttention
from genmodel.reference_models import dense

not_callable = {"hidden_size": 128}


def raises(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    raise ZeroDivisionError("the author's own mistake")


def returns_none(vllm_config: Any, parallel_context: ParallelContext) -> None:
    dense.factory(vllm_config, parallel_context)


def returns_class(vllm_config: Any, parallel_context: ParallelContext) -> type[nn.Module]:
    return dense.Dense


def returns_dict(vllm_config: Any, parallel_context: ParallelContext) -> dict[str, Any]:
    return {"model": dense.factory(vllm_config, parallel_context)}


def wants_more(vllm_config: Any, parallel_context: ParallelContext, tokenizer: Any) -> nn.Module:
    return dense.factory(vllm_config, parallel_context)


def reads_missing_setting(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    return nn.Linear(vllm_config.model_config.hf_config.n_embd, 2)


def lacks_methods(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens

    return Bare()


def no_parameters(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    class Empty(nn.Module):
        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*input_ids.shape, 128)

        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self.embed_input_ids(positions)

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(hidden_states), 331)

    return Empty()


def small_heads(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Heads of 16, which vLLM's CPU kernels do not take."""
    config = dense.Config.from_hf(vllm_config.model_config.hf_config)
    return dense.Dense(dataclasses.replace(config, head_dim=16), parallel_context)


def three_heads(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Three heads, which two ranks cannot share."""
    config = dense.Config.from_hf(vllm_config.model_config.hf_config)
    config = dataclasses.replace(config, num_attention_heads=3, num_key_value_heads=3)
    return dense.Dense(config, parallel_context)


def no_prefix(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    model = dense.factory(vllm_config, parallel_context)
    old = model.layers[0].attn.attn
    model.layers[0].attn.attn = TrainableAttention(old.num_heads, old.head_dim, old.num_kv_heads)
    return model


def other_epsilon(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Right but for the norms' epsilon."""
    config = dense.Config.from_hf(vllm_config.model_config.hf_config)
    return dense.Dense(dataclasses.replace(config, rms_norm_eps=1e-5), parallel_context)
