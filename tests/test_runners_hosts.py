"""Hosts outlive what models do to them, and nothing outlives the hosts."""

from __future__ import annotations

import os
from pathlib import Path

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners.evidence import Failure
from genmodel.runners.leftovers import segments
from genmodel.runners.session import Session, TargetOptions

FATAL: dict[tuple[str, tuple[int, ...]], tuple[str, str]] = {
    ("segfaults", (1,)): ("died", "host 0 died with SIGSEGV while generating (plain)"),
    ("exits", (2,)): ("died", "host 1 exited with status 3 while generating (plain)"),
    ("asks_to_exit", (1,)): ("raised", "SystemExit: enough"),
    ("raises", (2,)): ("raised", "FloatingPointError: on this rank only"),
    ("hangs", (2,)): ("timeout", "gave no answer within 25 s, while generating (plain)"),
}


def descendants() -> set[int]:
    """Processes started by this one, or by those it started, that still run."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if after_name[0] != "Z":
            parents[int(stat.parent.name)] = int(after_name[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def failure(session: Session, options: TargetOptions) -> Failure:
    evidence = session.collect(options, {"plain"})
    (found,) = evidence.traces.values()
    assert isinstance(found, Failure), found
    return found


def test_a_session_outlives_its_models_and_leaves_nothing_behind() -> None:
    """Every death is told with its cause; the next model is judged as if nothing had happened."""
    before, shared = descendants(), segments()
    options = {key: TargetOptions(spec=f"fatal_targets:{key[0]}", tensor_parallel_sizes=key[1]) for key in FATAL}
    healthy = TargetOptions(spec="genmodel.reference_models.dense:factory", tensor_parallel_sizes=(1, 2))
    with Session([*options.values(), healthy], deadline=25.0) as session:
        for key, (kind, message) in FATAL.items():
            found = failure(session, options[key])
            assert (found.kind, key) == (kind, key), found
            assert message in found.message, found
            assert found.rank == max(key[1]) - 1
            if kind in ("died", "timeout"):
                assert found.details, "the end of the host's log"
        evidence = session.collect(healthy, {"plain", "reference"})
        verdict = catalogue.judge(catalogue.get("logits.values"), evidence)
        assert verdict.status is Status.PASSED, verdict
        directory = session._pool.directory  # type: ignore[union-attr]
        assert directory.stat().st_mode & 0o077 == 0
    assert not directory.exists()
    assert descendants() == before
    # multiprocessing's own segments are not counted: other programs on the machine make such names too
    assert {name for name in segments() - shared if name.startswith("vllm_")} == set()


def test_nan_in_the_engine_is_a_failed_check() -> None:
    """Logits that are not numbers agree with nothing."""
    options = TargetOptions(spec="fatal_targets:gives_nan", tensor_parallel_sizes=(1,))
    with Session([options]) as session:
        evidence = session.collect(options, {"plain", "alone", "reference", "inspection"})
    failed = {
        check.id: catalogue.judge(check, evidence).status
        for check in catalogue.all_checks()
        if check.group == "logits" and not check.tensor_parallel
    }
    passed = {name for name, status in failed.items() if status is Status.PASSED}
    assert passed <= {"logits.resolution"}, failed
