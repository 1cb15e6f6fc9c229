"""What a target is and what it builds, found out without any engine."""

from __future__ import annotations

import inspect
import json
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from genmodel.modeling import _vllm
from genmodel.modeling.attention import TrainableAttention
from genmodel.modeling.wrapper import (
    InterfaceError,
    accepts,
    as_model_class,
    describe,
    embedding_method,
    interface_problems,
    is_vllm_style,
)
from genmodel.runners import standalone
from genmodel.runners.evidence import AttentionInfo, Inspection, ParameterInfo, Probe
from genmodel.runners.protocol import Unusable

PROBE_TOKENS = 7
TOO_FEW = "there is nothing to choose between with fewer than 2 tokens"


def kind(target: object) -> str:
    """How reports call what an author registered."""
    if is_vllm_style(target):
        return "vLLM-style class"
    if isinstance(target, type):
        return "class"
    if isinstance(target, types.FunctionType):
        return "lambda" if target.__name__ == "<lambda>" else "function"
    return "callable object"


def inspect_target(
    target: Any, model_dir: str, arch: str, *, reads_config: bool = False, is_reference: bool = False
) -> tuple[Inspection, dict[str, Any]]:
    """Build the target twice in plain PyTorch and call its methods once.

    Args:
        target: the factory or class.
        model_dir: what config.json is read from.
        arch: the name it is registered under.
        reads_config: whether it is known to follow its config, as vLLM's own architectures do.
        is_reference: whether the target is its own reference, and so must be one that can be evaluated.

    Returns:
        The inspection, and the settings of config.json that the model turned out not to follow, with
        the model's own values: empty for a model that reads its config.

    Raises:
        InterfaceError: if the model has no parameters.
        Unusable: if it has no vocabulary, or must be evaluated and cannot be.
        Exception: whatever building raises.
    """
    config = _vllm.model_config(model_dir, "float32")
    hf_config = config.model_config.hf_config
    if hf_config.vocab_size < 2:
        raise Unusable(f"vocab_size is {hf_config.vocab_size}: {TOO_FEW}")
    with _Explained(hf_config), standalone.build(target, config, torch.float32) as first:
        if is_reference:
            first.must_be_evaluated()
        # Parameters made with torch.empty hold whatever was in memory, NaN and traps included.
        for parameter in first.model.parameters():
            torch.nn.init.normal_(parameter.data, std=0.05)
        parameters = _parameters(first.model)
        if not parameters:
            raise InterfaceError(
                f"the {type(first.model).__name__} built by {describe(target)} has no parameters: make its layers in "
                "__init__ and assign them to self, so that weights can be loaded"
            )
        problems = interface_problems(first.model)
        probed = _probe(first)
        kept = _Kept.of(first.model)
        tensors = {name: weakref.ref(p) for name, p in first.model.named_parameters(remove_duplicate=False)}
        model_type = str(hf_config.model_type)
        attention = tuple(
            replace(layer, refused=_vllm.refuses_layer_name(layer.prefix, model_type))
            for layer in attention_layers(first.model)
        )
        unregistered = tuple(_unregistered(first.model))
        model_class = f"{type(first.model).__module__}.{type(first.model).__qualname__}"
        native, compiles = first.native, _vllm.compiles(first.model)
        configured = int(config.model_config.max_model_len)
        limit = _longest(first, configured)
        takes_embeddings = accepts(first.model.forward, "inputs_embeds")
    with standalone.build(target, _vllm.model_config(model_dir, "float32"), torch.float32) as second:
        rebuilt = _parameters(second.model)
        again = second.model.named_parameters(remove_duplicate=False)
        shared = tuple(name for name, parameter in again if name in tensors and tensors[name]() is parameter)
        difference, buffers = _compare_builds(second, kept, probed)
    embed, forward, logits = probed.embed, probed.forward, probed.logits
    geometry = {} if reads_config else _geometry(hf_config, embed, logits, attention, limit)
    ignores = False
    if geometry:
        # A model that pads its logits differs from the config too; only one whose shapes do not move
        # with the config at all does not read it.
        hidden, vocab = hf_config.hidden_size, hf_config.vocab_size
        moved = _build_parameters(target, model_dir, hidden_size=2 * hidden, vocab_size=vocab + 64)
        ignores = moved is not None and moved == rebuilt
    if not ignores:
        geometry = {}
    try:
        model_class_for_vllm = as_model_class(target, name=arch)
    except InterfaceError:
        model_class_for_vllm = target  # a vLLM-style class that lacks methods: `problems` has them
    accepted, said = _vllm.is_text_generation_model(model_class_for_vllm)
    no_prefix_caching, no_chunked_prefill = _vllm.turned_off(model_dir)
    if geometry.get("vocab_size", 2) < 2:
        raise InterfaceError(f"compute_logits gives {geometry['vocab_size']} logits for each token: {TOO_FEW}")
    return Inspection(
        kind=kind(target),
        signature=f"{getattr(target, '__name__', type(target).__name__)}{inspect.signature(target)}",
        model_class=model_class,
        native=native,
        problems=tuple(problems),
        vllm_accepts=accepted,
        vllm_says=said,
        parameters=parameters,
        rebuilt_parameters=rebuilt,
        rebuilt_shared=shared,
        unregistered=unregistered,
        attention=attention,
        embed=embed,
        forward=forward,
        logits=logits,
        probe_tokens=PROBE_TOKENS,
        hidden_size=geometry.get("hidden_size", hf_config.hidden_size),
        vocab_size=geometry.get("vocab_size", hf_config.vocab_size),
        max_positions=geometry.get("max_position_embeddings", configured),
        supports_pipeline=_vllm.supports_pipeline(model_class_for_vllm),
        compiles=compiles,
        captures=_vllm.captures_graphs(),
        ignores_config=ignores,
        ties_embeddings=json.loads(Path(model_dir, "config.json").read_text()).get("tie_word_embeddings"),
        takes_embeddings=takes_embeddings,
        embeds=probed.embeds,
        embeds_difference=probed.embeds_difference,
        changed_arguments=tuple(dict.fromkeys(probed.changed)),
        rebuilt_difference=difference,
        rebuilt_buffers=buffers,
        no_prefix_caching=no_prefix_caching,
        no_chunked_prefill=no_chunked_prefill,
        notes=tuple(
            f"{name} is {value}, taken from the model: it does not read its config" for name, value in geometry.items()
        ),
    ), geometry


class _Explained:
    """Turn an AttributeError on the config into what the author can do about it."""

    def __init__(self, hf_config: Any) -> None:
        self._config = hf_config

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, AttributeError) and error.obj is self._config:
            said = {"architectures", "dtype", "transformers_version", "model_type"}
            config: Any = self._config
            names = sorted(name for name in config.to_diff_dict() if name not in said)
            raise InterfaceError(
                f"the model reads config.{error.name}, which the config does not have: name one that has it with "
                f"--genmodel-config=FILE.json (this one has {', '.join(names)})"
            ) from None


def _build_parameters(target: Any, model_dir: str, **overrides: int) -> dict[str, ParameterInfo] | None:
    """Names and shapes of a build of another geometry; None if a config so changed cannot be built."""
    config = _vllm.model_config(model_dir, "float32")
    for name, value in overrides.items():
        setattr(config.model_config.hf_config, name, value)
    try:
        with standalone.build(target, config, torch.float32) as built:
            return _parameters(built.model)
    except Exception:  # noqa: BLE001 - however it refuses
        return None  # a model may refuse a changed geometry, which also shows that it reads it


def _parameters(model: nn.Module) -> dict[str, ParameterInfo]:
    return {
        name: ParameterInfo(
            shape=tuple(p.shape), dtype=str(p.dtype).removeprefix("torch."), requires_grad=p.requires_grad
        )
        for name, p in model.named_parameters(remove_duplicate=False)
    }


class _Reads(TorchFunctionMode):
    """Which of a model's parameters are read while this is entered, by all their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._named = list(model.named_parameters(remove_duplicate=False))
        self._seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen |= {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, nn.Parameter)}
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, parameter in self._named if id(parameter) in self._seen)


@dataclass(slots=True, kw_only=True)
class _Probed:
    """What calling a model's methods once gave."""

    embed: Probe
    forward: Probe
    logits: Probe
    scores: Any
    """What compute_logits returned, if anything."""
    embeds: Probe | None = None
    embeds_difference: float | None = None
    changed: list[str] = field(default_factory=list)


def _probe(built: standalone.Standalone) -> _Probed:
    n, model = PROBE_TOKENS, cast("Any", built.model)
    changed: list[str] = []

    def call(name: str, shown: str, function: Callable[..., Any], **given: Any) -> tuple[Probe, Any]:
        tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
        before = {key: value.clone() for key, value in tensors.items()}
        found = _call(shown, lambda: function(**given))
        changed.extend(f"{key} by {name}" for key, value in tensors.items() if not same(value, before[key]))
        return found

    def embed_ids(input_ids: torch.Tensor) -> Any:
        return _embedding(model)(input_ids)

    def score(hidden_states: Any) -> Any:
        return model.compute_logits(hidden_states)

    def ids() -> torch.Tensor:
        return torch.arange(n)

    with _Reads(built.model) as reads:
        embed, embedded = call("embed_input_ids", f"embed_input_ids(input_ids[{n}])", embed_ids, input_ids=ids())
    embed = replace(embed, reads=reads.names)
    shown = f"forward(input_ids=[{n}], positions=[{n}])"
    torch.manual_seed(n)  # so that what is drawn in forward is not what differs
    forward, hidden = call("forward", shown, model, input_ids=ids(), positions=ids())
    embeds: Probe | None = None
    difference: float | None = None
    if embed.shape is not None and accepts(model.forward, "inputs_embeds"):
        shown = f"forward(input_ids=None, positions=[{n}], inputs_embeds=[{n}, hidden])"
        torch.manual_seed(n)
        embeds, again = call("forward", shown, model, input_ids=None, positions=ids(), inputs_embeds=embedded)
        difference = _difference(again, hidden) if _computes(built.model) else None
    with _Reads(built.model) as reads:
        shown = f"compute_logits(hidden_states[{n}, hidden])"
        logits, scores = call("compute_logits", shown, score, hidden_states=hidden)
    return _Probed(
        embed=embed,
        forward=forward,
        logits=replace(logits, reads=reads.names),
        scores=scores,
        embeds=embeds,
        embeds_difference=difference,
        changed=changed,
    )


def _computes(model: nn.Module) -> bool:
    """Whether results mean something outside an engine: vLLM's state-space layers return uninitialised memory there."""
    return all(hasattr(getattr(m, "impl", None), "scale") for m in model.modules() if _vllm.is_attention(m))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """To the last bit, and NaN is itself."""
    return (
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())
    )


def _difference(ours: Any, theirs: Any) -> float | None:
    """Largest |ours - theirs|; None unless both are tensors of one shape."""
    if not (isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)) or ours.shape != theirs.shape:
        return None
    if same(ours, theirs):
        return 0.0
    return float((ours.double() - theirs.double()).abs().max())


@dataclass(frozen=True, slots=True)
class _Kept:
    """A build's state: what a checkpoint has, and the buffers that none has."""

    saved: Mapping[str, torch.Tensor]
    unsaved: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> _Kept:
        state = model.state_dict(keep_vars=True)
        saved = {name: _local(tensor) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        buffers = {name: _local(buffer) for name, buffer in model.named_buffers() if name not in saved}
        return cls(
            {name: tensor.detach().clone() for name, tensor in saved.items()},
            {name: tensor.detach().clone() for name, tensor in buffers.items()},
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a distributed tensor; there is one rank, so all of it."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else cast("torch.Tensor", part())


def _compare_builds(
    second: standalone.Standalone, first: _Kept, probed: _Probed
) -> tuple[float | None, tuple[str, ...]]:
    """How far a second build with the first one's weights is from it, and which of its buffers differ."""
    unsaved = _Kept.of(second.model).unsaved
    different = tuple(
        name for name in first.unsaved.keys() & unsaved.keys() if not same(first.unsaved[name], unsaved[name])
    )
    state = {n: _local(t) for n, t in second.model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (state, first.saved))
    if not _computes(second.model) or len({tuple(sorted(found.items())) for found in shapes}) > 1:
        return None, different
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(first.saved[name])
    return _difference(_probe(second).scores, probed.scores), different


def _embedding(model: Any) -> Callable[..., Any]:
    return embedding_method(model) or model.embed_input_ids


def _call(call: str, function: Callable[[], Any]) -> tuple[Probe, Any]:
    """What a call showed, and what it returned."""
    try:
        with torch.no_grad():
            value = function()
    except Exception as error:  # noqa: BLE001 - whatever a model raises is the finding
        message = str(error).strip().splitlines() or [""]
        return Probe(call=call, shape=None, dtype=None, error=f"{type(error).__name__}: {message[0]}"), None
    if not isinstance(value, torch.Tensor):
        said = f"returned a {type(value).__name__}, not a tensor"
        return Probe(call=call, shape=None, dtype=None, error=said), value
    return Probe(call=call, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch.")), value


def attention_layers(model: nn.Module) -> Iterator[AttentionInfo]:
    """The attention layers of a built model; inside vLLM one of ours is followed by vLLM's own inside it."""
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module, TrainableAttention):
            yield AttentionInfo(
                module=name,
                prefix=layer.prefix,
                num_heads=layer.num_heads,
                num_kv_heads=layer.num_kv_heads,
                head_dim=layer.head_dim,
            )
        elif _vllm.is_attention(module) and hasattr(module, "num_kv_heads"):  # those of state-space models have none
            yield AttentionInfo(
                module=name,
                prefix=layer.layer_name,
                num_heads=layer.num_heads,
                num_kv_heads=layer.num_kv_heads,
                head_dim=layer.head_size,
            )


def _unregistered(model: nn.Module) -> Iterator[str]:
    """Parameters and modules that only a plain container holds, so that no state dict has them."""
    registered = {id(m) for m in model.modules()} | {id(p) for p in model.parameters()}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") and attribute in nn.Module().__dict__:
                continue
            if isinstance(value, (list, tuple, dict)):
                yield from _hidden(f"{path}.{attribute}".lstrip("."), value, registered, depth=3)


def _hidden(name: str, value: Any, registered: set[int], depth: int) -> Iterator[str]:
    if isinstance(value, nn.Module):
        if id(value) not in registered and next(value.parameters(), None) is not None:
            yield f"{name} ({type(value).__name__})"
    elif isinstance(value, torch.Tensor):
        if id(value) not in registered and (isinstance(value, nn.Parameter) or value.requires_grad):
            yield f"{name} {list(value.shape)}"
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _hidden(f"{name}[{index}]", item, registered, depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _hidden(f"{name}[{key!r}]", item, registered, depth - 1)


def _longest(built: standalone.Standalone, configured: int) -> int:
    """The most positions, up to the configured number, that a forward pass survives."""
    limit = configured
    while limit > 32:
        last = torch.tensor([limit - 1])
        probe, _ = _call("", lambda last=last: built.model(input_ids=torch.zeros_like(last), positions=last))  # type: ignore[misc]
        if probe.error is None or not probe.error.startswith("IndexError"):
            break
        limit //= 2
    return limit


def _geometry(
    hf_config: Any, embed: Probe, logits: Probe, attention: tuple[AttentionInfo, ...], limit: int
) -> dict[str, Any]:
    """Settings the model contradicts, with the model's values."""
    seen: dict[str, Any] = {}
    if embed.shape is not None:
        seen["hidden_size"] = embed.shape[-1]
    if logits.shape is not None:
        seen["vocab_size"] = logits.shape[-1]
    if attention:
        seen["num_hidden_layers"] = len(attention)
        seen["num_attention_heads"] = attention[0].num_heads
        seen["num_key_value_heads"] = attention[0].num_kv_heads
        seen["head_dim"] = attention[0].head_dim
    seen["max_position_embeddings"] = limit
    return {name: value for name, value in seen.items() if getattr(hf_config, name, value) != value}
