"""Targets that are right in an unusual way, and vLLM-style classes that lack something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genmodel import ParallelContext
from genmodel.modeling import _vllm
from genmodel.reference_models import dense


class OlderName(nn.Module):
    """As vLLM's models were before 0.12: `get_input_embeddings(input_ids)` embeds."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        context = ParallelContext.from_config(vllm_config.parallel_config)
        self.inner = dense.factory(vllm_config, context)

    def get_input_embeddings(self, input_ids: Tensor) -> Tensor:
        return self.inner.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden: Tensor = self.inner(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.inner.compute_logits(hidden_states)

    def load_weights(self, weights: Any) -> set[str]:
        from genmodel.modeling.loading import load_weights

        return load_weights(self, weights)


class LacksMethods(nn.Module):
    """A vLLM-style class with next to nothing in it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def double_first(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense, but that a scale in another dtype is registered before everything else."""

    class Scaled(dense.Dense):
        def compute_logits(self, hidden_states: Tensor) -> Tensor:
            return super().compute_logits(hidden_states) * self.scale.to(hidden_states.dtype)

    model = Scaled(dense.Config.from_hf(vllm_config.model_config.hf_config), parallel_context)
    scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    model._parameters = {"scale": scale, **model._parameters}
    return model


def ids_only(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense without `inputs_embeds`."""

    class IdsOnly(dense.Dense):
        def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, positions)

    return IdsOnly(dense.Config.from_hf(vllm_config.model_config.hf_config), parallel_context)


def engine_embeds_tokens(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense, in a process where prompts are handed over as token ids whatever was asked for."""
    generate = _vllm.generate

    def by_token_ids(llm: Any, prompts: list[dict[str, Any]], *arguments: Any) -> list[Any]:
        return generate(llm, [prompt | {"embedded": False} for prompt in prompts], *arguments)

    _vllm.generate = by_token_ids
    return dense.factory(vllm_config, parallel_context)


def seeds_do_nothing(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense, in a process where the random number generators cannot be seeded."""
    if _vllm.engine_config() is not None:
        torch.manual_seed = lambda seed: torch.default_generator
    return dense.factory(vllm_config, parallel_context)
