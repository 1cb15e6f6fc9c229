"""Turn any factory into the class vLLM builds models from.

vLLM instantiates a *class* with `(vllm_config=..., prefix=...)` and asks the instance for
`embed_input_ids`, `forward` and `compute_logits`. An author has a *factory*. `as_model_class` closes
the gap: it passes a factory the arguments its signature names, checks what came back once and
completely, and delegates everything else.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import nn

from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import ParallelContext

Factory = Callable[..., nn.Module]

REQUIRED_METHODS = {
    "embed_input_ids": "embed_input_ids(input_ids) -> [tokens, hidden]",
    "forward": "forward(input_ids, positions) -> [tokens, hidden]",
    "compute_logits": "compute_logits(hidden_states) -> [tokens, vocab]",
}
# Keyword arguments vLLM passes to forward; a model need only name the first two.
FORWARD_KEYWORDS = ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")


class InterfaceError(TypeError):
    """A target or the model it builds lacks something vLLM needs; the message lists all of it."""


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` can be called with the keyword argument `name`."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return True
    found = parameters.get(name)
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


def factory_arguments(
    target: Factory, vllm_config: Any, parallel_context: ParallelContext, prefix: str = ""
) -> dict[str, Any]:
    """The keyword and positional arguments `target` is called with, as {name: value} in its own order.

    Arguments are matched by name (`vllm_config`, `parallel_context`, `prefix`); required arguments of
    other names take what is left of `(vllm_config, parallel_context)` in that order, so that
    `lambda cfg, ctx: ...` works.

    Raises:
        InterfaceError: if a required argument is left without a value.
    """
    known = {"vllm_config": vllm_config, "parallel_context": parallel_context, "prefix": prefix}
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError) as error:
        raise InterfaceError(f"{describe(target)} has no readable signature ({error}); wrap it in a function") from None
    spare = [v for k, v in known.items() if k != "prefix" and k not in {p.name for p in parameters}]
    chosen: dict[str, Any] = {}
    missing: list[str] = []
    for p in parameters:
        if p.kind is p.VAR_KEYWORD or p.kind is p.VAR_POSITIONAL:
            continue
        if p.name in known:
            chosen[p.name] = known[p.name]
        elif p.default is p.empty:
            if spare:
                chosen[p.name] = spare.pop(0)
            else:
                missing.append(p.name)
    if missing:
        raise InterfaceError(
            f"{describe(target)} needs {', '.join(missing)}, which nobody can supply: "
            "a factory takes (vllm_config, parallel_context) or fewer"
        )
    return chosen


def call_factory(target: Factory, vllm_config: Any, parallel_context: ParallelContext, prefix: str = "") -> nn.Module:
    """Build the model, or say in one line why what was built is not one.

    Raises:
        InterfaceError: on an impossible signature or a result that is not an `nn.Module` instance.
        Exception: whatever the factory itself raises.
    """
    chosen = factory_arguments(target, vllm_config, parallel_context, prefix)
    positional_only = {p.name for p in inspect.signature(target).parameters.values() if p.kind is p.POSITIONAL_ONLY}
    model = target(
        *(v for k, v in chosen.items() if k in positional_only),
        **{k: v for k, v in chosen.items() if k not in positional_only},
    )
    if isinstance(model, nn.Module):
        return model
    if model is None:
        got = "None (is its `return` missing?)"
    elif isinstance(model, type):
        got = f"the class {model.__name__}, not an instance (call it: `{model.__name__}(...)`)"
    else:
        got = f"a {type(model).__name__}"
    raise InterfaceError(f"{describe(target)} returned {got}; it must return a torch.nn.Module")


def describe(target: object) -> str:
    """How messages call a target: `factory my_pkg.models.build`."""
    kind = "class" if isinstance(target, type) else "factory"
    name = getattr(target, "__qualname__", None) or type(target).__qualname__
    module = getattr(target, "__module__", None)
    return f"{kind} {module}.{name}" if module else f"{kind} {name}"


def embedding_method(model: object) -> Callable[..., Any] | None:
    """The model's `input_ids -> [tokens, hidden]` method: `embed_input_ids`, or its older name.

    Before vLLM 0.12 the method was `get_input_embeddings(input_ids)`; Hugging Face's method of that
    name takes nothing and returns the embedding module. All three are accepted.
    """
    method: Any = getattr(model, "embed_input_ids", None)
    return cast("Callable[..., Any]", method) if callable(method) else _older_embedding_method(model)


def _older_embedding_method(model: object) -> Callable[..., Any] | None:
    method: Any = getattr(model, "get_input_embeddings", None)
    if not callable(method):
        return None
    if any(p.default is p.empty for p in inspect.signature(method).parameters.values()):
        return cast("Callable[..., Any]", method)
    return cast("Callable[..., Any]", method())


def interface_problems(model: nn.Module) -> list[str]:
    """Everything a built model lacks of vLLM's text-generation interface, one sentence each."""
    return [*([] if embedding_method(model) is not None else [_NO_EMBEDDING]), *_other_problems(model)]


def class_problems(model_class: type[nn.Module]) -> list[str]:
    """The same of a vLLM-style class, before anything is built."""
    embeds = any(callable(getattr(model_class, name, None)) for name in ("embed_input_ids", "get_input_embeddings"))
    return [*([] if embeds else [_NO_EMBEDDING]), *_other_problems(model_class)]


_NO_EMBEDDING = f"no {REQUIRED_METHODS['embed_input_ids']} (nor the older get_input_embeddings)"


def _other_problems(model: nn.Module | type[nn.Module]) -> list[str]:
    problems = []
    defines = model if isinstance(model, type) else type(model)
    if defines.forward is nn.Module.forward:
        problems.append(f"no {REQUIRED_METHODS['forward']}")
    else:
        lacking = [name for name in FORWARD_KEYWORDS[:2] if not accepts(model.forward, name)]
        if lacking:
            problems.append(
                f"forward{inspect.signature(model.forward)} cannot take the keyword{'s'[: len(lacking) - 1]} "
                f"{' and '.join(lacking)}; want {REQUIRED_METHODS['forward']}"
            )
    if not callable(getattr(model, "compute_logits", None)):
        problems.append(f"no {REQUIRED_METHODS['compute_logits']}")
    return problems


class CallableModelWrapper(nn.Module):
    """What vLLM instantiates for a registered factory; subclasses made by `as_model_class` set `target`.

    Everything but vLLM's interface is delegated to the built model, held as `model`.
    """

    target: ClassVar[Any] = None  # in a tuple, so that a plain function is not bound as a method

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        target = type(self).target[0]
        context = ParallelContext.from_config(vllm_config.parallel_config)
        self.model = call_factory(target, vllm_config, context, prefix)
        problems = interface_problems(self.model)
        if problems:
            raise InterfaceError(
                f"the {type(self.model).__name__} built by {describe(target)} does not have vLLM's interface: "
                + "; ".join(problems)
            )
        if not callable(getattr(self.model, "load_weights", None)):
            warnings.warn(
                f"{type(self.model).__name__} has no load_weights; genmodel's default one is used: "
                "strict about names, sharded by weight_loader or declared partition",
                stacklevel=2,
            )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, [tokens] -> [tokens, hidden]."""
        method = embedding_method(self.model)
        assert method is not None  # held by __init__
        embedded: torch.Tensor = method(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        """Hidden states [tokens, hidden]; passes on only what the model's own forward can take.

        Raises:
            InterfaceError: if vLLM sends something the model has no argument for.
        """
        arguments = {"intermediate_tensors": intermediate_tensors, "inputs_embeds": inputs_embeds, **extra}
        passed = {name: value for name, value in arguments.items() if accepts(self.model.forward, name)}
        lost = [name for name, value in arguments.items() if value is not None and name not in passed]
        if lost:
            raise InterfaceError(
                f"vLLM passes {', '.join(lost)} but {type(self.model).__name__}.forward"
                f"{inspect.signature(self.model.forward)} cannot take it"
            )
        hidden: torch.Tensor = self.model(input_ids=input_ids, positions=positions, **passed)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [tokens, vocab] of hidden states [tokens, hidden]."""
        method: Any = self.model.compute_logits
        # Up to vLLM 0.10 the method took the sampling metadata too; nobody read it.
        logits: torch.Tensor | None = method(hidden_states, None) if _requires(method, 2) else method(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load checkpoint tensors by the model's own `load_weights`, or by genmodel's strict default.

        Returns the names of the parameters loaded, with this wrapper's `model.` in front.
        """
        own = getattr(self.model, "load_weights", None)
        loaded = own(weights) if callable(own) else load_weights(self.model, weights)
        if loaded is None:  # nothing was tracked, so vLLM's missing-weight guard must not count
            return None  # type: ignore[return-value]
        return {f"model.{name}" for name in loaded}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not built yet: do not recurse
                raise
            return getattr(self.model, name)


def _requires(method: Callable[..., Any], count: int) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return (
        sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        >= count
    )


def as_model_class(target: Factory | str, name: str | None = None) -> type[nn.Module]:
    """The nn.Module class for vLLM's `ModelRegistry.register_model(arch, cls)`.

    A vLLM-style class, one whose constructor takes `vllm_config` and `prefix`, is returned as it is, or as a subclass
    of the same name that has `embed_input_ids` where it has only the older `get_input_embeddings`; anything else is
    wrapped in a `CallableModelWrapper`.

    Args:
        target: a class, function, lambda, closure, callable object or "module:attr".
        name: the class's name in logs; by default derived from the target.

    Raises:
        InterfaceError: if the target is not callable, its signature asks for too much, or a vLLM-style class lacks
            methods.
    """
    if isinstance(target, str):
        from genmodel.modeling.registration import resolve

        target = resolve(target)
    if not callable(target):
        raise InterfaceError(f"a target must be callable, and {target!r} is a {type(target).__name__}")
    if isinstance(target, type) and is_vllm_style(target):
        problems = class_problems(target)
        if problems:
            raise InterfaceError(f"{describe(target)} does not have vLLM's interface: {'; '.join(problems)}")
        return target if hasattr(target, "embed_input_ids") else _embedding_by_old_name(target)
    factory_arguments(target, None, ParallelContext())
    name = name or getattr(target, "__name__", type(target).__name__).replace("<lambda>", "Lambda")
    # What a factory declares for vLLM (supports_pp, supports_lora, ...) vLLM reads from the class.
    declared = {key: value for key, value in getattr(target, "__dict__", {}).items() if key.startswith("supports_")}
    return type(name, (CallableModelWrapper,), {"target": (target,), "__module__": __name__, **declared})


def _embedding_by_old_name(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass with `embed_input_ids`, which vLLM asks for, that in all else passes for the class itself."""

    def embed_input_ids(self: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, [tokens] -> [tokens, hidden]."""
        method = _older_embedding_method(self)
        assert method is not None  # the class has it
        embedded: torch.Tensor = method(input_ids)
        return embedded

    same = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (model_class,), {**same, "embed_input_ids": embed_input_ids})


def placeholder(target: type[nn.Module], name: str) -> type[nn.Module]:
    """A class that vLLM takes for complete, whatever the target lacks: to read a config by, not to run."""
    return type(name, (CallableModelWrapper,), {"target": (target,), "__module__": __name__})


def is_vllm_style(target: object) -> bool:
    """Whether `target` is a class vLLM can instantiate itself: `(vllm_config=..., prefix=...)`."""
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        return False
    names = inspect.signature(target).parameters
    return "vllm_config" in names and "prefix" in names
