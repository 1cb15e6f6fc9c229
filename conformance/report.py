"""The JSON report: everything a later run or another tool needs to know, and nothing that is not JSON."""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import genmodel
from genmodel.conformance.diagnosis import Finding, Findings, describe
from genmodel.conformance.text import printable_json
from genmodel.conformance.verdict import Measurement, Status, Verdict
from genmodel.runners.evidence import Evidence, ReferenceRun

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).parent / "report.schema.json"
"""The JSON Schema that reports of this version follow."""


def target_json(evidence: Evidence, findings: Findings | None = None) -> dict[str, Any]:
    """What a report says of a target besides its verdicts: how it was run, on what, and what that cost.

    It is plain JSON, so that it can travel from a pytest-xdist worker to the process that writes the report.

    Args:
        evidence: what its scenarios gave.
        findings: where its failures begin, of `Diagnosis.findings`.
    """
    facts = asdict(evidence.target)
    facts["tensor_parallel_sizes"] = list(evidence.target.tensor_parallel_sizes)
    known = evidence.reference
    found: dict[str, Any] = printable_json(
        {
            **facts,
            "reference": {
                "description": known.description,
                "independent": known.independent,
                "dtype": known.dtype,
                "higher_dtype": known.higher_dtype,
            }
            if isinstance(known, ReferenceRun)
            else None,
            "seconds": {phase: _number(seconds) for phase, seconds in evidence.seconds.items()},
            "environment": dict(evidence.environment),
            "timeline": [
                {
                    "what": span.what,
                    "rank": span.rank,
                    "begin": _number(span.begin),
                    "phases": {phase: _number(seconds) for phase, seconds in span.phases.items()},
                }
                for span in evidence.timeline
            ],
            "findings": [
                {"scenario": scenario, "tensor_parallel_size": size, **_finding_json(found)}
                for (scenario, size), found in (findings or {}).items()
            ],
        }
    )
    return found


def _finding_json(found: Finding | str | None) -> dict[str, Any]:
    if not isinstance(found, Finding):
        return {"module": None, "reason": found or "no module has a counterpart in the reference"}
    if found.within:
        return {"module": None, "reason": describe(found)}
    return {
        "module": found.module,
        "module_class": found.module_class,
        "between": None if found.between is None else list(found.between),
        "tensor": found.tensor,
        "ranks": list(found.ranks),
        "phase": found.phase,
        "request": found.request,
        "position": found.position,
        "error": _number(found.error),
        "allowed": _number(found.allowed),
        "agreeing": found.agreeing,
    }


def commit_of(folder: Path) -> dict[str, Any] | None:
    """The commit of the git repository around `folder`, and whether files differ from it; None if there is none."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD")
    if sha is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"sha": sha, "changed": bool(changed) if changed is not None else None}


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """One check's outcome, strictly JSON: NaN and infinities are the strings "nan", "inf" and "-inf"."""
    return {
        "id": verdict.check,
        "level": verdict.level.value,
        "status": verdict.status.value,
        "reason": verdict.reason,
        "details": verdict.details,
        "diagnosis": verdict.diagnosis,
        "where": verdict.where,
        "seconds": _number(verdict.seconds),
        "measurements": [_measurement_json(measurement) for measurement in verdict.measurements],
    }


def report_json(
    targets: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Verdict],
    *,
    commit: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
    missing: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """The whole report, `schema_version` 1, as report.schema.json describes it.

    Args:
        targets: one `target_json` per target; verdicts belong to the one whose name is their `target`.
        verdicts: of all targets.
        commit: `commit_of` the author's repository.
        baseline: what comparing with a baseline gave, of `genmodel.conformance.baseline`.
        missing: target and check of verdicts that were to come and have not.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "genmodel": genmodel.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": None if commit is None else dict(commit),
        "baseline": None if baseline is None else dict(baseline),
        "environment": dict(targets[0]["environment"]) if targets else {},
        "counts": _counts(verdicts),
        "missing": [{"target": target, "check": check} for target, check in missing],
        "targets": [_section(target, [v for v in verdicts if v.target == target["name"]]) for target in targets],
    }


def _section(target: Mapping[str, Any], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    cost = {**target["seconds"], "checks": _number(sum(verdict.seconds for verdict in verdicts))}
    facts = {key: value for key, value in target.items() if key != "environment"}
    return {**facts, "seconds": cost, "counts": _counts(verdicts), "checks": [verdict_json(v) for v in verdicts]}


def _counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    found = Counter(verdict.status for verdict in verdicts)
    return {status.value: found[status] for status in Status}


def _measurement_json(measurement: Measurement) -> dict[str, Any]:
    return {
        "what": measurement.what,
        "where": measurement.where,
        "measured": _number(measurement.measured),
        "allowed": _number(measurement.allowed),
        "ratio": _number(measurement.ratio),
        "ok": measurement.ok,
        "detail": measurement.detail,
    }


def _number(x: float) -> float | str:
    """JSON has no NaN and no infinities; `float()` reads these words back."""
    return x if math.isfinite(x) else str(float(x))
