"""Saved runs: written after a run, and judged again in place of one, without torch in hosts and without vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from genmodel.conformance.diagnosis import Diagnosis, Finding, Findings
from genmodel.runners import archive, plain
from genmodel.runners.archive import ArchiveError, Saved
from genmodel.runners.evidence import Evidence, Failure, TargetInfo
from genmodel.runners.scenarios import SCENARIOS
from genmodel.runners.session import Session, TargetOptions, UnusableTarget

_FINDINGS: Any = dict[tuple[str, int], Finding | str | None]


def save_run(directory: Path, evidence: Evidence, scenarios: Collection[str], findings: Findings) -> Path:
    """Write what a target's scenarios gave, and where its failures begin, into an archive.

    Args:
        directory: the archive; see `genmodel.runners.archive`.
        evidence: what the scenarios gave.
        scenarios: those that were run.
        findings: `Diagnosis.findings`.

    Returns:
        The target's folder.
    """
    return archive.save(directory, evidence, scenarios, plain.encode(findings, _FINDINGS))


def diagnosis_of(source: Session | Replay, options: TargetOptions) -> Diagnosis:
    """What explains the failures of one target: by running it again, or by what was found in the saved run."""
    known = source.findings(options) if isinstance(source, Replay) else {}
    return Diagnosis(lambda scenario, size, focus: source.diagnose(options, scenario, size, focus), known)


class Replay:
    """Saved runs behind the face of `genmodel.runners.session.Session`: nothing is started.

    Args:
        runs: what `genmodel.runners.archive.index` found.

    Raises:
        UnusableTarget: (from any method) for a target that was not saved, or whose evidence is damaged.
    """

    def __init__(self, runs: Mapping[str, Saved]) -> None:
        self._runs = runs
        self._found: dict[str, tuple[Evidence, Findings]] = {}

    def start(self) -> None:
        """Do nothing."""

    def mistake(self, options: TargetOptions) -> None:
        """Nothing has to be found anywhere."""

    def resolve(self, options: TargetOptions) -> TargetInfo:
        """What was saved of the target itself."""
        return self._run(options).target

    def collect(self, options: TargetOptions, scenarios: Collection[str] = SCENARIOS) -> Evidence:  # noqa: ARG002 - all
        """All that was saved, whatever is asked for: a scenario that was not run has no evidence."""
        return self._loaded(options)[0]

    def diagnose(
        self,
        options: TargetOptions,  # noqa: ARG002 - as Session has it
        scenario: str,
        size: int,
        focus: tuple[str, int] | None = None,  # noqa: ARG002
    ) -> Failure:
        """Nothing can be recorded of a run that is over."""
        message = f"the saved run did not record the modules of {scenario} at TP={size}"
        return Failure(kind="proof", scenario=scenario, message=message)

    def findings(self, options: TargetOptions) -> Findings:
        """Where failures of the saved run began."""
        return self._loaded(options)[1]

    def close(self) -> None:
        """Do nothing."""

    def _loaded(self, options: TargetOptions) -> tuple[Evidence, Findings]:
        if options.spec not in self._found:
            saved = self._run(options)
            try:
                findings: Findings = plain.decode(saved.findings, _FINDINGS, at="findings")
                self._found[options.spec] = saved.evidence(), findings
            except (ArchiveError, plain.Unreadable) as error:
                where = "" if isinstance(error, ArchiveError) else f"cannot use {saved.folder / archive.DOCUMENT}: "
                raise UnusableTarget(f"{where}{error}") from None
        return self._found[options.spec]

    def _run(self, options: TargetOptions) -> Saved:
        if options.spec not in self._runs:
            raise UnusableTarget(f"no saved run of {options.spec}; there are {', '.join(self._runs)}")
        return self._runs[options.spec]
