"""Faults of one module that only some ranks, some phases or some schedules show: for the diagnosis to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling._vllm import engine_config
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense

DECODING = 11
"""Most rows of a step in which every request of the workload decodes."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A broken factory and what a diagnosis must say of it."""

    name: str
    factory: Callable[..., nn.Module]
    at: str
    tp: int
    ranks: tuple[int, ...]
    phase: str
    reference: str | None = None


FAULTS: list[Fault] = []


def fault(
    at: str, *, tp: int = 1, ranks: tuple[int, ...] = (0,), phase: str = "prompt"
) -> Callable[[Callable[[Any, int], None]], Callable[[Any, int], None]]:
    """Register a mutation `(module at that name, rank)` of the dense model inside an engine."""

    def register(mutate: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
        def factory(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
            model = dense.factory(vllm_config, parallel_context)
            if engine_config() is not None:
                mutate(model.get_submodule(at), parallel_context.get_tensor_parallel_rank())
            return model

        FAULTS.append(Fault(mutate.__name__, factory, at, tp, ranks, phase))
        return mutate

    return register


def scaled(module: Any, when: Callable[[Tensor], bool], by: float = 1.01) -> None:
    """Multiply what the module gives, for some inputs."""
    forward = module.forward

    def changed(x: Tensor, *rest: Tensor) -> Any:
        out = forward(x, *rest)
        if not when(x):
            return out
        return (out[0] * by, *out[1:]) if isinstance(out, tuple) else out * by

    module.forward = changed


@fault("layers.1.mlp.gate_up", tp=2, ranks=(1,))
def columns_of_rank_1(module: Any, rank: int) -> None:
    """Rank 1's share of a column-parallel layer is scaled."""
    scaled(module, lambda x: rank == 1)


@fault("layers.0.attn.attn", tp=2, ranks=(1,))
def heads_of_rank_1(module: Any, rank: int) -> None:
    """Rank 1's heads are scaled after attention."""
    scaled(module, lambda x: rank == 1)


@fault("layers.2.mlp_norm", tp=2, ranks=(1,))
def norm_of_rank_1(module: Any, rank: int) -> None:
    """A replicated norm is not the same on rank 1."""
    scaled(module, lambda x: rank == 1)


@fault("layers.1.attn.qkv", tp=2, ranks=(1,))
def heads_of_rank_0_on_rank_1(module: Any, rank: int) -> None:
    """Both ranks load rank 0's heads."""
    if rank == 1:
        segments = module.partitions["weight"].segments

        def load(parameter: Tensor, full: Tensor) -> None:
            parts = full.split([segment.size for segment in segments])
            parameter.data.copy_(torch.cat([p[: s.length] for p, s in zip(parts, segments, strict=True)]))

        module.weight.weight_loader = load


@fault("layers.2.attn.o_proj", tp=2, ranks=(0, 1))
def columns_of_rank_1_swapped(module: Any, rank: int) -> None:
    """Rank 1's input features are in the wrong order; the sum over ranks is wrong on both."""
    if rank == 1:
        load = module.weight.weight_loader

        def swapped(parameter: Tensor, full: Tensor) -> None:
            load(parameter, full)
            parameter.data.copy_(parameter.data.flip(1))

        module.weight.weight_loader = swapped


@fault("embed_tokens", tp=2, ranks=(0, 1))
def vocabulary_of_rank_1_shifted(module: Any, rank: int) -> None:
    """Rank 1 looks up its neighbours' rows."""
    if rank == 1:
        load = module.weight.weight_loader

        def shifted(parameter: Tensor, full: Tensor) -> None:
            load(parameter, full)
            parameter.data.copy_(parameter.data.roll(1, 0))

        module.weight.weight_loader = shifted


@fault("layers.1.mlp.down", phase="decode")
def down_in_decode(module: Any, _rank: int) -> None:
    """A branch for few rows is off."""
    scaled(module, lambda x: len(x) <= DECODING)


@fault("layers.2.attn.attn", phase="decode")
def attention_in_decode(module: Any, _rank: int) -> None:
    """Attention over the cache is off, that over a prompt is not."""
    scaled(module, lambda q: len(q) <= DECODING)


@fault("layers.1", tp=2, ranks=(0, 1), phase="decode")
def residual_in_decode(module: Any, _rank: int) -> None:
    """A layer's own code scales its sum."""
    scaled(module, lambda x: len(x) <= DECODING)


@fault("layers.0.mlp")
def another_activation(module: Any, _rank: int) -> None:
    """The MLP's own code, between its two layers."""

    def forward(x: Tensor) -> Tensor:
        gate, up = module.gate_up(x).chunk(2, -1)
        out: Tensor = module.down(F.gelu(gate) * up)
        return out

    module.forward = forward


@fault("norm")
def epsilon_of_the_last_norm(module: Any, _rank: int) -> None:
    """One norm has an epsilon of its own."""
    module.eps = 1e-5


# The same in vLLM's own layers, against dense: norms add to the residual stream, which is handed on apart -----------


def native_fault(at: str, *, tp: int = 1, ranks: tuple[int, ...] = (0,)) -> Callable[[Callable[[Any], None]], None]:
    """Register a mutation of the module at that name of `vllm_layers`, whose reference is dense."""

    def register(mutate: Callable[[Any], None]) -> None:
        def factory(vllm_config: Any) -> nn.Module:
            from genmodel.reference_models.vllm_layers import VllmDense  # here, for it imports vLLM

            model = VllmDense(vllm_config=vllm_config)
            mutate(model.get_submodule(at))
            return model

        FAULTS.append(Fault(mutate.__name__, factory, at, tp, ranks, "prompt", f"{dense.__name__}:factory"))

    return register


@native_fault("layers.0.attn.attn")
def native_attention(module: Any) -> None:
    """The first module after three that take their arguments in another order than dense's."""
    scaled(module, lambda _: True)


@native_fault("layers.0.mlp_norm")
def native_norm_in_the_first_layer(module: Any) -> None:
    """A norm that gives two tensors where dense's gives one."""
    scaled(module, lambda _: True)


@native_fault("layers.1.mlp_norm")
def native_epsilon(module: Any) -> None:
    """An epsilon of its own."""
    module.variance_epsilon = 1e-5


@native_fault("layers.1.attn.qkv")
def native_qkv(module: Any) -> None:
    """A projection whose parts dense gives one by one."""
    scaled(module, lambda _: True)


@native_fault("layers.2.mlp.down", tp=2, ranks=(0, 1))
def native_down(module: Any) -> None:
    """The last layer's output, on all ranks."""
    scaled(module, lambda _: True)


@native_fault("layers.2.attn.o_proj", tp=2, ranks=(0, 1))
def native_output(module: Any) -> None:
    """In a sharded engine too."""
    scaled(module, lambda _: True)


@native_fault("norm")
def native_last_norm(module: Any) -> None:
    """After it there is only the head."""
    scaled(module, lambda _: True)
