"""Mistyped names are told from finders and sources alone; what is right, or may be, is left to the import."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from genmodel.modeling import lookup
from genmodel.modeling.lookup import mistake, unknown_architecture

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
    "lookup_pkg/getter.py": """
import importlib
_HOME = {"factory": "lookup_pkg.plain", **{"build": "lookup_pkg.plain"}}
_MORE: tuple = ("other", *_HOME)
__all__ = sorted(_HOME)
def __getattr__(name):
    'On first use.'
    import sys
    if not name in _MORE:
        raise AttributeError(name)
    if name == "single":
        return 1
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
""",
    "lookup_pkg/chosen.py": """
def __getattr__(name):
    if name == "factory":
        return print
    elif name != "other":
        raise AttributeError
""",
    **{
        f"lookup_pkg/open_{number}.py": f"""
HOME = {{"factory": 1}}
{change}
def __getattr__(name):
    if name in HOME:
        return HOME[name]
    raise {error}
"""
        for number, (change, error) in enumerate(
            [
                ("HOME['x'] = 1", "AttributeError(name)"),
                ("HOME.update(x=1)", "AttributeError(name)"),
                ("HOME |= {'x': 1}", "AttributeError(name)"),
                ("print(HOME)", "AttributeError(name)"),
                ("other = HOME", "AttributeError(name)"),
                ("HOME = {str(1): 1}", "AttributeError(name)"),
                ("from os import path as HOME", "AttributeError(name)"),
                ("def __getattr__(name): return name", "AttributeError(name)"),
                ("globals()", "AttributeError(name)"),
                ("", "ImportError(name)"),
            ]
        )
    },
    "lookup_pkg/guarded.py": """
def __getattr__(name):
    try:
        return globals()["_" + name]
    except KeyError:
        raise AttributeError(name)
""",
    "lookup_pkg/prefixed.py": """
def __getattr__(name):
    if name.startswith("make_"):
        return print
    raise AttributeError(name)
""",
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
        ("lookup_pkg.getter:factroy", "lookup_pkg.getter has no attribute 'factroy'; did you mean factory?"),
        ("lookup_pkg.chosen:otter", "lookup_pkg.chosen has no attribute 'otter'; did you mean other?"),
        ("genmodel:as_model_clas", "genmodel has no attribute 'as_model_clas'; did you mean as_model_class?"),
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
        *(
            "lookup_pkg.getter:factory",
            "lookup_pkg.getter:build",
            "lookup_pkg.getter:other",
            "lookup_pkg.getter:__all__",
        ),
        *("lookup_pkg.chosen:factory", "lookup_pkg.chosen:other", "lookup_pkg.guarded:x", "lookup_pkg.prefixed:x"),
        *(f"lookup_pkg.open_{number}:x" for number in range(10)),
        *("lookup_pkg.stood_in:x", "lookup_patched.models:injected", "lookup_moving.x:y"),
        *(
            "os:path",
            "math:nothing",
            "torch:nn",
            "torch.nn:Linear",
            "transformers:LlamaForCausalLM",
            "genmodel:check_model",
        ),
        "genmodel.reference_models.dense:factory",
    ],
)
def test_what_may_be_right_is_left_to_the_import(spec: str) -> None:
    assert mistake(spec) is None


def test_an_architecture_that_vllm_does_not_have() -> None:
    said = unknown_architecture("LlamaForCasualLM")
    assert re.fullmatch(
        r"vLLM [\d.]+\S* has no architecture LlamaForCasualLM: did you mean LlamaForCausalLM( or \w+)*\? "
        "A model of your own is my_pkg.my_module:factory",
        said or "",
    )
    assert unknown_architecture("LlamaForCausalLM") is None


def test_other_packages_may_bring_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        plugin = EntryPoint("other", "other_pkg:register", group)
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda plugin=plugin, **wanted: [plugin] if plugin.matches(**wanted) else [],
        )
        assert unknown_architecture("LlamaForCasualLM") is None


@pytest.mark.parametrize(
    "source",
    ["", "_VLLM_MODELS = {**_OTHER}", "_VLLM_MODELS = dict(a=1)", "_VLLM_MODELS = {1: 2}", "_VLLM_MODELS = {", None],
)
def test_a_vllm_that_lists_its_models_otherwise(
    source: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or that is not there."""
    registry = tmp_path / "model_executor" / "models" / "registry.py"
    registry.parent.mkdir(parents=True)
    if source is not None:
        registry.write_text(source)
    found = ModuleSpec("vllm", None, is_package=True)
    found.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(lookup, "_located", lambda *_: found)
    assert unknown_architecture("LlamaForCasualLM") is None
    monkeypatch.setattr(lookup, "_located", lambda *_: None)
    assert unknown_architecture("LlamaForCasualLM") is None


@pytest.mark.parametrize("option", ["--genmodel", "--genmodel-reference", "--genmodel-config", "--genmodel-names"])
def test_a_mistyped_name_costs_no_import_of_vllm(option: str) -> None:
    """Whatever is imported within pytest's own process, that is not it, and no host is started."""
    arguments = {"--genmodel": "bad_targets:raises", option: "bad_targets:rises"}
    prefix = "" if option == "--genmodel" else f"{option}: "
    assert_refused_without_vllm(arguments, f"{prefix}bad_targets has no attribute 'rises'; did you mean raises?")


def test_nor_does_a_mistyped_architecture() -> None:
    said = unknown_architecture("LlamaForCasualLM")
    assert said is not None
    assert_refused_without_vllm({"--genmodel": "LlamaForCasualLM"}, said)


def assert_refused_without_vllm(arguments: dict[str, str], message: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pytest", "-p", "no:cacheprovider"]
    command += [f"{name}={value}" for name, value in arguments.items()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert [line for line in lines if line] == [f"ERROR: {message}"]
    assert "importing torch, vLLM and the target" not in done.stdout
    assert "| vllm\n" not in done.stderr
