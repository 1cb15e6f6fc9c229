"""What part of the machine a session's hosts may use; asks no driver, and imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import socket
import time
from dataclasses import dataclass
from pathlib import Path

MOST_ON_CPU = 8
"""Ranks that may share however few cores: of the small models that are checked there, several fit on one."""


@dataclass(frozen=True, slots=True)
class Share:
    """One of `count` equal parts, number `index`; such as that of one of several workers of pytest-xdist."""

    index: int = 0
    count: int = 1


WORK = 1_000_000
NOMINAL = 0.055
"""Steps of `slowness`'s work, and the seconds they take on an idle core where deadlines were measured."""
SLOWEST = 10.0
"""Times that a deadline is stretched at most."""


LOOPBACK = 5.0
"""Seconds that a connection to this machine itself may take."""
FILES = 256
"""Open files that each of pytest and its hosts may need at least: a host with an engine has about 100."""
SHARED = Path("/dev/shm")
SHARED_AT_LEAST = 8 << 20
SHARED_PER_THREAD = 2 * (4 << 20) + (1 << 20)
"""Bytes of shared memory that any run takes, and each thread of a rank: vLLM's CPU communicator has 4 MiB for each, and
the hosts' and a default engine's are there at once."""
SHARED_IN_PLENTY = 1 << 30
SMALL_QUEUES = {"VLLM_MQ_MAX_CHUNK_BYTES_MB": "1"}
"""Where there is less than that, a default engine's queues, for each of which vLLM else wants 160 MiB to be free."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Variables that tell torch's process groups where to listen."""


class TooSmall(Exception):
    """The machine has too few devices, or lacks something else; the message is one line with what would be right."""


def sessions(size: int) -> int:
    """How many sessions of `size` ranks this machine can hold at once, at least 1."""
    devices = _cuda_devices()
    return max(1, (len(_cores()) if devices is None else len(devices)) // size)


def environment(size: int, share: Share) -> dict[str, str]:
    """Variables that give `size` ranks their cores, and the devices that no other share has.

    Raises:
        TooSmall: if there are fewer devices than ranks, or too little shared memory.
    """
    devices = _cuda_devices()
    cores = len(_cores())
    threads = {"OMP_NUM_THREADS": str(max(1, cores // (size * share.count)))}
    if devices is None:
        most = max(MOST_ON_CPU, cores)
        if size > most:
            raise TooSmall(
                f"tensor-parallel size {size} is too many ranks for {cores} CPU cores: "
                f"--genmodel-tp takes sizes up to {most}"
            )
        few = {"OMP_NUM_THREADS": str(_threads(size, share, max(1, cores // (size * share.count))))}
        return few if _shared_room() >= SHARED_IN_PLENTY else {**few, **SMALL_QUEUES}
    each = len(devices) // share.count
    if size > len(devices):
        raise TooSmall(_too_large(size, len(devices)))
    if size > each:
        raise TooSmall(
            f"{share.count} workers of {size} ranks need {share.count * size} CUDA devices, and there are "
            f"{len(devices)}: -n {len(devices) // size}, or -n auto"
        )
    index = share.index % share.count  # pytest-xdist goes on counting when it replaces a worker
    return {**threads, "CUDA_VISIBLE_DEVICES": ",".join(devices[index * each : (index + 1) * each])}


def require() -> None:
    """What torch and vLLM would meet as a crash, a hang or a riddle, before anything runs.

    Raises:
        TooSmall: if files, shared memory or the network are not as they have to be.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < FILES:
        raise TooSmall(f"a process may open {most} files here, and {FILES} are needed: ulimit -n {FILES}")
    if (room := _shared_room()) < SHARED_AT_LEAST:
        raise TooSmall(_too_little(room, SHARED_AT_LEAST))
    known = [name for _, name in socket.if_nameindex()]
    for variable in INTERFACES:
        wrong = [name for name in filter(None, os.environ.get(variable, "").split(",")) if name not in known]
        if wrong:
            raise TooSmall(
                f"{variable} names a network interface that is not there, {wrong[0]}: unset it, or name one of "
                f"{', '.join(known)}"
            )
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=LOOPBACK).close()
    except OSError as error:
        raise TooSmall(
            f"ranks cannot meet at 127.0.0.1 ({error.strerror or error}): ip link set lo up, "
            f"or a container with a network"
        ) from None


def _threads(size: int, share: Share, wanted: int) -> int:
    """So many threads for each rank, or as many as there is shared memory for."""
    room = _shared_room() - SHARED_AT_LEAST
    each = size * share.count * SHARED_PER_THREAD
    if size > 1 and room < each:
        raise TooSmall(_too_little(room + SHARED_AT_LEAST, each + SHARED_AT_LEAST))
    return min(wanted, room // each) if size > 1 else wanted


def _shared_room() -> int:
    """Bytes that can still be shared."""
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _too_little(room: int, needed: int) -> str:
    return (
        f"{SHARED} has {room / 2**20:.1f} MiB left, and {needed / 2**20:.0f} are needed: "
        f"docker run --shm-size=1g, or mount -o remount,size=1g {SHARED}"
    )


def slowness() -> float:
    """How many times longer a fixed piece of work takes here and now than where deadlines were measured; at least 1."""
    begun = time.perf_counter()
    sum(number * number % 7 for number in range(WORK))
    return min(SLOWEST, max(1.0, (time.perf_counter() - begun) / NOMINAL))


def throttled() -> float:
    """Seconds for which the control group of this process has been denied the CPU, since it was made."""
    seconds = 0.0
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup")
        folders = [root / "cpu", root / controllers] if "cpu" in controllers.split(",") else [root] * (not controllers)
        for folder in folders:
            found = re.search(r"^throttled_(usec|time) (\d+)$", _read(f"{folder}{path}/cpu.stat"), re.MULTILINE)
            if found:
                seconds = max(seconds, int(found[2]) / (1e6 if found[1] == "usec" else 1e9))
    return seconds


def strain(used: float, throttled_before: float) -> str:
    """How busy the machine is, in words, for the message about something that ran on `used` cores and was too slow."""
    words = f"it had {used:.2f} of {len(_cores())} cores, at a load of {os.getloadavg()[0]:.1f}"
    if (seconds := throttled() - throttled_before) > 0.1:
        words += f", and its control group was throttled for {seconds:.0f} s"
    return words


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _too_large(size: int, devices: int) -> str:
    found = "is 1 CUDA device" if devices == 1 else f"are {devices} CUDA devices"
    return (
        f"tensor-parallel size {size} needs as many devices, and there {found}: "
        f"--genmodel-tp takes sizes up to {devices}"
    )


def _cores() -> set[int]:
    return os.sched_getaffinity(0)


def _cuda_devices() -> list[str] | None:
    """Ids of the CUDA devices that may be used, or None where vLLM is its build for CPU."""
    if not any(d.name.lower() == "vllm" for d in importlib.metadata.distributions(name="vllm")):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [*filter(None, visible.split(","))]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
