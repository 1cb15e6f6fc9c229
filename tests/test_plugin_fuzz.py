"""Any text in any option, and in any file an option names: a verdict, or one line of a usage error."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# Imported here so that pytester's in-process runs, which forget what they import, share these.
import evidence_samples
from genmodel.conformance import catalogue
from genmodel.fixtures.expectations import read_expectations
from genmodel.fixtures.options import OPTIONS, Option, _parse

catalogue.all_checks()
PRELOADED = (evidence_samples,)

LIKELY = st.sampled_from(
    [
        *(
            "",
            ".",
            "/",
            "..",
            "\0",
            "a:b",
            ":",
            "a:",
            ":b",
            "é:ß",
            "-k",
            "[",
            "{}",
            "null",
            "~",
            "$HOME",
            "%s",
            "\ud800",
        ),
        *("1", "-1", "0", "1e400", "nan", "inf", "1,2", "1,,2", ",", "9" * 5000, "x" * 5000, "٣", "1_0", " 1"),
        *("tiny", "float32", "report.json", "x.json", "x.toml", "models:right", "models:right[x]", "transformers:auto"),
        *("LlamaForCausalLM", "models:right\nsecond line"),
    ]
)
TEXTS = st.one_of(LIKELY, st.text(max_size=30), st.text(alphabet="/.:,0123456789ab\0\n", max_size=12))
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"a=" + b"[" * 100_000, b"\xff\xfe", b"", b"null", b"1e999"]),
    st.text(alphabet='[]{}"=:,.\n ab01', max_size=40).map(str.encode),
)
NO_ENGINE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _plugin_for_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
@given(text=TEXTS)
@settings(NO_ENGINE, max_examples=150)
def test_any_text_is_parsed_or_refused_in_one_line(tmp_path: Path, option: Option, text: str) -> None:
    try:
        _parse(option, text, tmp_path, "")
    except pytest.UsageError as error:
        said = str(error)
    else:
        return
    assert said.startswith(f"{option.flag}: ")
    assert len(said.splitlines()) == 1
    said.encode()


@pytest.mark.parametrize("flag", ["--genmodel-config", "--genmodel-names", "--genmodel-expect"])
@given(content=CONTENTS)
@settings(NO_ENGINE, max_examples=80)
def test_any_content_of_a_file_is_read_or_refused(tmp_path: Path, flag: str, content: bytes) -> None:
    (option,) = (option for option in OPTIONS if option.flag == flag)
    path = tmp_path / ("file.json" if flag == "--genmodel-config" else "file.toml")
    path.write_bytes(content)
    with contextlib.suppress(pytest.UsageError):
        value = _parse(option, path.name, tmp_path, "")
        if flag == "--genmodel-expect":
            read_expectations(value)


@given(chosen=st.dictionaries(st.sampled_from([option.flag for option in OPTIONS]), TEXTS, min_size=1, max_size=3))
@example({"--genmodel-report": "a/b/c.json"})
@example({"--genmodel-save-evidence": "a\0b"})
@example({"--genmodel-timeout": "nan"})
@settings(NO_ENGINE, max_examples=40)
def test_a_run_gives_verdicts_or_one_line(pytester: pytest.Pytester, chosen: dict[str, str]) -> None:
    arguments = [f"{flag}={text}" for flag, text in {"--genmodel": "models:right", **chosen}.items()]
    result = pytester.runpytest_inprocess("-p", "fake_session", "-p", "no:cacheprovider", "-k", "interface", *arguments)
    shown = result.stdout.str() + result.stderr.str()
    assert "INTERNALERROR" not in shown
    assert "Traceback" not in shown
    assert result.ret in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.USAGE_ERROR)
    if result.ret == pytest.ExitCode.USAGE_ERROR:
        assert any(line.startswith("ERROR: ") for line in result.errlines)
