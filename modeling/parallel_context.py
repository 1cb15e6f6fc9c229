"""ParallelContext: where this process stands in the tensor, pipeline and data parallel groups.

A factory receives one and hands it to its layers. The same object serves inside a vLLM worker
(`from_config`), in distributed training (`from_group`, `from_mesh`) and in a single process
(`ParallelContext()`), so that model code never asks which of the three it is in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch.distributed as dist

from genmodel.modeling import _vllm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class GroupMember(NamedTuple):
    """This process's rank in a group, the group's size, and the group itself where there is one."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None


_ALONE = GroupMember()


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelContext:
    """Ranks, sizes and process groups, one `GroupMember` per kind of parallelism.

    `ParallelContext()` is a process on its own: rank 0, size 1, group None. A size larger than one
    with group None is allowed and describes a rank without being it: layers built with it have
    that rank's shapes and load that rank's shards, but cannot run forward.
    """

    tensor_parallel: GroupMember = _ALONE
    pipeline_parallel: GroupMember = _ALONE
    data_parallel: GroupMember = _ALONE
    in_engine: bool = False
    """True only if made inside a vLLM worker: inference collectives then use vLLM's communicator."""
    _mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_config(cls, parallel_config: Any) -> Self:
        """What vLLM's initialised groups say; rank 0, size 1, group None where it has none.

        Args:
            parallel_config: vLLM's `ParallelConfig`, i.e. `vllm_config.parallel_config`.

        Raises:
            ValueError: the groups are initialised with other sizes than `parallel_config` names.
        """
        tp, pp, dp = (GroupMember(*_vllm.parallel_group(kind)) for kind in ("tp", "pp", "dp"))
        named = ("tensor_parallel_size", tp), ("pipeline_parallel_size", pp), ("data_parallel_size", dp)
        for name, member in named:
            wanted = getattr(parallel_config, name, member.size)
            if member.group is not None and wanted != member.size:
                raise ValueError(
                    f"parallel_config.{name} is {wanted} but vLLM's group has {member.size} ranks: "
                    "pass the parallel_config this worker was started with"
                )
        in_engine = tp.group is not None and _vllm.engine_config() is not None
        return cls(tensor_parallel=tp, pipeline_parallel=pp, data_parallel=dp, in_engine=in_engine)

    @classmethod
    def from_group(
        cls,
        tensor_parallel: ProcessGroup | None = None,
        *,
        pipeline_parallel: ProcessGroup | None = None,
        data_parallel: ProcessGroup | None = None,
    ) -> Self:
        """The training side, from torch process groups that this process belongs to.

        Raises:
            ValueError: this process is not a member of one of the groups.
        """
        return cls(
            tensor_parallel=_member(tensor_parallel, "tensor_parallel"),
            pipeline_parallel=_member(pipeline_parallel, "pipeline_parallel"),
            data_parallel=_member(data_parallel, "data_parallel"),
        )

    @classmethod
    def from_mesh(
        cls,
        device_mesh: DeviceMesh,
        *,
        tensor_parallel: str = "tp",
        pipeline_parallel: str = "pp",
        data_parallel: str = "dp",
    ) -> Self:
        """The training side, from a torch DeviceMesh; the arguments name its dimensions.

        A dimension that the mesh does not have counts as size 1. A mesh of one dimension without a
        name is the tensor parallel group.

        Raises:
            ValueError: none of the three names is a dimension of the mesh.
        """
        names = device_mesh.mesh_dim_names
        if names is None and device_mesh.ndim == 1:
            return cls(tensor_parallel=_member(device_mesh.get_group(), "tensor_parallel"), _mesh=device_mesh)
        wanted = (tensor_parallel, pipeline_parallel, data_parallel)
        if not set(wanted) & set(names or ()):
            raise ValueError(f"the device mesh has dimensions {names}, none of them is one of {wanted}")
        groups = [device_mesh.get_group(name) if name in (names or ()) else None for name in wanted]
        tp_mesh = device_mesh[tensor_parallel] if tensor_parallel in (names or ()) else None
        return cls(
            tensor_parallel=_member(groups[0], tensor_parallel),
            pipeline_parallel=_member(groups[1], pipeline_parallel),
            data_parallel=_member(groups[2], data_parallel),
            _mesh=tp_mesh,
        )

    def get_tensor_parallel_rank(self) -> int:
        """This process's rank among those that share each layer."""
        return self.tensor_parallel.rank

    def get_tensor_parallel_world_size(self) -> int:
        """How many processes share each layer."""
        return self.tensor_parallel.size

    def get_tensor_parallel_group(self) -> ProcessGroup | None:
        """The process group that shares each layer; None for a process on its own."""
        return self.tensor_parallel.group

    def get_pipeline_parallel_rank(self) -> int:
        """Which pipeline stage this process is, from 0."""
        return self.pipeline_parallel.rank

    def get_pipeline_parallel_world_size(self) -> int:
        """How many pipeline stages there are."""
        return self.pipeline_parallel.size

    def get_pipeline_parallel_group(self) -> ProcessGroup | None:
        """The process group of the pipeline; None for a process on its own."""
        return self.pipeline_parallel.group

    def get_data_parallel_rank(self) -> int:
        """Which replica of the model this process belongs to, from 0."""
        return self.data_parallel.rank

    def get_data_parallel_size(self) -> int:
        """How many replicas of the model there are."""
        return self.data_parallel.size

    @property
    def world_size(self) -> int:
        """All processes: tensor x pipeline x data parallel."""
        return self.tensor_parallel.size * self.pipeline_parallel.size * self.data_parallel.size

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """A one-dimensional DeviceMesh, named "tp", over the tensor parallel group.

        Built on first use, without communication. None where there is no process group. A context
        made by `from_mesh` answers with that mesh's own tensor parallel dimension.
        """
        group = self.tensor_parallel.group
        if self._mesh is None and group is not None:
            from torch.distributed.device_mesh import DeviceMesh

            device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
            object.__setattr__(self, "_mesh", DeviceMesh.from_group(group, device, mesh_dim_names=("tp",)))
        return self._mesh

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Immutable, and process groups cannot be copied: without this, copy.deepcopy(model) (an RL
        # trainer's frozen reference policy) would fail.
        return self


def _member(group: ProcessGroup | None, name: str) -> GroupMember:
    if group is None:
        return _ALONE
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"this process is not a member of the {name} group: pass the group it belongs to")
    return GroupMember(rank, dist.get_world_size(group), group)
