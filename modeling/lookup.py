"""What can be told of a "module:attr" without importing anything, so that a slip of the pen is told at once.

Importing may take a minute, for the author's module may import vLLM, and runs the author's code. Where a module is,
its finders know; what it binds, its source says. Whatever could also come about in another way is left to the import.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import pkgutil
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

_FAR = frozenset({"exec", "eval", "modules", "__path__"})
"""Names, and attributes such as sys.modules, by which a module can change what is found in and around it."""
_NEAR = _FAR | {"globals", "__dict__"}
"""By which it can bind what its source does not show."""


def mistake(spec: str) -> str | None:
    """One line that says why "module:attr" cannot be imported, or None if it can, or if only importing would tell."""
    module_name, _, attribute = spec.partition(":")
    try:
        chain = _chain(module_name)
        trees = [_tree(found) for found in chain]
    except _Undecided:
        return None
    except _Slip as slip:
        return str(slip)
    if _unsure(trees[:-1], _FAR) or _unsure(trees[-1:], _NEAR):
        return None
    found, tree, part = chain[-1], trees[-1], attribute.split(".")[0]
    assert tree is not None
    if "__getattr__" in (bound := _bound(tree)) or part in bound or part.startswith("__"):
        return None
    # what is around a module may put something into it
    around = (node for other in trees[:-1] if other is not None for node in ast.walk(other))
    if any(part in (getattr(node, "attr", None), getattr(node, "name", None)) for node in around):
        return None
    if found.submodule_search_locations is not None and _located(f"{module_name}.{part}", found) is not None:
        return None
    return no_attribute(module_name, part, bound)


def no_module(name: str, folders: Iterable[str] = ()) -> str:
    """What is said of a module that is not there; `folders` are those of the package it should be in, if any."""
    parent, _, last = name.rpartition(".")
    hint = _hint(last, [module.name for module in pkgutil.iter_modules(list(folders) if parent else None)])
    return (
        f"no module named {name!r}{f'{hint} Else' if hint else ':'} install it, or start with `python -m pytest`, "
        "which (unlike `pytest`) can import from the current directory"
    )


def no_attribute(module_name: str, part: str, names: Iterable[str]) -> str:
    """What is said of a module, or an object in it, that has other names than the one asked for."""
    return f"{module_name} has no attribute {part!r}{_hint(part, [n for n in names if not n.startswith('_')])}"


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


class _Undecided(Exception):
    """Only importing would tell."""


class _Slip(Exception):
    """It cannot be imported; the message is one line."""


def _chain(module_name: str) -> list[ModuleSpec]:
    """Where a module and all packages around it are, the outermost first."""
    chain: list[ModuleSpec] = []
    name = ""
    for part in module_name.split("."):
        name = f"{name}.{part}" if name else part
        found = _located(name, chain[-1] if chain else None)
        if found is None:
            # a package may have more than its files show
            if _unsure([_tree(package) for package in chain], _FAR):
                raise _Undecided
            raise _Slip(no_module(name, (chain[-1].submodule_search_locations or ()) if chain else ()))
        chain.append(found)
    return chain


def _located(name: str, package: ModuleSpec | None) -> ModuleSpec | None:
    """As the import system finds a module, but without importing the package around it."""
    if name in sys.modules:
        known: ModuleSpec | None = getattr(sys.modules[name], "__spec__", None)
        if known is None:
            raise _Undecided
        return known
    path = None if package is None else package.submodule_search_locations
    if package is not None and path is None:
        return None
    try:
        specs = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        return next((spec for spec in specs if spec is not None), None)
    except Exception:  # noqa: BLE001 - finders are anybody's code
        raise _Undecided from None


def _tree(found: ModuleSpec) -> ast.Module | None:
    """A module's source; None if it has none, such as one written in C."""
    if found.origin is None or not found.origin.endswith(".py"):
        return None
    try:
        return ast.parse(importlib.util.decode_source(Path(found.origin).read_bytes()))
    except SyntaxError as error:
        where = f"{Path(found.origin).name}, line {error.lineno}"
        raise _Slip(f"importing {found.name} fails: {type(error).__name__}: {error.msg} ({where})") from None
    except (OSError, ValueError, RecursionError):
        return None


def _unsure(trees: Iterable[ast.Module | None], means: Collection[str]) -> bool:
    """Whether one of some modules may do what cannot be read off it."""
    return any(tree is None or any(_is_dynamic(node, means) for node in ast.walk(tree)) for tree in trees)


def _is_dynamic(node: ast.AST, means: Collection[str]) -> bool:
    match node:
        case ast.ImportFrom(names=[ast.alias(name="*")]):
            return "globals" in means
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in means and not _is_method(node):
            return True
        case ast.Call(func=ast.Name(id="vars" | "locals"), args=[]):
            return "globals" in means
        case ast.Call(func=ast.Name(id="setattr"), args=[first, *_]):
            if not (isinstance(first, ast.Name) and first.id == "self"):
                return True
    return False


def _is_method(node: ast.AST) -> bool:
    """Whether it is something like model.eval or self.modules, rather than eval or sys.modules."""
    return isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "sys")


def _bound(tree: ast.Module) -> set[str]:
    """Every name that running a module may bind in it."""
    return {name for node in _own_nodes(tree) for name in _binds(node)} | {
        name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names
    }


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside of functions and classes, and those themselves."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _own_nodes(child)


def _binds(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.alias(name=name, asname=other):
            yield other or name.partition(".")[0]
        case (
            ast.FunctionDef(name=name)
            | ast.AsyncFunctionDef(name=name)
            | ast.ClassDef(name=name)
            | ast.ExceptHandler(name=str(name))
            | ast.MatchAs(name=str(name))
            | ast.MatchStar(name=str(name))
            | ast.MatchMapping(rest=str(name))
        ):
            yield name
