"""Mistyped names are told from finders and sources alone; what is right, or may be, is left to the import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from genmodel.modeling.lookup import mistake

PACKAGE = {
    "lookup_pkg/__init__.py": "raise RuntimeError('imported')",
    "lookup_pkg/plain.py": """
import torch, os.path as the_path
from typing import Any as Anything
def factory(): inner = 1; return inner
class Model:
    def __getattr__(self, name): return vars(self)[name]
    def fill(self, model): setattr(self, "x", 1); model.eval(); self.modules()
try: fast = True
except ImportError as problem: pass
for number in range(3): pass
with open(__file__) as file: pass
if (walrus := 3): left, *right = 1, 2
match walrus:
    case [first, *rest]: pass
    case {"a": 1, **others}: pass
    case whole: pass
def late():
    global from_inside
    from_inside = 1
""",
    "lookup_pkg/lazy.py": "def __getattr__(name): return name",
    "lookup_pkg/starred.py": "from os import *",
    "lookup_pkg/filled.py": "for name in 'ab': globals()[name] = 1",
    "lookup_pkg/stood_in.py": "import sys; sys.modules[__name__] = object()",
    "lookup_pkg/broken.py": "def factory(:\n    pass",
    "lookup_patched/__init__.py": "from lookup_patched import models; models.injected = 1",
    "lookup_patched/models.py": "",
    "lookup_moving/__init__.py": "__path__ = ['elsewhere']",
}
NAMES = (
    *("torch", "the_path", "Anything", "factory", "Model.build", "fast", "problem", "number", "file", "walrus"),
    *("left", "right", "first", "rest", "others", "whole", "from_inside", "__doc__"),
)
"""What plain.py binds, or may."""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "lookup_pgk.plain:factory",
            "no module named 'lookup_pgk'; did you mean lookup_pkg",
        ),
        ("nothing_like_it:factory", "no module named 'nothing_like_it': install it, or start with `python -m pytest`"),
        ("lookup_pkg.plian:factory", "no module named 'lookup_pkg.plian'; did you mean plain?"),
        ("lookup_pkg.plain.deeper:factory", "no module named 'lookup_pkg.plain.deeper'"),
        ("lookup_pkg.plain:factroy", "lookup_pkg.plain has no attribute 'factroy'; did you mean factory?"),
        ("lookup_pkg.plain:factroy.build", "lookup_pkg.plain has no attribute 'factroy'; did you mean factory?"),
        ("lookup_pkg.plain:inner", "lookup_pkg.plain has no attribute 'inner'"),
        ("lookup_pkg:factory", "lookup_pkg has no attribute 'factory'"),
        (
            "lookup_pkg.broken:factory",
            "importing lookup_pkg.broken fails: SyntaxError: invalid syntax (broken.py, line 1)",
        ),
    ],
)
def test_a_slip_is_told_without_importing(spec: str, message: str) -> None:
    assert (mistake(spec) or "").startswith(message)
    assert "lookup_pkg" not in sys.modules


@pytest.mark.parametrize(
    "spec",
    [
        *(f"lookup_pkg.plain:{name}" for name in NAMES),
        *("lookup_pkg:plain", "lookup_pkg.lazy:x", "lookup_pkg.starred:x", "lookup_pkg.filled:x"),
        *("lookup_pkg.stood_in:x", "lookup_patched.models:injected", "lookup_moving.x:y"),
        *("os:path", "math:nothing", "torch:nn", "torch.nn:Linear", "transformers:LlamaForCausalLM", "genmodel:x"),
        "genmodel.reference_models.dense:factory",
    ],
)
def test_what_may_be_right_is_left_to_the_import(spec: str) -> None:
    assert mistake(spec) is None


@pytest.mark.parametrize("option", ["--genmodel", "--genmodel-reference", "--genmodel-config", "--genmodel-names"])
def test_a_mistyped_name_costs_no_import_of_vllm(option: str) -> None:
    """Whatever is imported within pytest's own process, that is not it, and no host is started."""
    arguments = {"--genmodel": "bad_targets:raises", option: "bad_targets:rises"}
    command = [sys.executable, "-X", "importtime", "-m", "pytest", "-p", "no:cacheprovider"]
    command += [f"{name}={value}" for name, value in arguments.items()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    prefix = "" if option == "--genmodel" else f"{option}: "
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert [line for line in lines if line] == [
        f"ERROR: {prefix}bad_targets has no attribute 'rises'; did you mean raises?"
    ]
    assert "importing torch, vLLM and the target" not in done.stdout
    assert "| vllm\n" not in done.stderr
