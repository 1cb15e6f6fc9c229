"""What part of the machine a session's hosts may use; asks no driver, and imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

MOST_ON_CPU = 8
"""Ranks that may share however few cores: of the small models that are checked there, several fit on one."""


@dataclass(frozen=True, slots=True)
class Share:
    """One of `count` equal parts, number `index`; such as that of one of several workers of pytest-xdist."""

    index: int = 0
    count: int = 1


class TooSmall(Exception):
    """The machine has too few devices; the message is one line that says what would be right."""


def sessions(size: int) -> int:
    """How many sessions of `size` ranks this machine can hold at once, at least 1."""
    devices = _cuda_devices()
    return max(1, (len(_cores()) if devices is None else len(devices)) // size)


def environment(size: int, share: Share) -> dict[str, str]:
    """Variables that give `size` ranks their cores, and the devices that no other share has.

    Raises:
        TooSmall: if there are fewer devices than ranks.
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
        return threads
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


def _too_large(size: int, devices: int) -> str:
    return (
        f"tensor-parallel size {size} needs as many devices, and there are {devices} CUDA devices: "
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
