"""Hosts on a Ray cluster: the same verdicts, tensor parallelism across nodes, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners import ray_pool
from genmodel.runners.evidence import Failure
from genmodel.runners.ray_pool import RayPool
from genmodel.runners.session import Session, TargetOptions, UnusableTarget

DENSE = "genmodel.reference_models.dense:factory"
GPT = "genmodel.reference_models.gpt:factory"

pytestmark = pytest.mark.filterwarnings("ignore::Warning:ray")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes with one core each, in processes of its own."""
    code = """if True:
        from ray.cluster_utils import Cluster
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        print(cluster.address, flush=True)
        input()
        cluster.shutdown()
    """
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:
        assert cluster.stdout is not None
        yield cluster.stdout.readline().strip()
        cluster.communicate("\n", timeout=60)


@pytest.fixture
def session(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """Two ranks in that cluster, one on each node."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    with Session([OPTIONS]) as running:
        yield running


OPTIONS = TargetOptions(spec=DENSE, tensor_parallel_sizes=(1, 2), pool="ray")


def test_tensor_parallelism_across_nodes(session: Session) -> None:
    """Engines, loading and training of two ranks on two nodes, and a rank that dies in between."""
    dies = TargetOptions(spec="fatal_targets:forward.leave", tensor_parallel_sizes=(2,), pool="ray")
    (found,) = session.collect(dies, {"plain"}).traces.values()
    assert isinstance(found, Failure)
    assert (found.kind, found.rank) == ("died", 1)
    assert "host 1 exited with status 3 while generating (plain)" in found.message

    names = ("logits.values", "logits.tensor_parallel", "gradients.parallel", "deployment.multiprocess")
    chosen = [catalogue.get(name) for name in names]
    evidence = session.collect(OPTIONS, frozenset().union(*(check.needs for check in chosen)))
    verdicts = [catalogue.judge(check, evidence) for check in chosen]
    assert {verdict.status for verdict in verdicts} == {Status.PASSED}, verdicts

    pool: Any = session._pool
    assert isinstance(pool, RayPool)
    assert len(set(pool.nodes())) == 2


def test_the_command_line(pytester: pytest.Pytester, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--genmodel-pool=ray` runs in the cluster at RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    arguments = [f"--genmodel={GPT}", "--genmodel-pool=ray", "--genmodel-tp=2", "-k", "logits.values"]
    result = pytester.runpytest_subprocess(*arguments, "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)


def test_more_ranks_than_the_cluster_has_room_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what would be right."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray_pool, "PLACED", 2.0)
    options = TargetOptions(spec=DENSE, tensor_parallel_sizes=(3,), pool="ray")
    with pytest.raises(UnusableTarget, match="no room for 3 ranks of a CPU each"), Session([options]):
        pass


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how to start one."""
    monkeypatch.setattr(ray_pool, "_started_here", lambda: "127.0.0.1:2")
    for address in ("127.0.0.1:1", ""):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UnusableTarget, match=r"found no cluster .*ray start --head"), Session([OPTIONS]):
            pass


def test_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnusableTarget, match=r"pip install 'pytest-genmodel\[ray\]'"), Session([OPTIONS]):
        pass
