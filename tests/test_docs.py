"""The documentation is true: its generated pages are current, its code runs, and what it says to do can be done."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import genmodel
from genmodel.conformance import text
from genmodel.conformance.catalogue import GROUPS, all_checks, get, judge
from genmodel.conformance.verdict import Measurement, Status, Verdict
from genmodel.fixtures.options import LIST_FLAG, OPTIONS, UPDATE_FLAG
from genmodel.runners.scenarios import SCENARIOS
from genmodel.runners.session import Session, TargetOptions

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
IDS = {check.id for check in all_checks()}

BLOCK = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks(page: str, language: str = "python") -> list[tuple[str, str]]:
    """(title, code) of a page's blocks in a language."""
    found = BLOCK.finditer((DOCS / page).read_text())
    return [(block["title"] or "", block["code"]) for block in found if block["language"] == language]


def titled(page: str, language: str = "python") -> dict[str, str]:
    return {title: code for title, code in blocks(page, language) if title}


# --- generated pages -----------------------------------------------------------------------------------------------


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "tools/reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "write"), [("checks.md", "checks_page"), ("options.md", "options_page")])
def test_generated_pages_are_current(page: str, write: str) -> None:
    """If this fails: python tools/reference_pages.py."""
    assert (DOCS / page).read_text() == getattr(tool(), write)()


# --- what is said of checks ----------------------------------------------------------------------------------------


def test_every_check_enforces_a_rule_of_the_interface() -> None:
    """And every rule that names a check names one there is."""
    assert set(re.findall(r"\(checks\.md#([\w.]+)\)", (DOCS / "interface.md").read_text())) == IDS


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_every_check_that_is_named_exists(path: Path) -> None:
    """In prose and in the screens of runs; the page on extending adds one of its own."""
    ids = set(re.findall(rf"(?<![\w./])(?:{'|'.join(GROUPS)})\.[a-z]\w*(?![\w(./])", path.read_text()))
    files = {name for name in ids if name.endswith((".py", ".md"))}
    assert ids - files - IDS <= ({"scheduling.queueing"} if path.name == "extending.md" else set())


SCREENS = [
    pytest.param(found["check"], found["screen"], id=f"{path.name}-{found['check']}")
    for path in PAGES
    for found in re.finditer(
        r"^_{3,} (?P<check>[\w.]+) of \S+ _{3,}\n(?P<screen>.*?)(?=^_{3,} |^={3,} |^\.\.\.$|^```$)",
        path.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    if not found["screen"].startswith("As for ")
]


@pytest.mark.parametrize(("check_id", "screen"), SCREENS)
def test_a_failure_that_is_shown_reads_as_it_would_today(check_id: str, screen: str) -> None:
    """If this fails, the check's text has changed since: run what the page says to run, and show that."""
    check = get(check_id)
    broken = (Measurement(what="errors", where="TP=1", measured=1, allowed=0),)
    verdict = Verdict(check=check_id, target="", level=check.level, status=Status.FAILED, measurements=broken)
    claim, *_ = today = text.failure(verdict, check, "").split("\n\n")
    assert screen.startswith(claim + "\n")
    if "Usual causes" in screen:
        advice = "\n\n".join(today[2:-1])
        assert advice.startswith("Usual causes")
        assert advice in screen


def test_every_scenario_is_described_once() -> None:
    """And nothing is that is no scenario."""
    described = re.findall(r"^\| `(\w+)` \|", (DOCS / "scenarios.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(SCENARIOS)


def test_every_public_name_is_in_the_api_reference() -> None:
    """Under the module it lives in, where mkdocstrings finds it."""
    pages = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    assert [n for n, home in genmodel._HOME.items() if f"::: {home}.{n}\n" not in pages] == []


def test_every_option_that_is_named_exists() -> None:
    named = {
        flag for path in (ROOT / "README.md", *PAGES) for flag in re.findall(r"--genmodel[a-z-]*", path.read_text())
    }
    assert named <= {option.flag for option in OPTIONS} | {LIST_FLAG, UPDATE_FLAG}


def test_the_readme_s_links_lead_somewhere() -> None:
    """mkdocs looks after those between the pages."""
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#([^)]*))?\)", (ROOT / "README.md").read_text())
    assert links
    for path, anchor in links:
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


# --- code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["parallel-layers.md", "registration.md", "references.md"])
def test_the_code_of_a_guide_runs(page: str, tmp_path: Path) -> None:
    """Block after block in one file; a block that starts an engine has no checkpoint here, and is only compiled."""
    code = [code for _, code in blocks(page)]
    for block in code:
        compile(block, page, "exec")
    (tmp_path / "guide.py").write_text("\n".join(block for block in code if "LLM(" not in block))
    done = subprocess.run([sys.executable, "guide.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def changed(code: str, diff: str) -> str:
    """The code with one change made, at the only place that is as the diff says."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines(keepends=True)]
    old = "".join(text or "\n" for sign, text in lines if sign != "+")
    new = "".join(text or "\n" for sign, text in lines if sign != "-")
    assert code.count(old) == 1, diff
    return code.replace(old, new)


def fixed(code: str) -> str:
    """The tutorial's model with the change that its diff makes."""
    ((_, diff),) = blocks("tutorial.md", "diff")
    return changed(code, diff)


def test_the_tutorial_s_model_fails_and_then_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the tutorial as they stand there, in real engines: what it shows red is red, and green is green."""
    files = titled("tutorial.md")
    model = files["tiny/model.py"]
    for path, code in {**files, "tiny/first.py": model, "tiny/model.py": fixed(model)}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    reference = "tiny.reference:factory"
    first = TargetOptions(spec="tiny.first:factory", reference=reference, tensor_parallel_sizes=(1,))
    final = TargetOptions(spec="tiny.model:factory", reference=reference)
    wrong = ["gradients.packed_sequences", "scheduling.chunked_prefill"]
    right = [
        *wrong,
        "gradients.numeric",
        "gradients.float32",
        "logits.values",
        "logits.tensor_parallel",
        "logits.batching",
    ]
    with Session([first, final]) as session:
        statuses = {
            (options.spec, name): judge(get(name), session.collect(options, get(name).needs)).status
            for options, names in ((first, wrong), (final, right))
            for name in names
        }
    expected = {(first.spec, name): Status.FAILED for name in wrong}
    assert statuses == expected | {(final.spec, name): Status.PASSED for name in right}


def test_the_readme_has_the_tutorial_s_model() -> None:
    """So that it is run too."""
    found = re.search(r"```python\n# my_pkg/model\.py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == fixed(titled("tutorial.md")["tiny/model.py"])


# --- adding a check, a scenario, a mutant --------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the tree with the blocks of docs/extending.md applied."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "conformance", "fixtures", "modeling", "reference_models", "runners", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / file, tmp_path)
    for path, code in blocks("extending.md"):
        (tmp_path / path).write_text(f"{(tmp_path / path).read_text()}\n\n{code}")
    for path, diff in blocks("extending.md", "diff"):
        (tmp_path / path).write_text(changed((tmp_path / path).read_text(), diff))
    return tmp_path


def test_a_check_a_scenario_and_a_mutant_can_be_added_as_documented(tree: Path) -> None:
    """The page's own command, in real engines: the check fails the mutant and passes the model that is right."""
    (command,) = (code for _, code in blocks("extending.md", "sh"))
    arguments = command.replace("\\\n", " ").partition("-m pytest ")[2]
    done = subprocess.run(
        f"{sys.executable} -m pytest -p no:cacheprovider -rA {arguments}",
        shell=True,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree / "tests")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"^PASSED (\S+)", done.stdout, re.MULTILINE)
    assert "tests/test_mutants.py::test_mutant_is_caught[two_rows_swapped]" in passed
    assert "genmodel/scheduling.queueing[genmodel.reference_models.dense:factory]" in passed
    assert "tests/test_conformance_checks.py::test_corrupted_evidence_fails[scheduling.queueing-shifted]" in passed
