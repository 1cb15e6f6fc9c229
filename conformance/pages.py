"""The report for people: Markdown for a job's summary, and one HTML file that needs nothing else.

Everything that comes from a model or its author (names, messages, tracebacks) is escaped: in HTML by jinja2, in
Markdown by the filters here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from genmodel.conformance import text
from genmodel.conformance.catalogue import UnknownCheck, get
from genmodel.conformance.verdict import Measurement, Status, Verdict
from genmodel.runners.protocol import printable

MARKS = {
    Status.PASSED: "✅",
    Status.FAILED: "❌",
    Status.XFAILED: "☑️",
    Status.XPASSED: "❌",
    Status.NOT_APPLICABLE: "⚪",
    Status.ERROR: "💥",
}
_LONGEST = 6000
"""Characters of one traceback or log in Markdown: a job's summary on GitHub takes a megabyte."""
_MEASUREMENTS = 8
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>()#|~&$!])")
_LINKS = re.compile(r"(?<=[a-z])(:)(?=//)|(?<=\bwww)(\.)|(@)", re.IGNORECASE)
_BLOCK = re.compile(r"^(\d*)([-+=.)])")

Command = Callable[[str, str], str]
"""From a check's id and a target's name to the command that runs just that."""


def markdown(report: Mapping[str, Any], verdicts: Sequence[Verdict], command: Command) -> str:
    """GitHub-flavoured Markdown for a job's summary.

    Args:
        report: of `genmodel.conformance.report.report_json`.
        verdicts: those that it was made of.
        command: runs just one check.
    """
    environment = _environment(autoescape=False)
    environment.filters |= {"md": escape_markdown, "code": code_span, "fenced": fenced}
    return environment.get_template("report.md.j2").render(_context(report, verdicts, command)).strip() + "\n"


def html(
    report: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    command: Command,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """One HTML file with its pictures inside.

    Args:
        report: of `genmodel.conformance.report.report_json`.
        verdicts: those that it was made of.
        command: runs just one check.
        curves: of `genmodel.conformance.curves.curves`, by target.
    """
    from genmodel.conformance import plots

    context = _context(report, verdicts, command)
    for target in context["targets"]:
        target["plots"] = [
            {**curve, "svg": Markup(plots.agreement_plot(curve))} for curve in curves.get(target["name"], ())
        ]
        spans = target["timeline"]
        target["timeline_svg"] = Markup(plots.timeline_plot(spans)) if spans else ""
        target["kinds"] = [plots.kind_of(span["what"]) for span in spans]
    return _environment(autoescape=True).get_template("report.html.j2").render(context) + "\n"


def escape_markdown(value: object) -> str:
    """Text that stays text in a paragraph or a cell of a table: one line, no markup, no links, no mentions."""
    line = " ".join(printable(str(value)).split())
    line = _LINKS.sub(r"\\\g<0>", _PUNCTUATION.sub(r"\\\1", line))
    return _BLOCK.sub(r"\1\\\2", line)


def code_span(value: object) -> str:
    """The text in one line as code; whole inside of tables too."""
    line = " ".join(printable(str(value)).split()).replace("|", "\\|")
    if not line:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def fenced(value: object) -> str:
    """The text as a block of code, the middle of a very long one left out."""
    block = printable(str(value), lines=True)
    if len(block) > _LONGEST:
        block = f"{block[: _LONGEST // 2]}\n[… {len(block) - _LONGEST:,} characters …]\n{block[-_LONGEST // 2 :]}"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", block)), default=0))
    return f"{fence}text\n{block}\n{fence}"


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": _number,
        "duration": _duration,
        "printable": lambda s: printable(str(s), lines=True),
    }
    return environment


def _context(report: Mapping[str, Any], verdicts: Sequence[Verdict], command: Command) -> dict[str, Any]:
    return {
        "report": report,
        "conclusion": _conclusion(report, verdicts),
        "legend": text.TABLE_LEGEND,
        "counts": {name: count for name, count in report["counts"].items() if count},
        "marks": {status.value: mark for status, mark in MARKS.items()},
        "targets": [_target(target, verdicts, command) for target in report["targets"]],
    }


def _conclusion(report: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str:
    """What it comes to: what is in error, or never came, says nothing about the model."""
    compared = report["baseline"]
    blocking = {verdict.status for verdict in verdicts if verdict.blocking}
    if blocking - {Status.ERROR} or (compared and compared["regressions"]):
        return "does not conform"
    return "was not judged in full" if blocking or report["missing"] else "conforms"


def _target(target: Mapping[str, Any], verdicts: Sequence[Verdict], command: Command) -> dict[str, Any]:
    mine = [verdict for verdict in verdicts if verdict.target == target["name"]]
    shown = [_check(verdict, command) for verdict in mine]
    return {
        **target,
        "table": text.table_cells(mine),
        "broken": [check for check in shown if check["broken"]],
        "expected": [check for check in shown if check["status"] == Status.XFAILED.value],
        "inapplicable": [check for check in shown if check["status"] == Status.NOT_APPLICABLE.value],
        "judged": shown,
    }


def _check(verdict: Verdict, command: Command) -> dict[str, Any]:
    """What is shown of a verdict."""
    try:
        known = get(verdict.check)
        words = {"claim": known.claim, "causes": known.causes, "fix": known.fix}
    except UnknownCheck:
        words = {"claim": "", "causes": "", "fix": ""}
    ranked = sorted(verdict.measurements, key=lambda m: m.severity, reverse=True)
    broken = verdict.status in (Status.FAILED, Status.ERROR, Status.XPASSED)
    errors = [m for m in ranked if m.allowed != 0]
    return {
        "id": verdict.check,
        "status": verdict.status.value,
        "mark": MARKS[verdict.status],
        "level": verdict.level.value,
        "broken": broken,
        "advisory": verdict.status is Status.FAILED and not verdict.blocking,
        "reason": verdict.reason,
        "details": verdict.details,
        "diagnosis": verdict.diagnosis,
        "summary": text.summary(verdict) if verdict.reason or broken else "",
        "command": command(verdict.check, verdict.target) if broken else "",
        "measurements": [_measurement(m) for m in ranked[:_MEASUREMENTS]],
        "hidden": max(0, len(ranked) - _MEASUREMENTS),
        "share": errors[0].ratio if errors else None,
        "bar": 100 * min(1.0, errors[0].ratio) if errors and not math.isnan(errors[0].ratio) else 100,
        "seconds": verdict.seconds,
        **words,
    }


def _measurement(m: Measurement) -> dict[str, Any]:
    return {"where": m.where, "what": m.what, "said": text.against(m), "detail": m.detail, "ok": m.ok}


def _number(x: object) -> str:
    """A number of a report, which may also be "nan" or "inf", in a few digits."""
    value = float(x)  # type: ignore[arg-type]
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2g}" if abs(value) < 1e4 and (abs(value) >= 1e-3 or value == 0) else f"{value:.1e}"


def _duration(seconds: object) -> str:
    value = float(seconds)  # type: ignore[arg-type]
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {value % 60:.0f} s"
