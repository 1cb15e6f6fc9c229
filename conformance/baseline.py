"""This run against a saved report: another commit, another vLLM, another machine.

A check's number is a rounding error, and rounding errors change with the order of additions: between versions, kernels
and machines. So a measured error counts as grown only if it grew by more than rounding can explain:

    measured - measured_then > allowed_then / NOISE_FACTOR

`allowed` is NOISE_FACTOR noise floors and a few ulp, so this is one noise floor as it was then, and a bit more. Both
sides are held to the tolerance of *then*: a noise floor that grows along does not hide an error. Where nothing is
allowed (counts of violations), any growth is growth. docs/calibration.md shows that over 20 seeds the largest errors of
correct models lie between 1.4 and 2.6 floors, so that the noise of one and the same model stays within a floor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from genmodel.conformance.agreement import NOISE_FACTOR
from genmodel.conformance.report import SCHEMA_VERSION
from genmodel.conformance.text import number
from genmodel.conformance.verdict import Measurement, Status, Verdict

GOOD = (Status.PASSED, Status.XFAILED, Status.NOT_APPLICABLE)
COMPARED_OPTIONS = ("dtype", "seed", "top_k")
"""Facts of a target without which numbers are about something else."""

LARGEST = 256 << 20
"""Bytes of a report that is read."""


class BaselineError(ValueError):
    """A baseline that cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference to the baseline."""

    target: str
    check: str
    kind: Literal["failure", "error", "vanished", "fixed", "smaller"]
    """A check that failed newly, an error that grew, one that is no longer judged; or the good ones."""
    said: str
    """In words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All differences; any regression fails the run."""

    regressions: tuple[Change, ...]
    improvements: tuple[Change, ...]
    notes: tuple[str, ...]
    """What is no verdict: other versions, cost, what could not be compared."""

    @property
    def summary(self) -> str:
        """One line."""
        worse, better = len(self.regressions), len(self.improvements)
        if not worse and not better:
            return "nothing is worse than the baseline, nor better"
        return f"{worse or 'nothing'} worse than the baseline, {better or 'nothing'} better"

    def as_json(self, path: str) -> dict[str, Any]:
        """As it stands in a report."""
        return {
            "path": path,
            "summary": self.summary,
            "regressions": [asdict(change) for change in self.regressions],
            "improvements": [asdict(change) for change in self.improvements],
            "notes": list(self.notes),
        }


def read(path: Path) -> dict[str, Any]:
    """A report that `--genmodel-report` or `--genmodel-baseline-update` wrote.

    Raises:
        BaselineError: for anything else.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise BaselineError(f"{path} has more than {LARGEST:,} bytes")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BaselineError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BaselineError):
            raise
        raise BaselineError(f"{path} is not a JSON report: {error}") from None
    if not isinstance(found, dict) or "schema_version" not in found:
        raise BaselineError(f"{path} is not a report of genmodel")
    if found["schema_version"] != SCHEMA_VERSION:
        raise BaselineError(
            f"{path} has schema_version {str(found['schema_version'])[:20]}, and this genmodel reads {SCHEMA_VERSION}: "
            "--genmodel-baseline-update writes it anew"
        )
    try:
        for target in found["targets"]:
            for check in target["checks"]:
                _verdict(target["name"], check)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BaselineError(f"{path} is not a report of genmodel: {type(error).__name__}: {str(error)[:80]}") from None
    return found


def compare(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    *,
    left_out: Collection[tuple[str, str]] = (),
    ended_early: bool = False,
) -> Comparison:
    """Hold a run against a baseline.

    Args:
        then: of `read`.
        now: of `genmodel.conformance.report.report_json`.
        verdicts: those of `now`.
        left_out: (target, check) that the user chose not to run: not vanished.
        ended_early: whether the run was stopped, so that what is absent cannot be told from what vanished.
    """
    mine = {(verdict.target, verdict.check): verdict for verdict in verdicts}
    targets_now = {target["name"]: target for target in now["targets"]}
    regressions: list[Change] = []
    improvements: list[Change] = []
    notes = [*_versions(then, now)]
    for target in then["targets"]:
        name = target["name"]
        if name not in targets_now:
            notes.append(f"{name} is in the baseline, and was not run")
            continue
        notes += _cost(target, targets_now[name])
        if other := [key for key in COMPARED_OPTIONS if target.get(key) != targets_now[name][key]]:
            asked = ", ".join(f"{key}={target.get(key)} then, {targets_now[name][key]} now" for key in other)
            regressions.append(Change(target=name, check="*", kind="vanished", said=f"cannot be compared: {asked}"))
            continue
        for check in target["checks"]:
            old = _verdict(name, check)
            new = mine.get((name, old.check))
            if new is not None:
                for change in _changes(old, new):
                    (improvements if change.kind in ("fixed", "smaller") else regressions).append(change)
            elif (name, old.check) not in left_out and not ended_early and old.status is not Status.NOT_APPLICABLE:
                regressions.append(_change(old, "vanished", f"was {old.status}, and there is no such check any more"))
    known = {(target["name"], check["id"]) for target in then["targets"] for check in target["checks"]}
    if new_ones := sorted({check for target, check in mine if (target, check) not in known}):
        notes.append(f"not in the baseline: {', '.join(new_ones)}")
    return Comparison(regressions=tuple(regressions), improvements=tuple(improvements), notes=tuple(notes))


def _changes(old: Verdict, new: Verdict) -> Iterator[Change]:
    """How one check changed."""
    if new.status not in GOOD and old.status in GOOD:
        yield _change(new, "failure", f"{new.status}, and was {old.status}{_because(new)}")
        return
    if new.status in GOOD and old.status not in GOOD:
        yield _change(new, "fixed", f"{new.status}, and was {old.status}")
        return
    if new.status is Status.NOT_APPLICABLE and old.status is not Status.NOT_APPLICABLE:
        yield _change(new, "vanished", f"not applicable, and was {old.status}: {new.reason}")
        return
    if new.measurements or not new.reason:
        yield from _measured(old, new)


def _measured(old: Verdict, new: Verdict) -> Iterator[Change]:
    """Errors that grew or shrank beyond the noise, and those that are not measured any more."""
    now = {(m.where, m.what): m for m in new.measurements}
    vanished = []
    for m in old.measurements:
        found = now.get((m.where, m.what))
        if found is None:
            vanished.append(f"{m.where} {m.what}")
        elif grown(m, found):
            yield _change(new, "error", f"{m.where}, {m.what}: {_from_to(m, found)}")
        elif grown(found, m):
            yield _change(new, "smaller", f"{m.where}, {m.what}: {_from_to(m, found)}")
    if vanished:
        more = f" and {len(vanished) - 3} more" if len(vanished) > 3 else ""
        yield _change(new, "vanished", f"no longer measured: {'; '.join(vanished[:3])}{more}")


def grown(then: Measurement, now: Measurement) -> bool:
    """The law at the top of this module; what becomes NaN has grown."""
    if math.isnan(now.measured):
        return not math.isnan(then.measured)
    if math.isnan(then.measured):
        return False
    room = then.allowed / NOISE_FACTOR if math.isfinite(then.allowed) else 0.0
    return now.measured - then.measured > room


def _from_to(then: Measurement, now: Measurement) -> str:
    return f"{number(now.measured)}, and was {number(then.measured)} where {number(then.allowed)} was allowed"


def _because(verdict: Verdict) -> str:
    from genmodel.conformance.text import summary

    return f": {summary(verdict)}"


def _change(verdict: Verdict, kind: Any, said: str) -> Change:
    return Change(target=verdict.target, check=verdict.check, kind=kind, said=said)


def _versions(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What else is different."""
    old, new = then.get("environment", {}), now["environment"]
    different = [name for name in new if old.get(name) != new[name]]
    if different:
        yield "other than then: " + ", ".join(f"{name} {new[name]} ({old.get(name, 'none')})" for name in different)
    if commit := then.get("commit"):
        changes = " with changes" if commit.get("changed") else ""
        yield f"the baseline is of commit {str(commit.get('sha'))[:12]}{changes}"


def _cost(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Wall time, which no verdict hangs on: machines differ, and are busy."""
    seconds = [total_seconds(target) for target in (then, now)]
    if all(seconds):
        before, after = seconds
        yield f"{then['name']} took {after:.0f} s of hosts' time, and {before:.0f} s then ({after / before - 1:+.0%})"


def total_seconds(target: Mapping[str, Any]) -> float:
    """Seconds of all hosts together."""
    return math.fsum(float(s) for span in target.get("timeline", ()) for s in span["phases"].values())


def _verdict(target: str, check: Mapping[str, Any]) -> Verdict:
    """A check of a report, as far as it is compared."""
    from genmodel.conformance.verdict import Level

    return Verdict(
        check=str(check["id"]),
        target=str(target),
        level=Level(check["level"]),
        status=Status(check["status"]),
        reason=str(check["reason"]),
        measurements=tuple(
            Measurement(
                what=str(m["what"]), where=str(m["where"]), measured=float(m["measured"]), allowed=float(m["allowed"])
            )
            for m in check["measurements"]
        ),
    )
