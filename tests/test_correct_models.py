"""Models that are right and unusual go every way that a scheduler has, and raise no alarm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners.scenarios import ENGINE_SCENARIOS
from genmodel.runners.session import Session, TargetOptions

OPTIONS = {
    "two windows": TargetOptions(spec="correct_models.two_windows:factory"),
    "tied head": TargetOptions(spec="correct_models.tied_head:VllmDense", config="correct_models.tied_head:CONFIG"),
}
"""Two windows: vLLM puts such layers into several groups of cache blocks, which all have to run out. Tied head: vLLM's
own reload leaves the head's packed copy as it was, and the suite packs it anew."""
SCENARIOS = {"inspection", "reference", *ENGINE_SCENARIOS}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(OPTIONS.values()) as running:
        yield running


@pytest.mark.parametrize("name", OPTIONS)
def test_no_check_on_engines_fails(session: Session, name: str) -> None:
    """At TP=1 and TP=2, in every in-process engine."""
    evidence = session.collect(OPTIONS[name], SCENARIOS)
    verdicts = {
        check.id: catalogue.judge(check, evidence) for check in catalogue.all_checks() if check.needs <= SCENARIOS
    }
    bad = [v for v in verdicts.values() if v.status not in (Status.PASSED, Status.NOT_APPLICABLE)]
    assert not bad, bad
    scheduled = {check.id for check in catalogue.select(groups=["scheduling", "refit"])}
    assert {verdicts[check].status for check in scheduled} == {Status.PASSED}
