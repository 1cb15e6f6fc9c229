"""One dense model as each of the six kinds of target there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from genmodel import ParallelContext
from genmodel.reference_models import dense
from genmodel.reference_models.dense import Config, Dense

FIXED = Config(
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=120,
    vocab_size=203,
)
"""A geometry of its own, which no config says."""


class StyledForVllm(nn.Module):
    """A class vLLM can instantiate without us."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        context = ParallelContext.from_config(vllm_config.parallel_config)
        self.model = Dense(Config.from_hf(vllm_config.model_config.hf_config), context)

    def embed_input_ids(self, input_ids: Any) -> Any:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Any:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Any) -> Any:
        return self.model.compute_logits(hidden_states)

    def load_weights(self, weights: Any) -> set[str]:
        from genmodel.modeling.loading import load_weights

        return load_weights(self, weights)


class PlainClass(Dense):
    """A class that is its own factory."""

    def __init__(self, vllm_config: Any, parallel_context: ParallelContext) -> None:
        super().__init__(Config.from_hf(vllm_config.model_config.hf_config), parallel_context)


class Builder:
    """A callable object with state of its own."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def __call__(self, vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
        hf_config = vllm_config.model_config.hf_config
        hf_config.num_hidden_layers = self.layers
        return dense.factory(vllm_config, parallel_context)


def make_closure(config: Config) -> Callable[..., nn.Module]:
    """A factory that carries its configuration with it."""

    def build(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
        return Dense(config, parallel_context)

    return build


builder = Builder(layers=2)
closure = make_closure(FIXED)
lambda_ = lambda cfg, ctx: Dense(FIXED, ctx)  # noqa: E731 - a lambda is what is tested
