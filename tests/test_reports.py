"""What is written for tools and people: JSON by its schema; Markdown and HTML that nothing from a model can break."""

from __future__ import annotations

import json
import re
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from evidence_samples import FAILING, change_scores, clean, shifted, spoiled
from genmodel.conformance import pages
from genmodel.conformance.baseline import Change, Comparison
from genmodel.conformance.catalogue import all_checks, judge
from genmodel.conformance.curves import POINTS, curves
from genmodel.conformance.diagnosis import Finding
from genmodel.conformance.plots import agreement_plot, kind_of, timeline_plot
from genmodel.conformance.report import SCHEMA, SCHEMA_VERSION, commit_of, report_json, target_json
from genmodel.conformance.verdict import Status, Verdict
from genmodel.runners.evidence import Evidence, Failure, Span

CLEAN = clean()
SPANS = (
    Span(what="import", rank=0, begin=1.0, phases={"introduce": 0.2}),
    Span(what="TP=2", rank=1, begin=2.0, phases={"engine start": 3.0, "generate": 4.5}),
    Span(what="gradients", rank=0, begin=2.0, phases={}),
)
EVIL = (
    '<script>alert(1)</script> "><img src=x onerror=alert(2)> $\\frac{ `x` | [a](javascript:alert(3)) @octocat\n# *b*'
)
"""A name that tries markup, a table's cell, mathematics, links and mentions."""


def finding(**fields: Any) -> Finding:
    right: dict[str, Any] = {
        "module": "layers.0.mlp.down",
        "module_class": "RowParallelLinear",
        "between": None,
        "tensor": "its output",
        "own_code": False,
        "tensor_parallel_size": 2,
        "ranks": (0, 1),
        "phase": "prompt",
        "how": "",
        "request": "short",
        "position": 3,
        "error": 0.5,
        "allowed": 1e-6,
        "input_good": True,
        "share": "",
        "candidates": (),
        "hint": "",
        "agreeing": 17,
    }
    return Finding(**right | fields)


def verdicts_of(evidence: Evidence) -> list[Verdict]:
    return [judge(check, evidence) for check in all_checks()]


def command(check: str, target: str) -> str:
    return f"pytest 'genmodel/{check}[{target}]'"


def hostile() -> tuple[dict[str, Any], list[Verdict], Evidence]:
    """A report in which everything that can come from a model is EVIL."""
    evidence = change_scores(CLEAN, shifted(1e-3))
    evidence = replace(
        evidence,
        target=replace(evidence.target, name=EVIL, spec=EVIL, weights=EVIL, config=EVIL),
        environment={"vllm": EVIL},
        timeline=(*SPANS, Span(what=EVIL, rank=0, begin=9.0, phases={EVIL: 1.0})),
        gradients=Failure(kind="raised", scenario="gradients", message=EVIL, details=f"{EVIL}\n```\n{EVIL}"),
        traces={**evidence.traces, ("alone", 1): Failure(kind="raised", scenario="alone", message=EVIL)},
    )
    told = []
    for verdict in verdicts_of(evidence):
        where = tuple(replace(m, what=f"{m.what} {EVIL}", detail=EVIL) for m in verdict.measurements)
        told.append(replace(verdict, measurements=where, diagnosis=EVIL if where else ""))
    told[0] = replace(told[0], status=Status.NOT_APPLICABLE, reason=EVIL)
    told[1] = replace(told[1], status=Status.XFAILED, reason=EVIL)
    findings = {("plain", 1): finding(module=EVIL, between=(EVIL, EVIL), tensor=EVIL, request=EVIL), ("alone", 1): EVIL}
    change = Change(target=EVIL, check=EVIL, kind="error", said=EVIL)
    compared = Comparison(regressions=(change,), improvements=(change,), notes=(EVIL,)).as_json(EVIL)
    target = target_json(evidence, findings)
    commit = {"sha": EVIL, "changed": True}
    return report_json([target], told, commit=commit, baseline=compared), told, evidence


# --- JSON ----------------------------------------------------------------------------------------------------------


def validated(report: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()), format_checker=jsonschema.FormatChecker()).validate(
        read
    )
    return read


def test_the_schema_is_one() -> None:
    schema = json.loads(SCHEMA.read_text())

    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize(
    "evidence",
    [
        CLEAN,
        replace(CLEAN, timeline=SPANS),
        change_scores(CLEAN, spoiled(float("nan"))),
        FAILING["gradients.numeric"]["useless steps"](CLEAN),
        replace(CLEAN, reference=None, inspection=Failure(kind="died", scenario="inspection", message="host 0 died")),
    ],
    ids=["clean", "timeline", "NaN", "infinite", "dead"],
)
def test_reports_follow_the_schema(evidence: Evidence) -> None:
    found = {("plain", 1): finding(error=float("nan")), ("plain", 2): None, ("alone", 1): "died"}
    report = report_json(
        [target_json(evidence, found)], verdicts_of(evidence), commit={"sha": "1" * 40, "changed": None}
    )

    assert validated(report)["targets"][0]["findings"][0]["error"] == "nan"


def test_a_hostile_report_follows_the_schema_too() -> None:
    validated(hostile()[0])


def test_the_schema_refuses_what_a_report_is_not() -> None:
    report = report_json([target_json(CLEAN)], verdicts_of(CLEAN))
    report["targets"][0]["checks"][0]["status"] = "fine"

    with pytest.raises(jsonschema.ValidationError, match="'fine' is not one of"):
        validated(report)


def test_the_commit_of_the_authors_repository(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    (tmp_path / "file").write_text("1")
    sha = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    assert commit_of(tmp_path) == {"sha": sha, "changed": False}
    subprocess.run([*git, "add", "file"], check=True)
    assert commit_of(tmp_path) == {"sha": sha, "changed": True}


def test_no_git_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert commit_of(Path(__file__).parent) is None


# --- what is drawn -------------------------------------------------------------------------------------------------


def test_curves_are_the_measured_errors() -> None:
    """The worst point of the plain scenario's curves is what logits.values measures."""
    found = {
        (c["scenario"], c["tensor_parallel_size"]): c for c in curves(change_scores(CLEAN, shifted(1e-3), sizes=(2,)))
    }

    for size, held in ((1, True), (2, False)):
        points = [
            (error, allowed)
            for of in found["plain", size]["phases"].values()
            for error, allowed in zip(of["error"], of["allowed"], strict=True)
        ]
        assert all(error <= allowed for error, allowed in points) is held
    assert max(e for of in found["plain", 2]["phases"].values() for e in of["error"]) == pytest.approx(1e-3, rel=0.05)
    assert set(found["plain", 1]["phases"]) == {"prompt", "first token", "decode"}
    assert all(n == 10 for of in found["plain", 1]["phases"].values() for n in of["overlap"])
    json.dumps(list(found.values()), allow_nan=False)


def test_a_curve_of_a_long_sequence_is_thinned_to_the_worst() -> None:
    import torch

    from genmodel.conformance.curves import _thinned

    count = 5000
    error = torch.zeros(count, dtype=torch.float64)
    error[3210] = 7.0
    thinned = _thinned(torch.arange(count), error, error + 1, error + 1, torch.full((count,), 10))

    assert len(thinned["position"]) <= POINTS
    assert 3210 in thinned["position"]


def test_failures_leave_no_curve() -> None:
    failure = Failure(kind="died", scenario="plain", message="x")
    evidence = replace(CLEAN, traces={**CLEAN.traces, ("plain", 1): failure}, reference=failure)

    assert ("plain", 1) not in {(c["scenario"], c["tensor_parallel_size"]) for c in curves(evidence)}
    assert {c["scenario"] for c in curves(evidence)} == {"bfloat16", "refit.changed", "refit.again"}


@pytest.mark.parametrize("name", ["clean", "NaN", "infinite"])
def test_pictures_are_svg_in_the_pages_colours(name: str) -> None:
    change = {"clean": shifted(0.0), "NaN": spoiled(float("nan")), "infinite": spoiled(float("inf"))}[name]
    (curve, *_) = curves(change_scores(CLEAN, change))
    drawn = agreement_plot(curve)

    assert ET.fromstring(drawn).tag.endswith("svg")
    assert {"var(--ink)", "var(--noise)", "var(--limit)", "var(--prompt)"} <= set(re.findall(r"var\(--\w+\)", drawn))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
    assert ("var(--bad)" in drawn) is (name != "clean")
    assert drawn == agreement_plot(curve)


def test_the_timeline_has_every_command() -> None:
    drawn = timeline_plot(target_json(replace(CLEAN, timeline=SPANS))["timeline"])

    assert ET.fromstring(drawn).tag.endswith("svg")
    assert {"var(--engine)", "var(--host)"} <= set(re.findall(r"var\(--\w+\)", drawn))
    assert [kind_of(span.what) for span in SPANS] == ["host", "engine", "torch"]


# --- HTML ----------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    return found


def page_of(evidence: Evidence, **kwargs: Any) -> str:
    told = verdicts_of(evidence)
    report = report_json([target_json(evidence, kwargs.get("findings"))], told)
    return pages.html(report, told, command, {evidence.target.name: curves(evidence)})


def test_the_page_needs_nothing_else() -> None:
    found = parsed(page_of(replace(CLEAN, timeline=SPANS)))

    assert not {"script", "link", "img", "iframe", "object"} & found.tags
    links = {value for name, value in found.attributes if name in ("href", "src", "xlink:href")}
    assert all(value is not None and value.startswith("#") for value in links)
    assert ("name", "viewport") in found.attributes
    assert "svg" in found.tags


def test_the_page_suits_dark_and_light() -> None:
    page = page_of(CLEAN)
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = re.search(
        r":root \{(.*?)\}\n@media \(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", page, re.DOTALL
    ).groups()  # type: ignore[union-attr]

    assert used <= set(re.findall(r"(--\w+):", light))
    assert set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark))


def test_the_page_shows_each_scenario_and_every_check() -> None:
    page = page_of(replace(CLEAN, timeline=SPANS))

    assert page.count("<figure") == 1 + len([t for t in CLEAN.traces.values() if isinstance(t, tuple)])
    assert all(check.id in page for check in all_checks())
    assert "conforms" in page
    assert "does not conform" not in page


def test_the_page_of_a_failure_says_where_it_begins() -> None:
    evidence = change_scores(CLEAN, shifted(1e-3))
    page = page_of(evidence, findings={("plain", 1): finding()})
    text = " ".join(" ".join(parsed(page).text).split())

    assert "does not conform" in text
    assert (
        "17 tensors before agree layers.0.mlp.down (RowParallelLinear) its output: off by 0.5, 1.0e-06 is allowed"
        in text
    )
    assert "Usual causes" in text
    assert command("logits.values", CLEAN.target.name) in text


def test_nothing_from_a_model_is_markup_in_the_page() -> None:
    report, told, evidence = hostile()
    page = pages.html(report, told, command, {EVIL: curves(evidence)})
    found = parsed(page)

    assert not {"script", "img"} & found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in "".join(found.text)


# --- Markdown ------------------------------------------------------------------------------------------------------


def rendered(markdown: str) -> Elements:
    """As GitHub would: tables, raw HTML and all."""
    return parsed(
        MarkdownIt("gfm-like").render(markdown) if _has_linkify() else MarkdownIt().enable("table").render(markdown)
    )


def _has_linkify() -> bool:
    try:
        import linkify_it  # noqa: F401
    except ImportError:
        return False
    return True


def test_nothing_from_a_model_is_markup_in_the_summary() -> None:
    report, told, _ = hostile()
    summary = pages.markdown(report, told, command)
    found = rendered(summary)

    assert found.tags <= {
        "h2",
        "h3",
        "p",
        "code",
        "pre",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "sub",
        "ul",
        "li",
    } | {
        "details",
        "summary",
        "b",
        "strong",
    }
    assert not [pair for pair in found.attributes if pair[0] not in ("open", "class")]
    assert summary.count("</details>") == summary.count("<details") > 3
    assert "<script>alert(1)</script>" in "".join(found.text)


def test_the_summary_of_a_right_model_is_short() -> None:
    told = verdicts_of(CLEAN)
    summary = pages.markdown(report_json([target_json(CLEAN)], told), told, command)

    passed = sum(verdict.status is Status.PASSED for verdict in told)
    assert summary.startswith(
        f"## ✅ genmodel: the model conforms\n\n✅ {passed} passed · ⚪ {len(told) - passed} not applicable\n"
    )
    assert len(summary.splitlines()) < 30
    table = rendered(summary)
    assert {"table", "details"} <= table.tags
    assert "TP=2" in " ".join(table.text)


def test_the_summary_of_a_failure_has_numbers_and_the_command() -> None:
    evidence = change_scores(CLEAN, shifted(1e-3), sizes=(2,))
    told = verdicts_of(evidence)
    summary = pages.markdown(report_json([target_json(evidence)], told), told, command)

    assert summary.startswith("## ❌")
    assert "<b>logits.values</b>" in summary
    assert "where 8." in summary
    assert command("logits.values", "my_pkg:factory") in summary


def test_a_long_log_does_not_exceed_a_jobs_summary() -> None:
    failure = Failure(kind="raised", scenario="plain", message="x", details="y" * 10**6)
    evidence = replace(CLEAN, traces=dict.fromkeys(CLEAN.traces, failure))
    told = verdicts_of(evidence)

    assert len(pages.markdown(report_json([target_json(evidence)], told), told, command).encode()) < 2**20


@given(st.text(max_size=60))
@settings(deadline=None)
def test_any_text_stays_text(text: str) -> None:
    """Escaped, in code and in a fence: never an element of its own."""
    one_line = parsed(MarkdownIt().enable("table").render(f"- {pages.escape_markdown(text)}\n"))
    assert one_line.tags <= {"ul", "li", "p"}
    assert rendered(f"a {pages.code_span(text)} b\n").tags <= {"p", "code"}
    fence = parsed(MarkdownIt().render(f"{pages.fenced(text)}\n\nafter\n"))
    assert fence.tags == {"pre", "code", "p"}
    row = parsed(
        MarkdownIt().enable("table").render(f"|a|b|\n|-|-|\n|{pages.code_span(text)}|{pages.escape_markdown(text)}|\n")
    )
    assert row.tags <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert (
        MarkdownIt()
        .enable("table")
        .render(f"|a|b|\n|-|-|\n|{pages.code_span(text)}|{pages.escape_markdown(text)}|\n")
        .count("<td")
        == 2
    )


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b*c", r"a\_b\*c"),
        ("0.1.0", r"0\.1.0"),
        ("- x", r"\- x"),
        ("two\nlines", "two lines"),
        ("see http://x", r"see http\://x"),
        ("@octocat", r"\@octocat"),
        ("\x1b[31mred\x1b[0m", "red"),
    ],
)
def test_escaped_markdown(text: str, escaped: str) -> None:
    assert pages.escape_markdown(text) == escaped.replace(r"\[31m", "")
