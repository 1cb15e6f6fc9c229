"""Run a function on several gloo ranks, each a fresh process, under a deadline."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks of a gloo group, in rank order.

    Args:
        function: a module-level function; results must be picklable.
        world_size: how many processes to spawn.
        args: passed on, pickled.
        timeout: seconds for all of it, after which every process is killed.

    Raises:
        AssertionError: a rank raised (its traceback is in the message), died or ran out of time.
    """
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="genmodel-ranks-") as directory:
        ranks = [
            spawn.Process(target=_run_rank, args=(function, rank, world_size, directory, timeout, args), daemon=True)
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in ranks:
                process.start()
            # One rank that dies leaves the others waiting in a collective: stop at the first.
            while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
                assert time.monotonic() < deadline, f"{function.__name__} took more than {timeout:.0f} s"
                time.sleep(0.02)
        finally:
            for process in ranks:
                process.kill()
                process.join()
                process.close()
        results = [_read(Path(directory, f"{rank}.pickle")) for rank in range(world_size)]
    failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(results) if error]
    assert not failed, "\n".join(failed)
    return [result for _, result in results]


def _read(path: Path) -> tuple[str | None, Any]:
    if not path.exists():
        return "left no result", None
    result: tuple[str | None, Any] = pickle.loads(path.read_bytes())
    return result


def _run_rank(
    function: Callable[..., Any], rank: int, world_size: int, directory: str, timeout: float, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    error, result = None, None
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it was, the test's process reports it
        error = traceback.format_exc()
    path = Path(directory, f"{rank}.pickle")
    path.with_suffix(".partial").write_bytes(pickle.dumps((error, result)))
    path.with_suffix(".partial").rename(path)
    os._exit(1 if error else 0)  # a broken group would wait for its peers on the way out
