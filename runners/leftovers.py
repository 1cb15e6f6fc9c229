"""Shared memory that killed processes leave behind: vLLM unlinks its segments only when it ends in peace."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

SEGMENTS = Path("/dev/shm")
_NAMES = re.compile(r"vllm_|psm_|torch_|sem\.(mp|loky)-")
"""What vLLM's communicators, multiprocessing and torch call theirs."""


def segments() -> frozenset[str]:
    """Names of the shared memory segments there are now."""
    return frozenset(path.name for path in SEGMENTS.iterdir()) if SEGMENTS.is_dir() else frozenset()


def sweep(before: frozenset[str]) -> None:
    """Unlink segments that appeared since `before` and that no living process has mapped."""
    new = {name for name in segments() - before if _NAMES.match(name)}
    for name in new - _mapped() if new else ():
        with contextlib.suppress(OSError):
            (SEGMENTS / name).unlink()


def _mapped() -> set[str]:
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process ended, or is somebody else's
            found.update(re.findall(rf"{SEGMENTS}/([^\s]+)", maps.read_text(errors="replace")))
    return found
