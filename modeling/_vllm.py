"""The only module that touches vLLM's moving parts: import paths, renamed methods, version switches.

Nothing here imports vLLM until it is called, and the questions that plain training code asks
(`engine_config`, `is_attention`) never import it at all: a process that has not imported vLLM
cannot be running it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from vllm.config import VllmConfig

_standalone: ContextVar[bool] = ContextVar("genmodel_standalone", default=False)


@contextlib.contextmanager
def standalone() -> Iterator[None]:
    """Build and run models as plain PyTorch here, even where vLLM has a current config.

    The pure-PyTorch reference of a vLLM-native model needs vLLM's config context for vLLM's own
    layers, while layers of ours in the same model must stay differentiable.
    """
    token = _standalone.set(True)
    try:
        yield
    finally:
        _standalone.reset(token)


def engine_config() -> VllmConfig | None:
    """vLLM's config if vLLM is building a model in this very context, else None."""
    if _standalone.get() or "vllm.config" not in sys.modules:
        return None
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def attention_layer(
    config: VllmConfig,
    *,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    prefix: str,
) -> nn.Module:
    """vLLM's own attention with the paged KV cache; head counts are this rank's.

    Called as `layer(q, k, v)` on [tokens, heads * head_dim].
    """
    from vllm.model_executor.layers.attention import Attention

    return Attention(
        num_heads,
        head_dim,
        scale,
        num_kv_heads=num_kv_heads,
        cache_config=config.cache_config,
        quant_config=config.quant_config,
        logits_soft_cap=soft_cap,
        per_layer_sliding_window=sliding_window,
        prefix=prefix,
    )


def is_attention(module: nn.Module) -> bool:
    """Whether `module` is one of vLLM's KV-cached attention layers."""
    base = sys.modules.get("vllm.model_executor.layers.attention_layer_base")
    return base is not None and isinstance(module, base.AttentionLayerBase)


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum over vLLM's tensor-parallel group by its own communicator (CUDA-graph safe, no gradient)."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(x)


def all_gather(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Concatenate over vLLM's tensor-parallel group along `dim` by its own communicator (no gradient)."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(x, dim)


def parallel_group(kind: str) -> tuple[int, int, ProcessGroup | None]:
    """(rank in group, group size, device process group) of vLLM's "tp", "pp" or "dp" group.

    (0, 1, None) where vLLM has not initialised its groups in this process.
    """
    state: Any = sys.modules.get("vllm.distributed.parallel_state")
    coordinator = getattr(state, f"_{kind.upper()}", None) if state is not None else None
    if coordinator is None:
        return 0, 1, None
    return coordinator.rank_in_group, coordinator.world_size, coordinator.device_group


def register(arch: str, model_class: type[nn.Module]) -> None:
    """Make vLLM in this process build `model_class` for `architectures: [arch]`."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(arch, model_class)


def register_config() -> None:
    """Teach transformers, whose AutoConfig vLLM reads config.json with, `model_type: genmodel`."""
    from transformers import AutoConfig

    from genmodel.modeling.hf_config import GenModelConfig

    AutoConfig.register(GenModelConfig.model_type, GenModelConfig, exist_ok=True)
