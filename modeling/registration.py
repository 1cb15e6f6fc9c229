"""Register any factory with vLLM so that every process vLLM starts knows it.

A class registered in the driver alone is unknown to spawned workers (vLLM #5657, #10238, #16228,
#18740). vLLM loads its `vllm.general_plugins` entry points in every process; ours reads what
`register_model` left in the environment, which spawned processes inherit and nobody else can read.
Importable targets travel by name; lambdas, closures and objects travel by value.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import os
import sys
import types
import zlib
from typing import Any

import cloudpickle

from genmodel.modeling import _vllm
from genmodel.modeling.lookup import no_attribute, no_module
from genmodel.modeling.wrapper import Factory, InterfaceError, as_model_class, describe

CHANNEL = "GENMODEL_REGISTERED_MODELS"
# Linux refuses an environment string above 128 KiB (MAX_ARG_STRLEN).
LARGEST_PAYLOAD = 120_000


def register_model(arch: str, target: Factory | str) -> None:
    """Make `architectures: [arch]` in a config.json mean `target`, here and in every vLLM process.

    Args:
        arch: the architecture's name in config.json.
        target: a class, function, lambda, closure, callable object or "module:attr".

    Raises:
        InterfaceError: if the target cannot be resolved, is not callable, asks for arguments nobody
            can supply, or closes over more data than can be handed to workers by value.
    """
    if not arch.isidentifier():
        raise InterfaceError(f"an architecture is named like a class, and {arch!r} is not")
    found: Any = resolve(target) if isinstance(target, str) else target
    model_class = as_model_class(found, name=arch)
    entries = _read_channel()
    entries[arch] = {"import": target} if isinstance(target, str) else _pack(found)
    payload = json.dumps(entries)
    if len(payload) > LARGEST_PAYLOAD:
        raise InterfaceError(
            f"{describe(found)} is {len(payload)} bytes by value, more than the {LARGEST_PAYLOAD} a worker can be "
            "handed: make it importable (module:attr), or close over paths instead of tensors"
        )
    os.environ[CHANNEL] = payload
    _vllm.register(arch, model_class)


def register_in_this_process() -> None:
    """Entry point of `vllm.general_plugins`: register what a parent process registered."""
    _vllm.register_config()
    for arch, entry in _read_channel().items():
        if "import" in entry:
            target = resolve(entry["import"])
        else:
            target = cloudpickle.loads(zlib.decompress(base64.b64decode(entry["value"])))
        _vllm.register(arch, as_model_class(target, name=arch))


def resolve(spec: str, *, callable_only: bool = True) -> Any:
    """The object that "module:attr" names; a callable, unless told otherwise.

    Raises:
        InterfaceError: one line that says which part is wrong and what would have been right.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise InterfaceError(f"{spec!r} should look like my_pkg.my_module:factory")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InterfaceError(
                f"importing {module_name} fails: it imports {error.name}, {_vllm.whereabouts(error.name or '')}"
            ) from error
        raise InterfaceError(no_module(error.name, _folders_around(error.name))) from None
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InterfaceError(no_attribute(module_name, part, dir(found)))
        found = getattr(found, part)
    if callable_only and not callable(found):
        raise InterfaceError(f"{spec} is a {type(found).__name__}, not something that builds a model when called")
    return found


def _folders_around(module_name: str) -> list[str]:
    """Those of the package that a module should be in."""
    return list(getattr(sys.modules.get(module_name.rpartition(".")[0]), "__path__", ()))


def _read_channel() -> dict[str, dict[str, str]]:
    entries: dict[str, dict[str, str]] = json.loads(os.environ.get(CHANNEL, "{}"))
    return entries


def _pack(target: Any) -> dict[str, str]:
    if isinstance(target, (type, types.FunctionType)) and target.__module__ != "__main__":
        module = sys.modules.get(target.__module__)
        found: Any = module
        for part in target.__qualname__.split("."):
            found = getattr(found, part, None)
        if found is target:
            return {"import": f"{target.__module__}:{target.__qualname__}"}
    try:
        data = cloudpickle.dumps(target)
    except Exception as error:  # pickling runs the objects' own code, which may raise anything
        raise InterfaceError(
            f"{describe(target)} cannot be handed to workers by value ({type(error).__name__}: {error}); "
            "make it importable (module:attr)"
        ) from error
    return {"value": base64.b64encode(zlib.compress(data, 9)).decode()}
