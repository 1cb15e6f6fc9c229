"""Linear layers and embeddings of which each tensor parallel rank holds a part.

They differ from vLLM's layers of the same names in that their backward does the reductions, and
from training frameworks' in that full checkpoint tensors load on any rank by vLLM's
`weight_loader` convention. `forward` returns a tensor, never an (output, bias) pair.

Every parameter here carries

    weight_loader(param, loaded_weight, shard_id=None)   loads a full tensor, or one segment of it
    full_shape                                            the shape of the full, unpadded tensor
    partition                                             which of its slices this rank holds

and `shard_of(param, full_tensor)` cuts this rank's shard from a full tensor, gradients included.

Initialisation is nn.Linear's and nn.Embedding's on the *full* tensor, of which each rank keeps its
shard. So under one seed on all ranks heads differ between ranks, replicated parts do not, and the
weights are the same at every tensor parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling.collectives import copy_to_group, gather_from_group, reduce_from_group
from genmodel.modeling.parallel_context import ParallelContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One of the matrices fused side by side in a parameter (q, k, v; gate, up), and our part of it."""

    name: str | int
    size: int
    """Extent of the full segment along the sharded dimension."""
    start: int
    """Where this rank's part begins in the full segment."""
    length: int
    """Extent of this rank's part; what reaches past `size` is padding, always zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """How one parameter is cut: the full tensor's shape, the sharded dimension and its segments.

    A replicated parameter has one segment that is whole on every rank.
    """

    full_shape: torch.Size
    dim: int
    segments: tuple[Segment, ...]

    @property
    def local_shape(self) -> torch.Size:
        """The shape of this rank's shard, padding included."""
        shape = list(self.full_shape)
        shape[self.dim] = sum(segment.length for segment in self.segments)
        return torch.Size(shape)

    def shard(self, full_tensor: Tensor) -> Tensor:
        """This rank's shard of the full tensor (or of a gradient of that shape).

        Raises:
            ValueError: `full_tensor` does not have the full shape.
        """
        if full_tensor.shape != self.full_shape:
            raise ValueError(
                f"the tensor has shape {list(full_tensor.shape)} but the full parameter has "
                f"{list(self.full_shape)} (this rank's shard of it: {list(self.local_shape)})"
            )
        pieces = full_tensor.split([segment.size for segment in self.segments], self.dim)
        return torch.cat([self._cut(s, piece) for s, piece in zip(self.segments, pieces, strict=True)], self.dim)

    def shard_segment(self, shard_id: str | int, full_segment: Tensor) -> tuple[int, Tensor]:
        """(offset in the local tensor, this rank's part) of one full segment.

        Raises:
            ValueError: no segment of that name, or `full_segment` does not have its full shape.
        """
        offset = 0
        for segment in self.segments:
            if segment.name == shard_id:
                break
            offset += segment.length
        else:
            raise ValueError(f"no shard {shard_id!r} in this parameter, it has {[s.name for s in self.segments]}")
        expected = list(self.full_shape)
        expected[self.dim] = segment.size
        if list(full_segment.shape) != expected:
            raise ValueError(
                f"the tensor for shard {shard_id!r} has shape {list(full_segment.shape)} "
                f"but that shard of the full parameter has {expected}"
            )
        return offset, self._cut(segment, full_segment)

    def _cut(self, segment: Segment, full_segment: Tensor) -> Tensor:
        present = max(0, min(segment.length, segment.size - segment.start))
        piece = full_segment.narrow(self.dim, segment.start if present else 0, present)
        if present == segment.length:
            return piece
        padding = list(piece.shape)
        padding[self.dim] = segment.length - present
        return torch.cat([piece, piece.new_zeros(padding)], self.dim)


def shard_of(param: Tensor, full_tensor: Tensor) -> Tensor:
    """The part of `full_tensor` that belongs in `param` on this rank, e.g. of TP=1's gradient.

    Parameters of other modules (norm weights) are replicated: the full tensor itself.

    Raises:
        ValueError: `full_tensor` does not have the parameter's full shape.
    """
    partition: Partition | None = getattr(param, "partition", None)
    if partition is not None:
        return partition.shard(full_tensor)
    if full_tensor.shape != param.shape:
        raise ValueError(f"the tensor has shape {list(full_tensor.shape)} but the parameter has {list(param.shape)}")
    return full_tensor


def weight_loader(param: Tensor, loaded_weight: Tensor, shard_id: str | int | None = None) -> None:
    """Load a full checkpoint tensor into this rank's shard, in place.

    Args:
        param: a parameter of one of this module's layers.
        loaded_weight: the full tensor, or with `shard_id` the full tensor of that segment.
        shard_id: "q", "k" or "v" for QKVParallelLinear; the index of a segment for a
            ColumnParallelLinear with several.

    Raises:
        ValueError: a shape, a shard id or a class of dtype that does not fit; nothing is ever cut to fit.
    """
    partition: Partition = param.partition  # type: ignore[attr-defined]
    if param.is_floating_point() != loaded_weight.is_floating_point():
        raise ValueError(f"a parameter of {param.dtype} but the checkpoint holds {loaded_weight.dtype}")
    with torch.no_grad():
        if shard_id is None:
            param.copy_(partition.shard(loaded_weight))
            return
        offset, shard = partition.shard_segment(shard_id, loaded_weight)
        param.narrow(partition.dim, offset, shard.shape[partition.dim]).copy_(shard)


class _ParallelLayer(nn.Module):
    """Creates sharded parameters and keeps their metadata attached to them."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    partitions: dict[str, Partition]
    """How each parameter is cut, by its name in this module."""

    def __init__(self, parallel_context: ParallelContext | None) -> None:
        super().__init__()
        self.parallel_context = parallel_context if parallel_context is not None else ParallelContext()
        self.partitions = {}

    def _add_parameter(self, name: str, partition: Partition | None) -> None:
        if partition is None:
            self.register_parameter(name, None)
            return
        self.partitions[name] = partition
        self.register_parameter(name, nn.Parameter(torch.empty(partition.local_shape)))
        self._attach()

    def _attach(self) -> None:
        for name, partition in self.partitions.items():
            param: Any = getattr(self, name)
            param.partition = partition
            param.full_shape = partition.full_shape
            param.weight_loader = weight_loader

    # torch makes new Parameter objects, without our attributes, when a module is copied or
    # unpickled (__setstate__) and when it leaves the meta device (_apply).

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._attach()
        return self

    def _initialise_uniform(self, fan_in: int) -> None:
        """nn.Linear's: uniform within 1/sqrt(fan_in), where fan_in counts the full layer's inputs."""
        bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
        for name, partition in self.partitions.items():
            param: Tensor = getattr(self, name)
            full = torch.empty(partition.full_shape, dtype=param.dtype, device=param.device)
            weight_loader(param, full.uniform_(-bound, bound))


class ColumnParallelLinear(_ParallelLayer):
    """y = x W^T + b with the rows of W, i.e. the output features, spread over the ranks.

    Args:
        in_features: size of the input's last dimension.
        out_features: full size of the output, or the full sizes of several matrices fused side by
            side, e.g. [gate, up]. Each of them is sharded on its own, so that a rank's output is
            [gate's share | up's share]; its checkpoint tensor is the plain concatenation, or
            separate tensors loaded with shard_id 0, 1, ....
        bias: add a learned bias, sharded like the rows.
        gather_output: return the full output on every rank instead of this rank's share.
        parallel_context: None means a process on its own.

    Raises:
        ValueError: an output size is not divisible by the tensor parallel size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        bias: bool = False,
        *,
        gather_output: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        self.in_features = in_features
        self.out_features = [out_features] if isinstance(out_features, int) else list(out_features)
        self.gather_output = gather_output
        segments = [
            _even_segment(index, size, self.parallel_context, "out_features")
            for index, size in enumerate(self.out_features)
        ]
        self.output_sizes = [segment.length for segment in segments]
        self._add_parameter("weight", _partition([sum(self.out_features), in_features], 0, segments))
        self._add_parameter("bias", _partition([sum(self.out_features)], 0, segments) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values like nn.Linear's, for the full layer."""
        self._initialise_uniform(self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] -> [.., this rank's output sizes], or the full sizes if gathered."""
        y = F.linear(copy_to_group(x, self.parallel_context), self.weight, self.bias)
        if not self.gather_output:
            return y
        segments = [gather_from_group(part, self.parallel_context) for part in y.split(self.output_sizes, -1)]
        return torch.cat(segments, -1)


class RowParallelLinear(_ParallelLayer):
    """y = x W^T + b with the columns of W, i.e. the input features, spread over the ranks.

    The input is this rank's share, as a ColumnParallelLinear gives it; the output is full on every
    rank. The bias is replicated and added once, after the reduction (text-generation-inference#1036).

    Args:
        in_features: full size of the input, or the full sizes of several inputs side by side, each
            of which is sharded on its own, as ColumnParallelLinear's outputs are: for example one
            per expert of a mixture.
        out_features: size of the output's last dimension.
        bias: add a learned bias.
        parallel_context: None means a process on its own.

    Raises:
        ValueError: an input size is not divisible by the tensor parallel size.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int,
        bias: bool = False,
        *,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        self.in_features = [in_features] if isinstance(in_features, int) else list(in_features)
        self.out_features = out_features
        segments = [
            _even_segment(index, size, self.parallel_context, "in_features")
            for index, size in enumerate(self.in_features)
        ]
        self._add_parameter("weight", _partition([out_features, sum(self.in_features)], 1, segments))
        self._add_parameter("bias", _replicated(out_features) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values like nn.Linear's, for the full layer."""
        self._initialise_uniform(sum(self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features / tensor parallel size] -> [.., out_features]."""
        y = reduce_from_group(F.linear(x, self.weight), self.parallel_context)
        return y if self.bias is None else y + self.bias


class QKVParallelLinear(_ParallelLayer):
    """The fused query, key and value projection, sharded by heads.

    The fused checkpoint tensor is [q; k; v], each with all of its heads; separate tensors load with
    shard_id "q", "k", "v". With fewer kv heads than ranks each kv head is held by several ranks,
    and each of these replicas gets the head's full gradient.

    Args:
        hidden_size: size of the input's last dimension.
        num_heads, num_kv_heads: head counts of the whole model.
        head_dim: size of one head.
        bias: add learned biases.
        parallel_context: None means a process on its own.

    Attributes:
        num_heads, num_kv_heads: this rank's head counts, what its attention layer takes.

    Raises:
        ValueError: heads that cannot be spread evenly over kv heads or ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        *,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        rank = self.parallel_context.get_tensor_parallel_rank()
        size = self.parallel_context.get_tensor_parallel_world_size()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) is not divisible by num_kv_heads ({num_kv_heads})")
        if num_heads % size:
            raise ValueError(f"num_heads ({num_heads}) is not divisible by the tensor parallel size ({size})")
        if num_kv_heads % size and size % num_kv_heads:
            raise ValueError(
                f"num_kv_heads ({num_kv_heads}) and the tensor parallel size ({size}) do not divide one another"
            )
        self.hidden_size = hidden_size
        self.head_dim = head_dim
        self.num_heads = num_heads // size
        self.num_kv_heads = max(1, num_kv_heads // size)
        self.kv_replicas = max(1, size // num_kv_heads)

        q_share, kv_share = self.num_heads * head_dim, self.num_kv_heads * head_dim
        kv_start = rank // self.kv_replicas * kv_share
        segments = [
            Segment(name="q", size=num_heads * head_dim, start=rank * q_share, length=q_share),
            Segment(name="k", size=num_kv_heads * head_dim, start=kv_start, length=kv_share),
            Segment(name="v", size=num_kv_heads * head_dim, start=kv_start, length=kv_share),
        ]
        self.output_sizes = [segment.length for segment in segments]
        rows = sum(segment.size for segment in segments)
        self._add_parameter("weight", _partition([rows, hidden_size], 0, segments))
        self._add_parameter("bias", _partition([rows], 0, segments) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values like nn.Linear's, for the full layer."""
        self._initialise_uniform(self.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[.., hidden_size] -> this rank's q [.., heads * head_dim], k and v [.., kv heads * head_dim]."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.kv_replicas > 1 and torch.is_grad_enabled():
            weight = self._sum_gradient_over_replicas(weight)
            bias = None if bias is None else self._sum_gradient_over_replicas(bias)
        qkv = F.linear(copy_to_group(x, self.parallel_context), weight, bias)
        q, k, v = qkv.split(self.output_sizes, -1)
        return q, k, v

    def _sum_gradient_over_replicas(self, param: Tensor) -> Tensor:
        """`param` itself; backward, each kv head's gradient summed over the ranks that hold it.

        Each rank's queries give a replicated kv head only a part of its gradient. Seen as every
        rank holding all kv heads and using one, the sum is copy_to_group's; the zeros in the other
        heads' places never reach the result. This spares a process group per kv head.
        """
        segments = self.partitions["weight"].segments
        q, *kv = param.split(self.output_sizes, 0)
        summed = []
        for segment, part in zip(segments[1:], kv, strict=True):
            after = segment.size - segment.start - segment.length
            every_head = F.pad(part, [0, 0] * (part.dim() - 1) + [segment.start, after])
            every_head = copy_to_group(every_head, self.parallel_context)
            summed.append(every_head.narrow(0, segment.start, segment.length))
        return torch.cat([q, *summed])


class VocabParallelEmbedding(_ParallelLayer):
    """A token embedding with the vocabulary's rows spread over the ranks.

    A vocabulary that the ranks do not divide is padded at its end with zero rows, which no token
    reads and no gradient reaches.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, parallel_context: ParallelContext | None = None
    ) -> None:
        super().__init__(parallel_context)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self._segment = _padded_segment(num_embeddings, self.parallel_context)
        self._add_parameter("weight", _partition([num_embeddings, embedding_dim], 0, [self._segment]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values like nn.Embedding's, from the standard normal distribution."""
        full = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.weight.dtype, device=self.weight.device)
        weight_loader(self.weight, full.normal_())

    def forward(self, input_ids: Tensor) -> Tensor:
        """int [..] -> [.., embedding_dim], full on every rank.

        Raises:
            IndexError: on CPU, for an id outside the vocabulary, on every rank alike.
        """
        if self.parallel_context.get_tensor_parallel_world_size() == 1:
            return F.embedding(input_ids, self.weight)
        rows = input_ids - self._segment.start
        known = (input_ids >= 0) & (input_ids < self.num_embeddings)
        ours = known & (rows >= 0) & (rows < self._segment.length)
        # -1 for an unknown id makes the lookup fail on all ranks as it does on one, rather than
        # return zeros or leave the other ranks waiting in the reduction.
        rows = torch.where(ours, rows, known.to(rows.dtype) - 1)
        x = F.embedding(rows, self.weight).masked_fill(~ours.unsqueeze(-1), 0)
        return reduce_from_group(x, self.parallel_context)


class ParallelLMHead(_ParallelLayer):
    """Hidden states to logits, with the vocabulary's rows spread over the ranks.

    `forward` gathers: every rank gets every logit, in vocabulary order, without the padding.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        *,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        segment = _padded_segment(num_embeddings, self.parallel_context)
        self._add_parameter("weight", _partition([num_embeddings, embedding_dim], 0, [segment]))
        self._add_parameter("bias", _partition([num_embeddings], 0, [segment]) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values like nn.Linear's, for the full layer."""
        self._initialise_uniform(self.embedding_dim)

    def tie_weights(self, embedding: VocabParallelEmbedding) -> Self:
        """Use the embedding's weight, one parameter from now on. Returns self.

        Raises:
            ValueError: the embedding's vocabulary, dimension or sharding differs.
        """
        theirs, ours = embedding.partitions["weight"], self.partitions["weight"]
        if theirs != ours:
            raise ValueError(
                f"cannot tie a head of {list(ours.full_shape)} (this rank: {list(ours.local_shape)}) to an "
                f"embedding of {list(theirs.full_shape)} (this rank: {list(theirs.local_shape)})"
            )
        self.weight = embedding.weight
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[.., embedding_dim] -> logits [.., num_embeddings] on every rank."""
        logits = F.linear(copy_to_group(hidden_states, self.parallel_context), self.weight, self.bias)
        return gather_from_group(logits, self.parallel_context)[..., : self.num_embeddings]


def _partition(full_shape: Iterable[int], dim: int, segments: Iterable[Segment]) -> Partition:
    return Partition(full_shape=torch.Size(full_shape), dim=dim, segments=tuple(segments))


def _replicated(*shape: int) -> Partition:
    extent = shape[0] if shape else 0
    return _partition(shape, 0, [Segment(name=0, size=extent, start=0, length=extent)])


def _even_segment(name: int, size: int, context: ParallelContext, what: str) -> Segment:
    ranks = context.get_tensor_parallel_world_size()
    if size % ranks:
        raise ValueError(f"{what} ({size}) is not divisible by the tensor parallel size ({ranks})")
    share = size // ranks
    return Segment(name=name, size=size, start=context.get_tensor_parallel_rank() * share, length=share)


def _padded_segment(vocab_size: int, context: ParallelContext) -> Segment:
    share = math.ceil(vocab_size / context.get_tensor_parallel_world_size())
    return Segment(name=0, size=vocab_size, start=context.get_tensor_parallel_rank() * share, length=share)
