"""The three collectives of tensor parallelism, right in training and in inference.

Convention (Megatron-LM, Shoeybi et al. 2019, section 3, the f and g of figure 3): every rank of the
group computes the same loss, so the gradient of a replicated tensor is the same full gradient on
every rank.

    function            forward                        backward
    copy_to_group       identity                       all-reduce
    reduce_from_group   all-reduce                     identity
    gather_from_group   all-gather along a dimension   own slice

The gradients are DTensor's, from the placements named below, rather than hand-written ones.
torch.distributed.nn.functional.all_reduce follows another convention (the loss is the sum over the
ranks): its backward reduces once more and scales gradients by the group's size (torchtitan#2106).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genmodel.modeling import _vllm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from genmodel.modeling.parallel_context import ParallelContext


def copy_to_group(x: Tensor, context: ParallelContext) -> Tensor:
    """`x`, the same on every rank, on its way into a layer of which each rank holds a part."""
    if context.get_tensor_parallel_world_size() == 1 or not torch.is_grad_enabled():
        return x
    from torch.distributed.tensor import DTensor, Partial, Replicate

    replicated = DTensor.from_local(x, _mesh(context), [Replicate()], run_check=False)
    return replicated.to_local(grad_placements=[Partial()])


def reduce_from_group(x: Tensor, context: ParallelContext) -> Tensor:
    """The sum over the group of each rank's partial `x`; same shape, the same on every rank."""
    if context.get_tensor_parallel_world_size() == 1:
        return x
    if context.in_engine and not torch.is_grad_enabled():
        return _vllm.all_reduce(x)
    from torch.distributed.tensor import DTensor, Partial

    partial = DTensor.from_local(x, _mesh(context), [Partial()], run_check=False)
    return partial.full_tensor()


def gather_from_group(x: Tensor, context: ParallelContext, dim: int = -1) -> Tensor:
    """Every rank's `x` (equal shapes) concatenated along `dim` in rank order, on every rank."""
    if context.get_tensor_parallel_world_size() == 1:
        return x
    dim %= x.dim()
    if context.in_engine and not torch.is_grad_enabled():
        return _vllm.all_gather(x, dim)
    from torch.distributed.tensor import DTensor, Shard

    sharded = DTensor.from_local(x, _mesh(context), [Shard(dim)], run_check=False)
    return sharded.full_tensor()


def _mesh(context: ParallelContext) -> DeviceMesh:
    mesh = context.device_mesh
    if mesh is None:
        raise RuntimeError(
            f"tensor parallel size {context.get_tensor_parallel_world_size()} but no process group: "
            "build the layers with ParallelContext.from_group(group) to run them"
        )
    return mesh
