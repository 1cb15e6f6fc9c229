"""Targets that do something terrible to the process they run in."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from genmodel import ParallelContext
from genmodel.modeling._vllm import engine_config
from genmodel.reference_models import dense


def build(vllm_config: Any, parallel_context: ParallelContext, act: Any) -> nn.Module:
    """The dense model, which acts in the engine's forward passes on the last rank only."""
    model = dense.factory(vllm_config, parallel_context)
    if engine_config() is None:
        return model
    forward = model.norm.forward
    last = parallel_context.get_tensor_parallel_world_size() - 1

    def acting(x: Tensor) -> Tensor:
        if parallel_context.get_tensor_parallel_rank() == last:
            act()
        normed: Tensor = forward(x)
        return normed

    model.norm.forward = acting  # type: ignore[method-assign]
    return model


def segfaults(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    return build(vllm_config, parallel_context, lambda: os.kill(os.getpid(), signal.SIGSEGV))


def exits(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    return build(vllm_config, parallel_context, lambda: os._exit(3))


def asks_to_exit(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    return build(vllm_config, parallel_context, lambda: sys.exit("enough"))


def hangs(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    return build(vllm_config, parallel_context, lambda: time.sleep(3600))


def raises(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    def act() -> None:
        raise FloatingPointError("on this rank only")

    return build(vllm_config, parallel_context, act)


def gives_nan(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    model = dense.factory(vllm_config, parallel_context)
    if engine_config() is not None:
        forward = model.norm.forward
        model.norm.forward = lambda x: forward(x) * torch.nan  # type: ignore[method-assign]
    return model
