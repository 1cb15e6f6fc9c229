"""What docs/ci.md, docs/own-tests.md and action.yml show is there, and works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from genmodel.conformance.catalogue import get
from genmodel.fixtures.expectations import read_expectations
from genmodel.fixtures.options import LIST_FLAG, OPTIONS, UPDATE_FLAG, Option
from genmodel.runners.versions import SUPPORTED_VERSIONS

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
DOCS = {name: (ROOT / "docs" / name).read_text() for name in ("ci.md", "own-tests.md")}
FLAGS = {option.flag for option in OPTIONS} | {LIST_FLAG, UPDATE_FLAG}


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS[name], re.DOTALL)


@pytest.fixture(autouse=True)
def _plugin_for_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


# --- the options and files that are named --------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*DOCS.values(), (ROOT / "action.yml").read_text()], ids=[*DOCS, "action.yml"])
def test_every_option_that_is_named_exists(text: str) -> None:
    named = set(re.findall(r"--genmodel[a-z-]*", text))

    assert named
    assert named <= FLAGS


@pytest.mark.parametrize("name", DOCS)
def test_every_file_that_is_named_exists(name: str) -> None:
    named = re.findall(r"`((?:conformance|runners|tools|benchmarks)/[\w./]+)`", DOCS[name])
    linked = [f"docs/{path}" for path in re.findall(r"\]\(([\w.-]+\.md)\)", DOCS[name])]

    assert [path for path in named + linked if not (ROOT / path).is_file()] == []


def test_the_expectations_that_are_shown_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text("".join(blocks("ci.md", "toml")))
    found = read_expectations(tmp_path / "known.toml")

    assert set(found) == {"logits.kl", "gradients.numeric"}
    assert found["gradients.numeric"].targets == ("my_pkg.model:mixture",)


# --- the workflow --------------------------------------------------------------------------------------------------


def test_the_workflow_uses_the_action_as_it_is() -> None:
    (source,) = blocks("ci.md", "yaml")
    workflow = yaml.safe_load(source)
    (step,) = (s for job in workflow["jobs"].values() for s in job["steps"] if "pytest-genmodel" in s.get("uses", ""))
    required = {name for name, of in ACTION["inputs"].items() if of.get("required")}

    assert workflow[True].keys() == {"push", "pull_request", "schedule"}  # YAML's "on" is a truth value
    assert required <= step["with"].keys() <= ACTION["inputs"].keys()
    for version in workflow["jobs"]["conformance"]["strategy"]["matrix"]["vllm"]:
        assert version in (ROOT / "tox.ini").read_text()


# --- the action ----------------------------------------------------------------------------------------------------


def test_the_action_is_composite_and_complete() -> None:
    assert ACTION["runs"]["using"] == "composite"
    assert all(of["description"] for of in [*ACTION["inputs"].values(), *ACTION["outputs"].values()])
    for step in STEPS:
        assert ("uses" in step) != ("run" in step)
        assert "run" not in step or step["shell"] == "bash"


def test_every_input_is_declared_and_used() -> None:
    used = set(re.findall(r"inputs\.([\w-]+)", json.dumps(ACTION)))

    assert used == ACTION["inputs"].keys()


def test_inputs_come_in_as_variables_only() -> None:
    """An expression in a script is text of the script: a target named `$(…)` would be run."""
    assert [step["name"] for step in STEPS if "${{" in step.get("run", "")] == []


def test_the_default_vllm_is_a_supported_one() -> None:
    assert ACTION["inputs"]["vllm-version"]["default"] in (ROOT / "tox.ini").read_text()
    assert SUPPORTED_VERSIONS
    level: Option = next(option for option in OPTIONS if option.flag == "--genmodel-level")
    assert ACTION["inputs"]["level"]["default"] == level.default


@pytest.mark.parametrize("step", [step for step in STEPS if "run" in step], ids=lambda step: step["name"])
def test_scripts_are_bash(step: dict[str, Any]) -> None:
    done = subprocess.run(["bash", "-n"], input=step["run"], text=True, capture_output=True, check=False)

    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-s", "bash", "-"], input=step["run"], text=True, check=True)


def run_action(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """The step that runs the suite, as GitHub's runner would: on made-up evidence."""
    (step,) = (step for step in STEPS if step.get("id") == "run")
    values = {name: str(of.get("default", "")) for name, of in ACTION["inputs"].items()} | inputs
    variables = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: values[match[1]], text).replace(
            "${{ runner.temp }}", str(folder)
        )
        for name, text in step["env"].items()
    }
    environment = {
        **os.environ,
        **variables,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)


def test_the_action_writes_a_summary_and_reports_and_fails_with_the_suite(tmp_path: Path) -> None:
    done = run_action(tmp_path, target="models:right\nmodels:wrong", arguments="-p fake_session -k interface")

    assert done.returncode == 1, done.stdout + done.stderr
    assert (tmp_path / "summary.md").read_text().startswith("## ❌ genmodel: the model does not conform")
    assert (tmp_path / "output").read_text() == f"report={tmp_path}/genmodel/report.json\n"
    assert {path.name for path in (tmp_path / "genmodel").iterdir()} == {
        "evidence",
        "junit.xml",
        "report.html",
        "report.json",
        "report.md",
    }


def test_a_target_that_is_a_command_is_not_run(tmp_path: Path) -> None:
    done = run_action(tmp_path, target="$(touch${IFS}pwned)", tp="1;touch pwned", arguments="-p fake_session")

    assert done.returncode == 4
    assert not (tmp_path / "pwned").exists()


# --- authors' own tests --------------------------------------------------------------------------------------------


def test_the_fixtures_examples_pass(pytester: pytest.Pytester) -> None:
    """As they stand, on made-up evidence."""
    (source,) = (block for block in blocks("own-tests.md", "python") if block.startswith("# test_mine.py"))
    pytester.makepyfile(test_mine=source)
    result = pytester.runpytest_subprocess("-p", "fake_session", "--genmodel=models:right", "-m", "not genmodel", ".")

    result.assert_outcomes(passed=source.count("def test_"), deselected=result.parseoutcomes()["deselected"])


def test_the_decorators_example_collects(pytester: pytest.Pytester) -> None:
    (source,) = (block for block in blocks("own-tests.md", "python") if block.startswith("# test_conformance.py"))
    pytester.makepyfile(test_conformance=source)
    result = pytester.runpytest_subprocess("--co", "-q")

    result.stdout.fnmatch_lines(["*::test_conformance[[]my_pkg.model:factory-logits.kl[]]"])
    assert get("logits.kl")


def test_the_scripts_example_compiles() -> None:
    (source,) = (block for block in blocks("own-tests.md", "python") if block.startswith("# check.py"))

    compile(source, "check.py", "exec")


# --- the table of versions -----------------------------------------------------------------------------------------


def reports(folder: Path, run: Any) -> list[Path]:
    """One report of a right model and one of a wrong one, said to be of two versions."""
    found = []
    for number, (vllm, model) in enumerate([("0.10.0", "right"), ("0.9.1", "wrong")]):
        path = folder / f"{number}.json"
        run("-p", "fake_session", f"--genmodel=models:{model}", "-k", "interface or kl", f"--genmodel-report={path}")
        content = (
            path.read_text().replace("models:wrong", "models:right").replace('"vllm": "0.32.0"', f'"vllm": "{vllm}"')
        )
        path.write_text(content)
        found.append(path)
    return found


@pytest.mark.parametrize("markdown", [(), ("--markdown",)], ids=["text", "markdown"])
def test_the_table_of_versions(pytester: pytest.Pytester, markdown: tuple[str, ...]) -> None:
    paths = reports(pytester.path, pytester.runpytest_inprocess)
    script = [sys.executable, str(ROOT / "tools/versions_table.py"), *markdown]
    done = subprocess.run([*script, *map(str, paths)], text=True, capture_output=True, check=False)
    rows = {
        line.strip("| ").split()[0]: line.replace("|", " ").split()[1:]
        for line in done.stdout.splitlines()
        if "  " in line or "|" in line
    }

    assert done.returncode == 1, done.stderr
    assert rows["vLLM"] == ["0.9.1", "0.10.0"]
    assert rows["interface.signature"] == ["FAIL", "ok"]
    assert rows["interface.attention_prefixes"] == ["n/a", "ok"]
    assert rows["logits.kl"][::2] == ["ok", "ok"]
    folder = subprocess.run([*script, str(pytester.path)], text=True, capture_output=True, check=False)
    assert folder.stdout == done.stdout


@pytest.mark.parametrize(("content", "message"), [("", "cannot read"), ("{}", "is not a report of genmodel")])
def test_what_is_no_report_is_no_column(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    script = [sys.executable, str(ROOT / "tools/versions_table.py"), str(tmp_path / "x.json")]
    done = subprocess.run(script, text=True, capture_output=True, check=False)

    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
