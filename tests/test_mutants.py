"""Every mutant is caught by the check that claims to; a suite that cannot fail is worth nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners.session import Session, TargetOptions
from mutants import MUTANTS, Mutant

OPTIONS = {
    m.name: TargetOptions(
        spec=f"mutant:{m.name}",
        target=m.factory,
        tensor_parallel_sizes=m.tp,
        reference=m.reference,
        config=m.config,
    )
    for m in MUTANTS
}


def test_every_mutant_has_a_name_of_its_own() -> None:
    """Else one would be run in the place of another."""
    assert len(OPTIONS) == len(MUTANTS)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """One pool of hosts for the whole zoo."""
    with Session(OPTIONS.values()) as running:
        yield running


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_caught(session: Session, mutant: Mutant) -> None:
    """The named checks fail, on measured numbers rather than for want of evidence."""
    checks = [catalogue.get(name) for name in mutant.checks]
    needs = frozenset[str]().union(*(check.needs for check in checks))
    evidence = session.collect(OPTIONS[mutant.name], needs | {"inspection"})
    for check in checks:
        verdict = catalogue.judge(check, evidence)
        assert verdict.status is Status.FAILED, verdict
        assert any(not m.ok for m in verdict.measurements), verdict.reason
