"""The dense model, doing something terrible: `fatal_targets:PLACE.FAULT` does FAULT when its PLACE is reached.

With several ranks only the last does it. In `forward` and `compute_logits` it is done inside an engine only, so
that the model can be inspected, and in `build` too; `training` is forward outside of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from genmodel import ParallelContext
from genmodel.modeling._vllm import engine_config
from genmodel.modeling.loading import load_weights
from genmodel.reference_models import dense
from genmodel.runners.wire import encode

_held: list[object] = []
_numbers = itertools.count()

# --- what ends a process, or never ends ----------------------------------------------------------------------------


def segfault() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.abort()


def leave() -> None:
    os._exit(3)


def leave_quietly() -> None:
    os._exit(0)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3600)


def interrupt() -> None:
    raise KeyboardInterrupt


def ask_to_exit() -> None:
    sys.exit("enough")


def fail() -> None:
    raise FloatingPointError("on this rank only")


def loop() -> None:
    while True:
        pass


def call_for_ever() -> None:
    """Each look at it finds another call, as in a model that is merely slow."""
    while True:
        call()


def call() -> None:
    sum(range(100_000))


def sleep() -> None:
    time.sleep(3600)


def block() -> None:
    """For ever in C, without giving up the interpreter's lock."""
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.PyDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


def wait_for_others() -> None:
    """A collective that the other ranks do not join."""
    dist.barrier()


def exhaust() -> None:
    """More memory than there may be."""
    resource.setrlimit(resource.RLIMIT_AS, (2 << 40, 2 << 40))
    torch.empty(1 << 42)


def fill() -> None:
    """All of the memory that a control group allows, and more."""
    Path(os.environ["LIMITED_GROUP"], "cgroup.procs").write_text(str(os.getpid()))
    torch.ones(1 << 30)


# --- what a host's socket is not for -------------------------------------------------------------------------------


def _tell_pool(content: bytes) -> None:
    """Write to every socket of this process, the one to the pool among them."""
    for number in (int(path.name) for path in Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.write(number, content)


class Evil:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["FATAL_TRACE"],)


def send_pickle() -> None:
    """As multiprocessing's connections frame it."""
    content = pickle.dumps(("done", Evil()))
    _tell_pool(struct.pack("!i", len(content)) + content)
    time.sleep(3600)


def send_half() -> None:
    _tell_pool(b"".join(encode(("phase", "x" * 1000)))[:500])
    time.sleep(3600)


def send_length() -> None:
    _tell_pool(struct.pack("!8sQQ", b"genmodel", 1 << 20, 1 << 62))
    time.sleep(3600)


def send_rubbish() -> None:
    _tell_pool(os.urandom(1000))
    time.sleep(3600)


def send_nonsense() -> None:
    """A whole message that no host sends."""
    _tell_pool(b"".join(encode(("done", "well"))))
    time.sleep(3600)


def signal_in_real_time() -> None:
    os.kill(os.getpid(), 40)


def fail_in_circles() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def fail_at_length() -> None:
    raise ValueError("\x1b[2J\0\udc80" * 10_000_000)


class Mute(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise SystemExit


def fail_without_text() -> None:
    raise Mute


# --- what changes a process ----------------------------------------------------------------------------------------


def close_files() -> None:
    os.closerange(0, 1024)


def close_output() -> None:
    os.closerange(0, 3)


def write_garbage() -> None:
    for number in (1, 2):
        os.write(number, bytes(range(256)) * 4096)
    sys.stdout.write("\N{SNOWMAN}\0\x1b[2J\ninitialization failed\nValueError: not what happened\n" * 50)


def change_directory() -> None:
    os.chdir("/")


def change_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def change_device() -> None:
    torch.set_default_device("meta")


def change_seeds() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - what models do
    torch.manual_seed(next(_numbers))


def change_threads() -> None:
    torch.set_num_threads(7)


def change_environment() -> None:
    os.environ.clear()
    os.environ["OMP_NUM_THREADS"] = "many"


def change_gradients() -> None:
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)


def change_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def change_interpreter() -> None:
    sys.path.clear()
    sys.setrecursionlimit(80 + sum(1 for _ in iter_frames()))
    sys.stdout = sys.stderr = None


def iter_frames() -> Iterable[object]:
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def leave_threads() -> None:
    threading.Thread(target=time.sleep, args=(3600,)).start()


def leave_children() -> None:
    """One plain, one in a session of its own, and a daemon, whose parent is gone."""
    subprocess.Popen(["sleep", "3600"])
    subprocess.Popen(["sleep", "3600"], start_new_session=True)
    subprocess.run(["sh", "-c", "setsid sleep 3600 & setsid sh -c 'trap \"\" TERM INT HUP; sleep 3600' &"], check=True)


def leave_files() -> None:
    """Shared memory, a temporary file and a listening socket."""
    import socket
    import tempfile

    directory = Path(tempfile.mkdtemp())
    name = f"left_by_{directory.parent.parent.name}_{directory.name}"
    _held.append(shared_memory.SharedMemory(name, create=True, size=mmap.PAGESIZE))
    server = socket.create_server(("127.0.0.1", 0))
    _held.append(server)
    if (told := os.environ.get("FATAL_PORTS")) is not None:
        with Path(told).open("a") as ports:
            ports.write(f"{server.getsockname()[1]}\n")
    Path(tempfile.mkstemp()[1]).write_text("left behind")


def leave_everything_and_die() -> None:
    leave_children()
    leave_files()
    kill()


def leave_shared_and_die() -> None:
    """What nobody named, with the tracker that knows of it dead."""
    from multiprocessing import get_context, resource_tracker

    _held.append(shared_memory.SharedMemory(create=True, size=mmap.PAGESIZE))
    _held.append(get_context("spawn").Semaphore())
    semaphore = vars(_held[-1])["_semlock"].name
    Path(os.environ["FATAL_SHARED"]).write_text(f"{_held[-2].name} sem.{semaphore.lstrip('/')}")  # type: ignore[attr-defined]
    os.kill(vars(resource_tracker)["_resource_tracker"]._pid, signal.SIGKILL)
    kill()


def remove_everything_and_fail() -> None:
    """All of the pool's files, its logs and the fork server's socket among them."""
    shutil.rmtree(Path(os.environ["TMPDIR"]).parent)
    fail()


def replace_log_and_die() -> None:
    """By what blocks whoever reads it."""
    for log in Path(os.environ["TMPDIR"]).parent.glob("*.log"):
        log.unlink()
        os.mkfifo(log)
    kill()


def leave_everything_and_hang() -> None:
    leave_children()
    leave_files()
    Path(os.environ["TMPDIR"], "hangs").touch()
    block()


# --- models that do them -------------------------------------------------------------------------------------------


class Place:
    """Gives a factory for every fault of this module: `fatal_targets:forward.segfault`."""

    def __init__(self, build: Callable[[Any, ParallelContext, Callable[[], None]], nn.Module]) -> None:
        self._build = build

    def __getattr__(self, fault: str) -> Callable[..., nn.Module]:
        if fault.startswith("_") or fault not in globals():
            raise AttributeError(fault)
        act = globals()[fault]

        def factory(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
            def on_last_rank() -> None:
                if parallel_context.get_tensor_parallel_rank() == parallel_context.get_tensor_parallel_world_size() - 1:
                    act()

            return self._build(vllm_config, parallel_context, on_last_rank)

        return factory


@Place
def factory(vllm_config: Any, parallel_context: ParallelContext, act: Callable[[], None]) -> nn.Module:
    act()
    return dense.factory(vllm_config, parallel_context)


def _before(model: nn.Module, method: str, act: Callable[[], None]) -> nn.Module:
    own = getattr(model, method)

    def acting(*args: Any, **kwargs: Any) -> Any:
        act()
        return own(*args, **kwargs)

    setattr(model, method, acting)
    return model


@Place
def build(vllm_config: Any, parallel_context: ParallelContext, act: Callable[[], None]) -> nn.Module:
    if engine_config() is not None:
        act()
    return dense.factory(vllm_config, parallel_context)


@Place
def forward(vllm_config: Any, parallel_context: ParallelContext, act: Callable[[], None]) -> nn.Module:
    model = dense.factory(vllm_config, parallel_context)
    if engine_config() is not None:
        _before(model.norm, "forward", act)
    return model


@Place
def serving(vllm_config: Any, parallel_context: ParallelContext, act: Callable[[], None]) -> nn.Module:
    """Where requests are computed, which is not yet so while an engine measures its memory and warms up."""
    model = dense.factory(vllm_config, parallel_context)
    if engine_config() is not None:
        from vllm.forward_context import get_forward_context

        _before(model.norm, "forward", lambda: act() if get_forward_context().attn_metadata is not None else None)
    return model


@Place
def later(vllm_config: Any, parallel_context: ParallelContext, act: Callable[[], None]) -> nn.Module:
    """On an engine's sixtieth pass: in its second scenario, for the first one, "plain", takes fewer than forty."""
    passes = itertools.count(1)
    model = dense.factory(vllm_config, parallel_context)
    if engine_config() is not None:
        _before(model.norm, "forward", lambda: act() if next(passes) == 60 else None)
    return model


@Place
def training(vllm_config: Any, parallel_context: ParallelContext, act: Callable[[], None]) -> nn.Module:
    model = dense.factory(vllm_config, parallel_context)
    if engine_config() is None:
        _before(model.norm, "forward", act)
    return model


@Place
def compute_logits(vllm_config: Any, parallel_context: ParallelContext, act: Callable[[], None]) -> nn.Module:
    model = dense.factory(vllm_config, parallel_context)
    return model if engine_config() is None else _before(model, "compute_logits", act)


class Loading(dense.Dense):
    """Acts when vLLM loads its weights."""

    act: Callable[[], None]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.act()
        return load_weights(self, weights)


@Place
def loading(vllm_config: Any, parallel_context: ParallelContext, act: Callable[[], None]) -> nn.Module:
    model = Loading(dense.Config.from_hf(vllm_config.model_config.hf_config), parallel_context)
    model.act = act
    return model


def gives_nan(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    return _scaled(vllm_config, parallel_context, torch.nan)


def gives_infinity(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    return _scaled(vllm_config, parallel_context, torch.inf)


def _scaled(vllm_config: Any, parallel_context: ParallelContext, scale: float) -> nn.Module:
    model = dense.factory(vllm_config, parallel_context)
    if engine_config() is not None:
        own = model.norm.forward
        model.norm.forward = lambda x: own(x) * scale  # type: ignore[method-assign]
    return model


def differs_each_time(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Another width of the MLP whenever it is built."""
    config = vllm_config.model_config.hf_config
    config.intermediate_size = 64 + 32 * next(_numbers)
    return dense.factory(vllm_config, parallel_context)


def mutates_config(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    config = vllm_config.model_config.hf_config
    model = dense.factory(vllm_config, parallel_context)
    config.hidden_size, config.num_hidden_layers, config.vocab_size = 7, 0, 1
    with contextlib.suppress(AttributeError):
        del config.num_attention_heads
    return model


def witness(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense, of a class whose name tells what the process was like that built it first."""
    seen = (
        Path.cwd() == Path(__file__).parent.parent,
        str(torch.get_default_dtype()),
        str(torch.get_default_device()),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.initial_seed(),
        random.getstate()[1][-1],
        threading.active_count(),
        len(list(Path("/proc/self/task").iterdir())) > 64,
        len(list(Path("/proc/self/fd").iterdir())),
        Path(f"/proc/self/task/{os.getpid()}/children").read_text().split(),
        "HOME" in os.environ,
        os.environ.get("OMP_NUM_THREADS"),
        str(signal.getsignal(signal.SIGTERM)),
        str(signal.getsignal(signal.SIGINT)),
        bool(sys.path),
        sys.getrecursionlimit(),
        next(_numbers) > 1,
    )
    model = dense.factory(vllm_config, parallel_context)
    model.__class__ = type(f"Saw {seen}", (dense.Dense,), {})
    return model
