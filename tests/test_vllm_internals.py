"""What modeling/_vllm.py takes from vLLM's private parts is there in the installed version.

Most of it only makes engines start faster: without it nothing would fail, and every run would take longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from packaging.version import Version

AS_THE_FORK_SERVER = """
import inspect, json, os, sys
import torch
from genmodel.runners import commands  # takes over vLLM's freezing of the heap
from genmodel.modeling import _vllm, lookup
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.platforms import current_platform
from vllm.v1.engine import core
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import logprobs

compiled = [hasattr(logprobs.batched_count_greater_than, "_torchdynamo_orig_callable")]
theirs = set(vars(_CPUSHMDistributed))
_vllm.import_engine()
_vllm._share_memory_privately()
print(json.dumps({
    "threads": [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")],
    "cuda": torch.cuda.is_initialized(),
    "modules": sorted(sys.modules),
    "device": "cpu" if current_platform.is_cpu() else "gpu",
    "compiled": [*compiled, hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable")],
    "freezing": ["freeze_gc_heap()" in inspect.getsource(core), core.freeze_gc_heap.__module__],
    "memory": [theirs >= {"make_group_name", "_init_cpu_shm"}, _CPUSHMDistributed._init_cpu_shm.__module__],
    "kernels": getattr(getattr(type(current_platform), "register_triton_kernel_overrides", None), "__module__", None),
    "version": _vllm.version(),
    "architectures": lookup.architectures() == set(_vllm.architectures()),
}))
"""

AS_A_HOST_THAT_ENDS_AN_ENGINE = """
import subprocess, psutil
from genmodel.modeling import _vllm
from vllm.v1 import utils

children = psutil.Process.children

def ended_meanwhile(self, recursive=False):
    psutil.Process.children = children
    raise psutil.NoSuchProcess(self.pid)

psutil.Process.children = ended_meanwhile
process = subprocess.Popen(["sleep", "600"])
try:
    _vllm._let_processes_end_meanwhile()
    _vllm._let_processes_end_meanwhile()  # once for each engine
    utils.kill_process_tree(process.pid)
    assert psutil.Process.children is children, "vLLM asked for them"
    print(process.wait(60))
finally:
    process.kill()
"""


def run(program: str) -> str:
    """The last line of its output, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Of a process that has imported what the fork server does."""
    facts: dict[str, Any] = json.loads(run(AS_THE_FORK_SERVER))
    return facts


def test_it_may_fork(found: dict[str, Any]) -> None:
    """What other threads hold at a fork, a lock say, a forked process waits for forever, and CUDA outlives no fork."""
    assert len(found["threads"]) == 1, found["threads"]
    assert not found["cuda"]


@pytest.mark.parametrize(
    "name",
    [
        "vllm.entrypoints.llm",
        "vllm.v1.executor.multiproc_executor",
        "vllm.model_executor.model_loader.default_loader",
        "vllm.v1.worker.{device}_worker",
        "vllm.v1.worker.{device}_model_runner",
        "torch.distributed.tensor.parallel",
    ],
)
def test_hosts_need_not_import(found: dict[str, Any], name: str) -> None:
    """Else each host would, and each worker of each default engine."""
    assert name.format(**found) in found["modules"]


def test_ranks_are_counted_eagerly(found: dict[str, Any]) -> None:
    """What vLLM compiles, and hosts do not."""
    assert found["compiled"] == [True, False]


def test_engines_leave_the_heap_alone(found: dict[str, Any]) -> None:
    """Freezing and collecting took over a second for each."""
    assert found["freezing"] == [True, "genmodel.modeling._vllm"]


def test_ranks_share_memory_of_their_own(found: dict[str, Any]) -> None:
    """Under the names by which vLLM makes it."""
    assert found["memory"] == [True, "genmodel.modeling._vllm"]


def test_architectures_are_read_off_the_source(found: dict[str, Any]) -> None:
    """By modeling/lookup.py, which imports nothing."""
    assert found["architectures"]


def test_kernels_are_registered_once(found: dict[str, Any]) -> None:
    """By the method of the platform by which every engine would; before 0.31 there was none."""
    has_method = Version(found["version"]) >= Version("0.31")
    assert found["kernels"] == ("genmodel.modeling._vllm" if has_method else None)


def test_an_engine_s_process_may_end_while_vllm_ends_it() -> None:
    """It is killed nevertheless, and nothing is raised."""
    assert run(AS_A_HOST_THAT_ENDS_AN_ENGINE) == "-9"
