"""Verdicts as plain text for a terminal of 80 to 120 columns; knows nothing of pytest."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from genmodel.conformance.catalogue import GROUPS, Check, all_checks
from genmodel.conformance.verdict import REFERENCE, Measurement, Status, Verdict
from genmodel.runners.protocol import printable

WIDTH = 80
TABLE_LEGEND = "passed/judged, then the worst error as a share of its tolerance; ! marks what did not hold"
_MEASUREMENTS_SHOWN = 6
_BROKEN = (Status.FAILED, Status.ERROR, Status.XPASSED)


def failure(verdict: Verdict, check: Check, command: str) -> str:
    """Why a check did not pass and what to do: claim, numbers, usual causes, fix, and how to run it alone.

    Args:
        verdict: of a check that failed or is in error.
        check: its entry in the catalogue.
        command: runs just this check.
    """
    parts = [_wrap(check.claim)]
    if verdict.reason:
        parts.append(_wrap(f"{verdict.status.value}: {verdict.reason}"))
    if verdict.details:
        parts.append(_section("What happened", verdict.details))
    if verdict.measurements:
        parts.append("\n".join(_measured(verdict.measurements)))
    if verdict.diagnosis:
        parts.append(_section("Where it begins", _reflowed(verdict.diagnosis)))
    if any(not m.ok for m in verdict.measurements):
        parts += [_section("Usual causes", _reflowed(check.causes)), _section("How to fix", _reflowed(check.fix))]
        if check.reports:
            parts.append(_section("Seen in", _reflowed(" ".join(map(_qualified, check.reports)))))
    parts.append(_section("Run just this check", command))
    return "\n\n".join(parts)


def summary(verdict: Verdict) -> str:
    """The worst of a verdict in one line."""
    broken = _worst_first(m for m in verdict.measurements if not m.ok)
    if verdict.reason or not broken:
        return verdict.reason or verdict.status.value
    worst = broken[0]
    detail = f" ({worst.detail})" if worst.detail else ""
    return f"{worst.where}, {worst.what}: {against(worst)}{detail}"


def printable_verdict(verdict: Verdict) -> Verdict:
    """The verdict with all of its text printable: only details and diagnosis have several lines."""
    return replace(
        verdict,
        reason=printable(verdict.reason),
        details=printable(verdict.details, lines=True),
        diagnosis=printable(verdict.diagnosis, lines=True),
        measurements=tuple(
            replace(m, what=printable(m.what), where=printable(m.where), detail=printable(m.detail, lines=True))
            for m in verdict.measurements
        ),
    )


def printable_json(value: Any) -> Any:
    """Plain JSON with all of its text printable."""
    if isinstance(value, str):
        return printable(value, lines=True)
    if isinstance(value, Mapping):
        return {printable_json(key): printable_json(item) for key, item in value.items()}
    return [printable_json(item) for item in value] if isinstance(value, list) else value


def cause(verdict: Verdict) -> tuple[str, str] | None:
    """Equal for verdicts that one event took down, such as a model that does not build, so that it is told once.

    None where the verdict has measurements of its own.
    """
    return (verdict.reason, verdict.details) if verdict.reason and not verdict.measurements else None


def table(verdicts: Sequence[Verdict]) -> str:
    """What one target's checks came to: groups across; TP=1, TP=2 and the reference down.

    A cell such as "8/9 0.31" says that 8 of 9 checks hold there and that the worst error is 0.31 of its tolerance;
    a check stands in every row it measured something for.
    """
    cells = table_cells(verdicts)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    lines.append(TABLE_LEGEND)
    return "\n".join(lines)


def table_cells(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The same as a heading row and one row for each place."""
    judged = [verdict for verdict in verdicts if verdict.status is not Status.NOT_APPLICABLE]
    groups = [group for group in GROUPS if any(_group(verdict) == group for verdict in judged)]
    rows = sorted({where for verdict in judged for where in _places(verdict)}, key=_row_order)
    cells = [["", *groups]]
    cells += [[where, *(_cell(where, [v for v in judged if _group(v) == group]) for group in groups)] for where in rows]
    return cells


def not_applicable(verdicts: Sequence[Verdict]) -> str:
    """The checks that one target gave no occasion for, with the reasons; empty if there are none."""
    found = [verdict for verdict in verdicts if verdict.status is Status.NOT_APPLICABLE]
    if not found:
        return ""
    width = max(len(verdict.check) for verdict in found) + 4
    lines = (_hanging(f"  {verdict.check}".ljust(width), verdict.reason) for verdict in found)
    return "\n".join([f"not applicable ({len(found)}):", *lines])


def catalogue(checks: Collection[Check] | None = None) -> str:
    """Every check with its level and claim, by group."""
    shown = all_checks() if checks is None else checks
    width = max(len(check.id) for check in shown) + 4
    lines: list[str] = []
    for group in GROUPS:
        mine = [check for check in shown if check.group == group]
        if mine:
            lines += ["", group] if lines else [group]
        lines += [_hanging(f"  {check.id}".ljust(width) + f"{check.level.value:13}", check.claim) for check in mine]
    return "\n".join(lines) + "\n"


def _measured(measurements: Sequence[Measurement]) -> list[str]:
    """Broken limits, worst first, and how many held."""
    broken = _worst_first(m for m in measurements if not m.ok)
    held = [m for m in measurements if m.ok]
    shown = broken[:_MEASUREMENTS_SHOWN]
    width = max((len(m.where) for m in shown), default=0)
    lines = ["Measured, worst first"] if broken else []
    for m in shown:
        lines.append(_hanging(f"  {m.where:{width}}  ", f"{m.what}: {against(m)}"))
        if m.detail:
            lines.append(_wrap(m.detail, "  " * 2 + " " * width))
    if len(broken) > len(shown):
        lines.append(f"  and {len(broken) - len(shown)} more beyond their limits")
    if held:
        closest = max(m.ratio for m in held)
        lines.append(
            f"  {len(held)} of {len(measurements)} measurements hold, the closest at {closest:.2g} of its limit"
        )
    return lines


def against(m: Measurement) -> str:
    """A measurement and its limit in words: "0.001 where 8e-06 is allowed, 120 times its limit"."""
    if m.allowed == 0 and m.measured == int(m.measured if math.isfinite(m.measured) else 0):
        return f"{m.measured:g}, and none is allowed"
    times = f", {number(m.ratio)} times its limit" if math.isfinite(m.ratio) else ""
    return f"{number(m.measured)} where {number(m.allowed)} is allowed{times}"


def number(x: float) -> str:
    """A number in a few digits."""
    return f"{x:,.0f}" if math.isfinite(x) and 100 <= abs(x) < 1e6 else f"{x:.2g}"


def _cell(where: str, verdicts: Sequence[Verdict]) -> str:
    """One group's checks in one row of the table."""
    here = [(v, [m for m in v.measurements if m.where == where]) for v in verdicts if where in _places(v)]
    if not here:
        return "-"
    holding = [v for v, found in here if found and all(m.ok for m in found) and v.where != where]
    errors = [m for _, found in here for m in found if m.allowed != 0]
    broken = any(v.status in _BROKEN and v not in holding for v, _ in here)
    worst = f" {number(max(errors, key=lambda m: m.severity).ratio)}" if errors else ""
    return f"{len(holding)}/{len(here)}{worst}{' !' if broken else ''}"


def _places(verdict: Verdict) -> set[str]:
    """Rows of the table a verdict stands in."""
    found = {m.where for m in verdict.measurements} | ({verdict.where} if verdict.where else set())
    return found or {REFERENCE}


def _row_order(where: str) -> tuple[bool, int, str]:
    """Engines by size, then the reference."""
    size = where.rpartition("=")[2]
    return where == REFERENCE, int(size) if size.isdigit() else 0, where


def _group(verdict: Verdict) -> str:
    return verdict.check.partition(".")[0]


def _worst_first(measurements: Iterator[Measurement]) -> list[Measurement]:
    return sorted(measurements, key=lambda m: m.severity, reverse=True)


def _qualified(report: str) -> str:
    return f"vllm-project/vllm{report}" if report.startswith("#") else report


def _section(title: str, body: str) -> str:
    return f"{title}\n{textwrap.indent(body, '  ')}"


def _reflowed(text: str) -> str:
    """Docstring paragraphs at this width, to be indented by two; code, which is indented, as it stands."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        paragraph
        if any(line.startswith(" ") for line in paragraph.splitlines())
        else textwrap.fill(paragraph, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
        for paragraph in paragraphs
    )


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _hanging(label: str, text: str) -> str:
    """`text` beside `label`, with its further lines under its first."""
    return label + _wrap(text, " " * len(label)).lstrip()
