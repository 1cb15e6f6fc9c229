"""One table of vLLM's versions against checks, from JSON reports of the suite.

    python tools/versions_table.py .tox/reports

Rows are checks, columns reports, in order of their vLLM; a cell says how a check ended, and the worst error as a share
of its tolerance. Exits 1 if a required check did not hold anywhere. Needs nothing but Python.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

MARKS = {
    "passed": "ok",
    "xfailed": "xfail",
    "xpassed": "XPASS",
    "failed": "FAIL",
    "error": "ERROR",
    "not applicable": "n/a",
}
BROKEN = ("failed", "error", "xpassed")


def main() -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "reports", nargs="+", type=Path, help="what --genmodel-report=FILE.json wrote, or folders of these"
    )
    parser.add_argument("--markdown", action="store_true", help="a table in Markdown")
    arguments = parser.parse_args()
    paths = [
        found for path in arguments.reports for found in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
    if not paths:
        sys.exit(f"error: no reports in {', '.join(map(str, arguments.reports))}")
    reports = sorted(map(read, paths), key=version_key)
    broken = False
    for name in dict.fromkeys(target["name"] for report in reports for target in report["targets"]):
        rows, holds = table(name, reports)
        broken = broken or not holds
        print(f"\n{name}\n" if not arguments.markdown else f"\n### `{name}`\n")
        print("\n".join(markdown(rows) if arguments.markdown else aligned(rows)))
    return int(broken)


def read(path: Path) -> dict[str, Any]:
    """A report; ends the program with one line if it is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot read {path}: {error}")
    if not isinstance(found, dict) or found.get("schema_version") != 1:
        sys.exit(f"error: {path} is not a report of genmodel (schema_version 1)")
    return found


def version(report: dict[str, Any]) -> str:
    """Of vLLM."""
    return str(report["environment"].get("vllm", "?"))


def version_key(report: dict[str, Any]) -> list[int]:
    """Sorts 0.9 before 0.10."""
    return [int(number) for number in re.findall(r"\d+", version(report))]


def table(name: str, reports: list[dict[str, Any]]) -> tuple[list[list[str]], bool]:
    """The rows of one target, a heading first, and whether every required check held."""
    targets = [next((t for t in report["targets"] if t["name"] == name), None) for report in reports]
    by_id = [{} if target is None else {check["id"]: check for check in target["checks"]} for target in targets]
    ids = dict.fromkeys(check_id for checks in by_id for check_id in checks)
    rows = [["vLLM", *map(version, reports)]]
    rows += [[check_id, *(cell(checks.get(check_id)) for checks in by_id)] for check_id in ids]
    rows.append(["passed", *(counted(target) for target in targets)])
    rows.append(["worse than the baseline", *(regressions(report, name) for report in reports)])
    rows.append(["hosts' seconds", *(seconds(target) for target in targets)])
    judged = [check for checks in by_id for check in checks.values()]
    return rows, not any(c["status"] in BROKEN and c["level"] == "required" for c in judged)


def cell(check: dict[str, Any] | None) -> str:
    """How one check ended in one report."""
    if check is None:
        return "-"
    ratios = [float(m["ratio"]) for m in check["measurements"] if float(m["allowed"]) != 0]
    worst = max(ratios, key=lambda ratio: (math.isnan(ratio), ratio), default=None)
    return MARKS[check["status"]] + ("" if worst is None else f" {worst:.2g}")


def counted(target: dict[str, Any] | None) -> str:
    """Of those judged."""
    if target is None:
        return "-"
    counts = target["counts"]
    return f"{counts['passed']}/{sum(counts.values()) - counts['not applicable']}"


def regressions(report: dict[str, Any], name: str) -> str:
    """How many, if there was a baseline."""
    found = report.get("baseline")
    return "-" if found is None else str(sum(change["target"] == name for change in found["regressions"]))


def seconds(target: dict[str, Any] | None) -> str:
    """Of all hosts together."""
    spans = [] if target is None else target.get("timeline", [])
    return f"{sum(float(s) for span in spans for s in span['phases'].values()):.0f}" if spans else "-"


def aligned(rows: list[list[str]]) -> list[str]:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def markdown(rows: list[list[str]]) -> list[str]:
    """For a summary."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


if __name__ == "__main__":
    sys.exit(main())
