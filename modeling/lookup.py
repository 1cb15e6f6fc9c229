"""What can be told of a name without importing anything, so that a slip of the pen is told at once.

Importing may take a minute, for the author's module may import vLLM, and runs the author's code. Where a module is,
its finders know; what it binds, its source says, and which architectures vLLM has, vLLM's. Whatever could also come
about in another way is left to the import.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

_FAR = frozenset({"exec", "eval", "modules", "__path__"})
"""Names, and attributes such as sys.modules, by which a module can change what is found in and around it."""
_NEAR = _FAR | {"globals", "__dict__"}
"""By which it can bind what its source does not show."""
_READING = frozenset({"get", "items", "keys", "values", "dict", "frozenset", "len", "list", "set", "sorted", "tuple"})
"""Methods, and functions, that leave a table as it is."""
_REGISTRY = "model_executor/models/registry.py", "_VLLM_MODELS"
"""Where vLLM lists its models: modeling/_vllm.py, which knows all else of it, imports torch."""


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
    found, part = chain[-1], attribute.split(".")[0]
    tree, known = _without_getter(trees[-1], part)
    if tree is None or _unsure(trees[:-1], _FAR) or _unsure([tree], _NEAR):
        return None
    if "__getattr__" in (bound := _bound(tree)) or part in bound or part.startswith("__"):
        return None
    # what is around a module may put something into it
    around = (node for other in trees[:-1] if other is not None for node in ast.walk(other))
    if any(part in (getattr(node, "attr", None), getattr(node, "name", None)) for node in around):
        return None
    if found.submodule_search_locations is not None and _located(f"{module_name}.{part}", found) is not None:
        return None
    return no_attribute(module_name, part, bound | known)


def unknown_architecture(name: str) -> str | None:
    """One line that says that vLLM has no model of that name, or None if it has, or if only importing would tell."""
    groups = ("vllm.general_plugins", "vllm.platform_plugins")
    plugins = (point for group in groups for point in importlib.metadata.entry_points(group=group))
    if any(not plugin.value.startswith(("genmodel.", "vllm.")) for plugin in plugins):
        return None  # others' may bring models of their own
    try:
        known = architectures()
    except _Undecided:
        return None
    return None if name in known else no_architecture(name, known)


def architectures() -> frozenset[str]:
    """The names of all models in the source of the installed vLLM; raises _Undecided where that does not say."""
    found = _located("vllm", None)
    where, table = _REGISTRY
    try:
        (folder,) = [] if found is None else found.submodule_search_locations or []
        return frozenset(_keys(_tables(ast.parse(Path(folder, where).read_text(encoding="utf-8"))), table))
    except (OSError, ValueError, SyntaxError):
        raise _Undecided from None


def no_architecture(name: str, known: Collection[str]) -> str:
    """What is said of an architecture that is none of those that vLLM has."""
    owners = importlib.metadata.packages_distributions().get("vllm", ())
    version = f" {importlib.metadata.version(owners[0])}" if owners else ""
    hint = _hint(name, known).removeprefix("; ")
    said = f"vLLM{version} has no architecture {name}: {hint}{' A' if hint else 'a'}"
    return f"{said} model of your own is my_pkg.my_module:factory"


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


def _without_getter(tree: ast.Module | None, part: str) -> tuple[ast.Module | None, set[str]]:
    """A module less its `__getattr__` and the names that one knows, if that refuses this one; else all of the module.

    What it does when it is asked for others does not matter then.
    """
    getters = [] if tree is None else [node for node in tree.body if getattr(node, "name", None) == "__getattr__"]
    match getters:
        case [ast.FunctionDef(args=ast.arguments(args=[ast.arg(arg=asked)]), decorator_list=[]) as getter] if tree:
            rest = ast.Module([node for node in tree.body if node is not getter], [])
            question = _Question(asked, part, _constant_tables(rest), set())
            if question.refused(getter.body):
                return rest, question.known
    return tree, set()


@dataclass(frozen=True, slots=True)
class _Question:
    """What a module's `__getattr__` does when asked for a name, as far as it compares that with constants."""

    asked: str
    """What it calls the name."""
    part: str
    tables: Mapping[str, ast.expr]
    known: set[str]
    """Names that it was compared with."""

    def refused(self, body: Iterable[ast.stmt]) -> bool | None:
        """Whether these statements raise AttributeError, or may return something; None if neither."""
        for statement in body:
            match statement:
                case ast.Expr(ast.Constant()) | ast.Import() | ast.ImportFrom():
                    continue
                case ast.Raise(exc=ast.Name(id="AttributeError") | ast.Call(func=ast.Name(id="AttributeError"))):
                    return True
                case ast.If(test=test, body=then, orelse=other) if (met := self.met(test)) is not None:
                    if (outcome := self.refused(then if met else other)) is not None:
                        return outcome
                case _:
                    return False
        return None

    def met(self, test: ast.expr) -> bool | None:
        """Whether a condition holds; None if there is no telling."""
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return None if (met := self.met(operand)) is None else not met
            case ast.Compare(left=ast.Name(id=self.asked), ops=[ast.Eq() | ast.In() as op], comparators=[other]):
                return self._among(other, equal=isinstance(op, ast.Eq))
            case ast.Compare(left=ast.Name(id=self.asked), ops=[ast.NotEq() | ast.NotIn() as op], comparators=[other]):
                found = self._among(other, equal=isinstance(op, ast.NotEq))
                return None if found is None else not found
        return None

    def _among(self, other: ast.expr, *, equal: bool) -> bool | None:
        try:
            if isinstance(other, ast.Constant):
                names = {other.value} if equal and isinstance(other.value, str) else None
            else:
                names = None if equal else set(_names(self.tables, other))
        except _Undecided:
            return None
        if names is None:
            return None
        self.known.update(names)
        return self.part in names


def _tables(tree: ast.Module) -> dict[str, ast.expr]:
    """What the names that a module assigns are given, outside of functions and classes and all else."""
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


def _constant_tables(tree: ast.Module) -> dict[str, ast.expr]:
    """Those that nothing else in the module assigns, or may change."""
    stored = Counter(name for node in ast.walk(tree) for name in _binds(node))
    changed = {name for node in ast.walk(tree) for name in _may_change(node)}
    return {name: value for name, value in _tables(tree).items() if stored[name] == 1 and name not in changed}


def _may_change(node: ast.AST) -> Iterator[str]:
    match node:
        case (
            ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del())
            | ast.AugAssign(target=ast.Name(id=name))
        ):
            yield name
        case ast.Assign(value=ast.Name(id=name)):  # under another name
            yield name
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method not in _READING:
            yield name
    if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _READING):
        yield from (argument.id for argument in node.args if isinstance(argument, ast.Name))


def _keys(tables: Mapping[str, ast.expr], name: str) -> Iterator[str]:
    if name not in tables:
        raise _Undecided
    return _names(tables, tables[name])


def _names(tables: Mapping[str, ast.expr], value: ast.expr) -> Iterator[str]:
    """What is in a collection of names, or more than that; raises _Undecided if its source does not show it."""
    match value:
        case ast.Name(id=name):
            yield from _keys(tables, name)
        case ast.Dict(keys=keys, values=values):
            for key, part in zip(keys, values, strict=True):
                yield from _names(tables, part) if key is None else _name(key)
        case ast.DictComp(
            key=ast.Name(id=key),
            generators=[
                ast.comprehension(
                    target=ast.Tuple(elts=[ast.Name(id=first), _]),
                    iter=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="items")),
                )
            ],
        ) if key == first:
            yield from _keys(tables, name)
        case ast.Set(elts=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts):
            for part in parts:
                yield from _names(tables, part.value) if isinstance(part, ast.Starred) else _name(part)
        case _:
            raise _Undecided


def _name(node: ast.expr) -> Iterator[str]:
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        raise _Undecided
    yield node.value
