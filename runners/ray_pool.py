"""Hosts on the nodes of a Ray cluster: many devices, and tensor parallelism across machines.

    session ──► RayPool ──► an agent (a Ray actor) for each rank ──► its node's Pool ──► host

No model code runs in an actor. An agent does on its node what the pool does on one machine, so deadlines, deaths
and logs are told in the same way, and a host that failed is replaced in milliseconds. Nodes need not share a file
system: checkpoints are made on rank 0's node, and sent to the others when a command needs them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genmodel.runners.evidence import Failure
from genmodel.runners.pool import GRACE, IMPORT_DEADLINE, Job, Pool, Result
from genmodel.runners.ports import free_ports
from genmodel.runners.protocol import Command

ANSWERS = 30.0
"""Seconds beyond the deadlines of a command's phases that an agent has to tell of it before it counts as lost."""
MOST_PHASES = 32
"""Of a command; each may take its deadline, to which the agents see."""
PLACED = 60.0
"""Seconds for the cluster to find places for all ranks."""


class NoCluster(Exception):
    """There is no Ray, no cluster, or no room in it; the message is one line that says what would be right."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of a checkpoint: its contents, or where a link points."""

    contents: bytes = b""
    link: str = ""


class Agent:
    """Runs on a node, as a Ray actor: the pool of one rank.

    Args:
        rank: of the host; ranks below are other agents' business.
        environment: additions to the host's environment.
        path: sys.path of the driver.
        directory: working directory of the driver, used if this node has it.
    """

    def __init__(self, rank: int, environment: Mapping[str, str], path: Sequence[str], directory: str) -> None:
        ray: Any = importlib.import_module("ray")
        sys.path[:] = path
        if Path(directory).is_dir():
            os.chdir(directory)
        self._rank = rank
        self._address = ray.util.get_node_ip_address()
        self._node = ray.get_runtime_context().get_node_id()
        self._pool = Pool(rank + 1, {**environment, "VLLM_HOST_IP": self._address})
        self._job: Job | None = None

    def place(self) -> tuple[str, str]:
        """(address, id) of the node."""
        return self._address, self._node

    def free_ports(self, count: int) -> list[int]:
        """Ports of this node that nobody uses."""
        return free_ports(count)

    def files(self, name: str, known: Mapping[str, tuple[int, int]]) -> dict[str, tuple[tuple[int, int], Stored]]:
        """Of this node's copy of a checkpoint directory, the files that differ from those known, with their stamps."""
        found = {}
        root = self._local(name)
        for path in sorted(root.rglob("*")):
            stamp = path.lstat().st_size, path.lstat().st_mtime_ns
            key = str(path.relative_to(root))
            if (path.is_file() or path.is_symlink()) and known.get(key) != stamp:
                contents = Stored(link=str(path.readlink())) if path.is_symlink() else Stored(path.read_bytes())
                found[key] = stamp, contents
        return found

    def store(self, name: str, files: Mapping[str, tuple[tuple[int, int], Stored]]) -> str:
        """Add these to this node's copy; returns why that cannot be, or nothing."""
        for key, (_, stored) in files.items():
            path = self._local(name) / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if not stored.link:
                path.write_bytes(stored.contents)
            elif Path(stored.link).exists():
                path.symlink_to(stored.link)
            else:
                return f"{stored.link} is not on node {self._address}: weights have to be in a folder all nodes share"
        return ""

    def begin(self, command: Command, name: str) -> bool:
        """Give the host a command, with this node's copy of the checkpoint; returns that it has it."""
        spec = replace(command.arguments["spec"], directory=str(self._local(name)))
        self._job = self._pool.begin(replace(command, arguments={**command.arguments, "spec": spec}), [self._rank])
        return True

    def wait(self, begun: bool, deadline: float) -> tuple[Result, float]:
        """The host's answer, and what importing took; Ray runs this once `begin` has returned what is passed here."""
        assert begun
        assert self._job is not None
        result = self._job.wait(deadline)[self._rank]
        return result, self._pool.import_seconds

    def abandon(self) -> None:
        """Kill the host; `wait`, in another thread, tells of it."""
        self._pool.kill(self._rank)

    def close(self) -> None:
        """End the host, and what it started."""
        self._pool.close()

    def _local(self, name: str) -> Path:
        directory = self._pool.directory / name
        directory.mkdir(exist_ok=True)
        return directory


class RayPool:
    """`size` hosts on a Ray cluster, with the face of `genmodel.runners.pool.Pool`.

    Args:
        size: the largest tensor-parallel size that will be asked for.
        environment: additions to every host's environment.

    Raises:
        NoCluster: if Ray is not installed, no cluster answers, or it has no room.
    """

    def __init__(self, size: int, environment: Mapping[str, str] = {}) -> None:
        self._ray, self._connected = _cluster()
        self._size = size
        self._environment = dict(environment)
        self._gpus = 1 if self._ray.cluster_resources().get("GPU") else 0
        self._group = self._places()
        self.directory = Path(tempfile.mkdtemp(prefix="genmodel-"))
        """Not used for more than names: each node has one of its own."""
        self.import_seconds = 0.0
        self._agents: dict[int, Any] = {}
        self._known: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    @property
    def deployable(self) -> int:
        """How many ranks a default engine can have, which starts them on its own node."""
        return 1 if self._gpus else sys.maxsize

    @property
    def address(self) -> str:
        """Of rank 0's node, where ranks meet."""
        found: str = self._ray.get(self.agent(0).place.remote())[0]
        return found

    def nodes(self) -> list[str]:
        """Ids of the ranks' nodes."""
        return [node for _, node in self._ray.get([self.agent(r).place.remote() for r in range(self._size)])]

    def free_ports(self, count: int) -> list[int]:
        """Ports of rank 0's node that nobody uses."""
        found: list[int] = self._ray.get(self.agent(0).free_ports.remote(count))
        return found

    def start(self) -> None:
        """Start agents for all ranks; returns at once."""
        for rank in range(self._size):
            self.agent(rank)

    def begin(self, command: Command, ranks: Sequence[int]) -> RayJob:
        """Give the same command to several ranks; the ranks must be idle."""
        name = Path(command.arguments["spec"].directory).name
        for rank in ranks:
            if rank:
                self._send_checkpoint(name, rank)
        return RayJob(self, command, {rank: self.agent(rank).begin.remote(command, name) for rank in ranks})

    def discard(self, rank: int) -> None:
        """Forget a rank's agent, which is gone or does not answer."""
        agent = self._agents.pop(rank, None)
        if agent is not None:
            self._ray.kill(agent)
        for key in [key for key in self._known if rank in (0, key[0])]:
            del self._known[key]

    def close(self) -> None:
        """End every host, agent, and what they started."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get([agent.close.remote() for agent in self._agents.values()], timeout=ANSWERS)
        for rank in list(self._agents):
            self.discard(rank)
        self._ray.util.remove_placement_group(self._group)
        self._disconnect()
        shutil.rmtree(self.directory, ignore_errors=True)

    def wait(self, pending: Mapping[int, Any], seconds: float) -> dict[int, tuple[Result, float] | str]:
        """The answers there are within so many seconds, or why an agent gives none."""
        ready, _ = self._ray.wait(list(pending.values()), num_returns=1, timeout=max(0.0, seconds))
        found: dict[int, tuple[Result, float] | str] = {}
        for rank, reference in pending.items():
            if reference in ready:
                try:
                    found[rank] = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    found[rank] = str(error).strip().splitlines()[-1]
        return found

    def _disconnect(self) -> None:
        if self._connected:
            self._ray.shutdown()

    def _send_checkpoint(self, name: str, rank: int) -> None:
        known = self._known.setdefault((rank, name), {})
        files = self._ray.get(self.agent(0).files.remote(name, known))
        if not files:
            return
        if problem := self._ray.get(self.agent(rank).store.remote(name, files)):
            raise NoCluster(problem)
        known.update({key: stamp for key, (stamp, _) in files.items()})

    def agent(self, rank: int) -> Any:
        """The handle of a rank's agent, which is started if there is none."""
        if rank not in self._agents:
            strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=rank
            )
            actor = self._ray.remote(Agent).options(
                num_cpus=1, num_gpus=self._gpus, scheduling_strategy=strategy, max_concurrency=4
            )
            # Its one device is the first that the rank sees.
            environment = {**self._environment, **({"GENMODEL_LOCAL_RANK": "0"} if self._gpus else {})}
            self._agents[rank] = actor.remote(rank, environment, list(sys.path), str(Path.cwd()))
        return self._agents[rank]

    def _places(self) -> Any:
        bundle = {"CPU": 1, **({"GPU": 1} if self._gpus else {})}
        group = self._ray.util.placement_group([bundle] * self._size, strategy="PACK")
        if not group.wait(PLACED):
            self._ray.util.remove_placement_group(group)
            self._disconnect()
            raise NoCluster(
                f"the Ray cluster has no room for {self._size} ranks of {'a GPU' if self._gpus else 'a CPU'} each: "
                f"a smaller --genmodel-tp, or more nodes"
            )
        return group


class RayJob:
    """A command on its way through one or several agents."""

    def __init__(self, pool: RayPool, command: Command, begun: Mapping[int, Any]) -> None:
        self._pool = pool
        self._command = command
        self._begun = begun
        self.started = dict.fromkeys(begun, time.perf_counter())
        """When each rank had its command, on this process's clock."""

    def wait(self, deadline: float) -> dict[int, Result]:
        """Every rank's result; a rank that is late, or waits for one that failed, is killed."""
        pending = {rank: self._pool.agent(rank).wait.remote(begun, deadline) for rank, begun in self._begun.items()}
        results: dict[int, Result] = {}
        culprit: tuple[int, float] | None = None
        abandoned: set[int] = set()
        end = time.monotonic() + MOST_PHASES * deadline + IMPORT_DEADLINE + ANSWERS
        while pending:
            limit = end if culprit is None or abandoned else culprit[1] + GRACE
            for rank, answer in self._pool.wait(pending, limit - time.monotonic()).items():
                del pending[rank]
                results[rank] = self._taken(rank, answer, culprit if rank in abandoned else None)
                if results[rank].failure is not None and culprit is None:
                    culprit = rank, time.monotonic()
            if pending and culprit is not None and not abandoned and time.monotonic() > culprit[1] + GRACE:
                abandoned = set(pending)
                for rank in abandoned:
                    self._pool.agent(rank).abandon.remote()
            if pending and time.monotonic() > end:
                for rank in pending:
                    results[rank] = self._lost(rank, "it gives no answer")
                    self._pool.discard(rank)
                break
        return results

    def _taken(self, rank: int, answer: tuple[Result, float] | str, culprit: tuple[int, float] | None) -> Result:
        if isinstance(answer, str):
            self._pool.discard(rank)
            return self._lost(rank, answer)
        result, self._pool.import_seconds = answer[0], max(answer[1], self._pool.import_seconds)
        if culprit is None or result.failure is None:
            return result
        message = f"ended because rank {culprit[0]} failed"
        return replace(result, failure=replace(result.failure, kind="abandoned", message=message))

    def _lost(self, rank: int, reason: str) -> Result:
        message = f"rank {rank}'s agent, or its node, is gone: {reason}"
        return Result({}, Failure(kind="died", scenario=self._command.scenario, rank=rank, message=message), {})


def _cluster() -> tuple[Any, bool]:
    """Ray, connected to a cluster, and whether that was done here."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise NoCluster("--genmodel-pool=ray needs Ray: pip install 'pytest-genmodel[ray]'") from None
    importlib.import_module("ray.util.scheduling_strategies")
    if ray.is_initialized():
        return ray, False
    try:
        address = os.environ.get("RAY_ADDRESS") or _started_here()
        _call(address)  # Ray itself goes on trying for minutes, and then ends the process
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NoCluster(
            f"--genmodel-pool=ray found no cluster ({reason}): ray start --head, or RAY_ADDRESS=host:port"
        ) from None
    return ray, True


def _started_here() -> str:
    """The address of the cluster that was started on this machine last."""
    services: Any = importlib.import_module("ray._private.services")
    return str(services.get_ray_address_from_environment("auto", None))


def _call(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=5.0).close()
