"""The JSON report: everything a later run or another tool needs to know, and nothing that is not JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from genmodel.conformance.verdict import Measurement, Status, Verdict
from genmodel.runners.evidence import Evidence, ReferenceRun

SCHEMA_VERSION = 1


def target_json(evidence: Evidence) -> dict[str, Any]:
    """What a report says of a target besides its verdicts: how it was run, on what, and what that cost.

    It is plain JSON, so that it can travel from a pytest-xdist worker to the process that writes the report.
    """
    facts = asdict(evidence.target)
    facts["tensor_parallel_sizes"] = list(evidence.target.tensor_parallel_sizes)
    known = evidence.reference
    return {
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
    }


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


def report_json(targets: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The whole report, `schema_version` 1.

    Args:
        targets: one `target_json` per target; verdicts belong to the one whose name is their `target`.
        verdicts: of all targets.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": dict(targets[0]["environment"]) if targets else {},
        "counts": _counts(verdicts),
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
