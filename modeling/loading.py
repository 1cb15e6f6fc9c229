"""The default `load_weights`: strict about names, and sharding only as a parameter declares it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from genmodel.modeling import _vllm
from genmodel.modeling.parallel_context import ParallelContext


class LoadError(ValueError):
    """A checkpoint and a model do not fit; the message names every tensor concerned."""


def loadable(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    """(parameters by every name they have, persistent buffers by name) that a checkpoint may hold.

    Buffers of vLLM's own attention (its quantisation scales) are not the checkpoint's business.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    foreign = tuple(f"{name}." for name, module in model.named_modules() if _vllm.is_attention(module))
    buffers = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name not in parameters and isinstance(value, torch.Tensor) and not name.startswith(foreign or ("\0",))
    }
    return parameters, buffers


@torch.no_grad()
def load_weights(
    model: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    parallel_context: ParallelContext | None = None,
) -> set[str]:
    """Load full checkpoint tensors into this rank's shards; every parameter must be met exactly.

    A tied parameter is loaded under any one of its names. Buffers are loaded where the checkpoint has
    them: constructors compute them otherwise.

    Args:
        model: its parameters say how they are sharded: by a `weight_loader`, as DTensors, or by Megatron-core's
            attributes (`tensor_model_parallel`, `partition_dim`, `partition_stride`).
        weights: (name, full tensor) pairs.
        parallel_context: which rank this is, for Megatron's attributes; None means what vLLM says.

    Returns:
        The names loaded, tied names included.

    Raises:
        LoadError: on names the model does not have, parameters the checkpoint does not have, integers for
            floating-point numbers or the reverse, or a shape for which nothing declares how it is sharded. One
            message lists all of them.
    """
    context = parallel_context
    if context is None:
        context = ParallelContext.from_group(_vllm.parallel_group("tp")[2])
    parameters, buffers = loadable(model)
    problems: list[str] = []
    loaded: set[int] = set()
    for name, tensor in weights:
        destination = parameters.get(name, buffers.get(name))
        if destination is None:
            close = difflib.get_close_matches(name, [*parameters, *buffers], n=1)
            problems.append(f"the model has no {name}" + (f" (did you mean {close[0]}?)" if close else ""))
            continue
        try:
            _load_one(name, destination, tensor, context)
        except (LoadError, ValueError) as error:
            problems.append(str(error))
        loaded.add(id(destination))
    # By the parameters as they were: under vLLM's reload_weights, loading puts others in their places.
    first_names = {id(p): name for name, p in reversed(parameters.items())}
    missing = sorted(name for key, name in first_names.items() if key not in loaded)
    if missing:
        problems.append(f"the checkpoint has nothing for {_some(missing)}")
    if problems:
        raise LoadError(f"weights do not fit {type(model).__name__}: " + "; ".join(problems))
    return {name for name, p in {**parameters, **buffers}.items() if id(p) in loaded}


def _load_one(name: str, destination: torch.Tensor, tensor: torch.Tensor, context: ParallelContext) -> None:
    loader = getattr(destination, "weight_loader", None)
    if not callable(loader) and destination.is_floating_point() != tensor.is_floating_point():
        raise LoadError(f"{name} is {destination.dtype} but the checkpoint holds {tensor.dtype}")
    if callable(loader):
        loader(destination, tensor)
    elif isinstance(destination, DTensor):
        if destination.shape != tensor.shape:
            raise LoadError(f"{name} is {list(destination.shape)} but the checkpoint holds {list(tensor.shape)}")
        full = tensor.to(device=destination.device, dtype=destination.dtype)
        destination.copy_(distribute_tensor(full, destination.device_mesh, destination.placements))
    else:
        shard = _declared_shard(destination, tensor, context)
        if destination.shape != shard.shape:
            raise LoadError(
                f"{name} is {list(destination.shape)} on this rank but the checkpoint holds {list(tensor.shape)}, "
                "and nothing says how it is sharded: give the parameter a weight_loader(param, loaded_weight)"
            )
        destination.copy_(shard)


def _declared_shard(destination: torch.Tensor, tensor: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """This rank's slice as Megatron-core's parameter attributes declare it, else the whole tensor.

    A `partition_stride` of n means that n matrices are fused along the partitioned dimension, each of which is
    cut by itself (megatron/core/tensor_parallel/layers.py, _initialize_affine_weight_cpu).
    """
    dim = getattr(destination, "partition_dim", -1)
    if not getattr(destination, "tensor_model_parallel", False) or dim < 0:
        return tensor
    rank, size = context.get_tensor_parallel_rank(), context.get_tensor_parallel_world_size()
    blocks = size * getattr(destination, "partition_stride", 1)
    if tensor.shape[dim] % blocks:
        return tensor
    return torch.cat(tensor.chunk(blocks, dim)[rank::size], dim)


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
