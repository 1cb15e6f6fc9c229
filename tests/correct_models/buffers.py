"""Correct: persistent buffers of every kind that a state dict has, and parameters of unusual layouts.

A scale and a shift, a table of integers, a mask, one buffer under two names, one of no elements; a parameter of no
elements and one whose memory is not contiguous; and a `load_weights` of its own that computes a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import gpt


class Model(gpt.GPT):
    def __init__(self, config: gpt.Config, context: ParallelContext) -> None:
        super().__init__(config, context)
        size = config.hidden_size
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("tokens", torch.arange(config.vocab_size).flip(0))
        self.register_buffer("mask", torch.ones(16, 16).tril())
        self.register_buffer("empty", torch.empty(0, size))
        self.register_buffer("sum", torch.zeros(()), persistent=False)
        self.again = nn.Module()
        self.again.register_buffer("scale", self.scale)
        self.none = nn.Parameter(torch.empty(0, size))
        self.mixer = nn.Parameter((torch.randn(size, 2 * size) / size).T)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = super().forward(self.tokens[input_ids], positions)
        x = x * self.scale + self.shift * (self.mask[1, 0] > 0)
        low = x @ self.none.T
        out: Tensor = x + (x @ self.mixer.T) @ self.mixer / 100 + low @ self.none + self.empty.sum() + 0 * self.sum
        return out

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = load_weights(self, (pair for pair in weights))
        self.sum.fill_(float(self.scale.sum()))
        return loaded


def factory(vllm_config: Any, parallel_context: ParallelContext) -> Model:
    return Model(gpt.Config.from_hf(vllm_config.model_config.hf_config), parallel_context)
