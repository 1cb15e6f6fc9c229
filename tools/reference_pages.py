#!/usr/bin/env python3
"""Write docs/checks.md and docs/options.md from the code they document.

python tools/reference_pages.py

tests/test_docs.py fails where a page is not what this writes.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from genmodel.conformance.catalogue import GROUPS, Check, all_checks
from genmodel.fixtures.options import LIST_FLAG, LIST_HELP, OPTIONS, UPDATE_FLAG, UPDATE_HELP, Option

DOCS = Path(__file__).resolve().parents[1] / "docs"
REPORT = re.compile(r"(?P<project>[\w-]*)#(?P<number>\d+)")
GENERATED = "<!-- Written by tools/reference_pages.py: change the code that it is made from, and run it. -->"


def checks_page() -> str:
    """The catalogue: for each check what must hold, what breaks it and how to fix it, from its docstring."""
    return _page(_checks_lines())


def options_page() -> str:
    """The command-line options, from the table that declares them to pytest."""
    return _page(_options_lines())


def _page(lines: Iterable[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _checks_lines() -> Iterator[str]:
    checks = all_checks()
    yield "# Catalogue of checks"
    yield ""
    yield GENERATED
    yield ""
    yield (
        f"The {len(checks)} checks, in the order in which they run. A *required* check that fails fails the run; one "
        "that is *recommended* is shown. A check that does not concern a model is *not applicable*, with the reason, "
        "and counted as such. `pytest --genmodel-list` prints their claims, and `-k` selects by id, group or level."
    )
    for group in GROUPS:
        mine = [check for check in checks if check.group == group]
        yield from ("", f"## {group}", "")
        yield from (f"- [`{check.id}`](#{check.id}): {_sentence(check.claim)}" for check in mine)
        for check in mine:
            yield from _check_lines(check)


def _check_lines(check: Check) -> Iterator[str]:
    yield from _heading("###", check.id, check.id)
    yield check.claim
    yield ""
    size = f", at a tensor-parallel size of {check.tensor_parallel} or more" if check.tensor_parallel > 1 else ""
    yield f"*{check.level.value.capitalize()}{size}. Judged on [{', '.join(sorted(check.needs))}](scenarios.md).*"
    yield from ("", "**Usual causes**", "", check.causes, "", "**How to fix**", "", *_with_fences(check.fix))
    if check.reports:
        yield from ("", f"**Seen in** {', '.join(map(_report, check.reports))}")


def _sentence(claim: str) -> str:
    """A claim's first sentence; the rest is with the check."""
    return claim.partition(". ")[0].rstrip(".") + "."


def _with_fences(text: str) -> Iterator[str]:
    """A docstring's paragraphs, with what is indented as Python."""
    for paragraph in re.split(r"\n{2,}(?=\S)|\n{2,}(?= )", text):
        if paragraph.startswith("    "):
            yield from ("```python", *(line.removeprefix("    ") for line in paragraph.splitlines()), "```", "")
        else:
            yield from (paragraph, "")


def _report(report: str) -> str:
    """A public bug report, linked where it names a repository that we know the owner of."""
    found = REPORT.fullmatch(report)
    assert found is not None, report
    if found["project"]:
        return f"{found['project']}#{found['number']}"
    return f"[vllm#{found['number']}](https://github.com/vllm-project/vllm/issues/{found['number']})"


def _options_lines() -> Iterator[str]:
    yield "# Options"
    yield ""
    yield GENERATED
    yield ""
    yield (
        "All of them are options of pytest, and `pytest --help` shows them too. Those with an ini name can be set in "
        "`pyproject.toml` or `pytest.ini`, where relative paths start from that file's folder:"
    )
    yield from ("", "```toml", "[tool.pytest.ini_options]", 'genmodel_reference = "my_pkg.plain:factory"', "```")
    for option in OPTIONS:
        yield from _option_lines(option)
    for flag, said in ((UPDATE_FLAG, UPDATE_HELP), (LIST_FLAG, LIST_HELP)):
        yield from (*_heading("##", flag, flag.lstrip("-")), _escaped(said))


def _option_lines(option: Option) -> Iterator[str]:
    title = f"{option.flag} {option.metavar}"
    yield from (*_heading("##", title, option.flag.lstrip("-")), _escaped(option.help), "")
    facts = [f"Default: `{option.default}`"] if option.default is not None else []
    facts += [f"Ini: `{option.name}`"] if option.ini else []
    if facts:
        yield ". ".join(facts) + "."


def _heading(level: str, title: str, anchor: str) -> tuple[str, ...]:
    """A heading under an anchor of ours, which works on the site and wherever else Markdown is shown."""
    return ("", f'<a id="{anchor}"></a>', "", f"{level} {title}", "")


def _escaped(text: str) -> str:
    """Help text as Markdown: what is code in it, such as names with stars, stays as it is."""
    return re.sub(r"[*_<>]", r"\\\g<0>", text)


if __name__ == "__main__":
    (DOCS / "checks.md").write_text(checks_page(), encoding="utf-8")
    (DOCS / "options.md").write_text(options_page(), encoding="utf-8")
