"""What docs/reliability.md promises is tested, and what the tree itself can show."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE)))

UNPICKLES = {"load", "loads", "Unpickler", "read_pickle", "recv"}
"""Calls of pickle, cloudpickle, torch and multiprocessing that run code for whoever wrote what they read."""
ALLOWED = {
    # bytes, which `wire` decodes
    ("runners/wire.py", "self._socket.recv"),
    # what the launcher and its pool send each other through a socket pair that no host has
    ("runners/launcher.py", "connection.recv"),
    ("runners/launcher.py", "self.connection.recv"),
    # a host's questions to the workers of its own deployed engine, and their answers
    ("runners/engine.py", "pickle.loads"),
    # a target by value: from pytest's process to a host, and on in the environment of what the host starts
    ("runners/commands.py", "cloudpickle.loads"),
    ("modeling/registration.py", "cloudpickle.loads"),
}
HARMLESS = ("json", "tomllib", "naming", "standalone", "checkpoint", "safetensors", "self.load", "loading")


def test_there_are_promises() -> None:
    assert len(NAMED) > 10


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_every_promise_names_a_test_that_exists(file: str, test: str) -> None:
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert test in functions


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("| Promise", "|---"))]
    assert [row for row in rows if not re.search(r"`tests/\w+\.py::\w+`", row)] == []


def test_nothing_is_unpickled_but_what_our_own_processes_send() -> None:
    """No call in the package reads a pickle from a file, and torch.load is not used at all."""
    found = set()
    for folder in ("fixtures", "conformance", "runners", "modeling", "reference_models"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in UNPICKLES:
                    called = ast.unparse(node.func)
                    if not called.startswith(HARMLESS):
                        found.add((str(path.relative_to(ROOT)), called))
    assert found == ALLOWED
