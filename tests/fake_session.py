"""A pytest plugin that gives made-up evidence by the target's name, so that tests of the plugin need no engine.

`-p fake_session`; `models:right` passes all checks, and other names break something.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import evidence_samples
from genmodel.runners.evidence import Evidence, Failure, TargetInfo
from genmodel.runners.session import TargetOptions, UnusableTarget

LOG = Path("hosts.log")
"""Has a line for everything that a real session would spend time on."""


class FakeSession:
    """The face of `genmodel.runners.session.Session`."""

    def __init__(self, options: Collection[TargetOptions], progress: Callable[[str], None]) -> None:
        self._options = options
        self._progress = progress

    def start(self) -> None:
        self._log("start")

    def mistake(self, options: TargetOptions) -> str | None:
        return "models has no attribute 'mistyped'" if options.spec == "models:mistyped" else None

    def resolve(self, options: TargetOptions) -> TargetInfo:
        self._log(f"resolve {options.spec}")
        if options.spec == "models:unusable":
            raise UnusableTarget("no module named 'models'")
        if options.spec == "models:crash":
            raise OSError("a bug in the harness")
        return replace(evidence_samples.clean().target, name=options.spec, spec=options.spec)

    def collect(self, options: TargetOptions, scenarios: Collection[str]) -> Evidence:
        self._log(f"collect {options.spec} {' '.join(sorted(scenarios))}")
        self._progress(f"collecting {options.spec}")
        found = replace(evidence_samples.clean(), target=self.resolve(options))
        return BREAKS[options.spec](found) if options.spec in BREAKS else found

    def diagnose(
        self, options: TargetOptions, scenario: str, size: int, focus: tuple[str, int] | None = None
    ) -> Failure:
        self._log(f"diagnose {options.spec} {scenario} {size} {focus}")
        return Failure(kind="raised", scenario=scenario, message="nothing runs here")

    def close(self) -> None:
        self._log("close")

    def _log(self, line: str) -> None:
        with LOG.open("a") as log:
            log.write(f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')} {line}\n")


def pytest_genmodel_make_session(options: Collection[TargetOptions], progress: Callable[[str], None]) -> FakeSession:
    return FakeSession(options, progress)


def wrong(evidence: Evidence) -> Evidence:
    """interface.signature and interface.vllm_accepts fail, interface.attention_prefixes is not applicable."""
    return evidence_samples.change_inspection(
        evidence, problems=("compute_logits is missing",), vllm_accepts=False, attention=()
    )


def unproven(evidence: Evidence) -> Evidence:
    """interface.reaches_workers is an error of the harness."""
    failure = Failure(kind="proof", scenario="deployed", message="one worker")
    return replace(evidence, traces={**evidence.traces, ("deployed", 2): failure})


def boom(_evidence: Evidence) -> Evidence:
    raise RuntimeError("a bug in the harness")


def late(evidence: Evidence) -> Evidence:
    """Cannot be used, as turns out only when scenarios run."""
    failure = Failure(kind="unusable", scenario="gradients", message="head_dim 16 is not supported")
    return replace(evidence, gradients=failure)


UNPRINTABLE = "half of a pair \ud800, \x1b[31mred\x1b[0m, nothing \0, and\nanother line \x85 of \u2028 it"


def unprintable(evidence: Evidence) -> Evidence:
    """Texts that neither a terminal, a file nor pytest-xdist's serialisation takes, wherever a model's text goes."""
    failure = Failure(kind="raised", scenario="deployed", message=UNPRINTABLE, details=UNPRINTABLE)
    found = wrong(evidence)
    found = evidence_samples.change_inspection(found, problems=(UNPRINTABLE,))
    target = replace(found.target, config=UNPRINTABLE)
    return replace(found, target=target, traces={**found.traces, ("deployed", 2): failure})


BREAKS: Mapping[str, Callable[[Evidence], Evidence]] = {
    "models:wrong": wrong,
    "models:unproven": unproven,
    "models:boom": boom,
    "models:late": late,
    "models:unprintable": unprintable,
}
