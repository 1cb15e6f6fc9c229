"""Record what every module of a model is given and gives, token by token.

Shapes: T tokens of one forward pass, N recorded rows, n columns of one tensor on this rank.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from genmodel.modeling import _vllm
from genmodel.modeling.layers import Partition
from genmodel.modeling.wrapper import CallableModelWrapper
from genmodel.runners.evidence import ModuleRecord, Point, RecordedSequence, Trace

COMPUTE_LOGITS = "compute_logits"
"""The method is recorded as if it were a module: it runs on other rows than the forward pass before it."""

Kind = Literal["input", "output"]
Key = tuple[str, Kind, str, int]


@dataclass(slots=True)
class _Recorded:
    """One point while it is being recorded: pieces of rows, pass after pass."""

    caller: str | None
    columns: torch.Tensor | None
    name: str
    rows: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


class Recorder:
    """Hooks on every module of a model. `begin` says which tokens the next forward pass is over.

    Args:
        model: what is run and has `compute_logits`: the author's model, or vLLM's class around it.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = model.model if isinstance(model, CallableModelWrapper) else model
        self.classes = {name: type(module).__name__ for name, module in inner.named_modules()}
        self.rows = torch.empty(0, 4, dtype=torch.int64)
        self._points: dict[Key, _Recorded] = {}
        self._calls: Counter[str] = Counter()
        self._stack: list[tuple[str, int]] = []
        self._ids = torch.empty(0, dtype=torch.int64)  # [T] row of each token, -1 for those not kept
        self._last = torch.empty(0, dtype=torch.int64)  # each sequence's last token of this pass
        self._hidden: torch.Tensor | None = None
        self._parameters = {name: _parameters(module) for name, module in inner.named_modules()}
        for name, module in inner.named_modules():
            self._hook(name, module)
        self._wrap_compute_logits(model)

    def begin(self, rows: torch.Tensor, keep: torch.Tensor) -> None:
        """Start a forward pass.

        Args:
            rows: [T, 4] int64, as in `ModuleRecord.rows`.
            keep: [T] bool, which tokens to record.
        """
        self._ids = torch.full([len(rows)], -1)
        self._ids[keep] = torch.arange(int(keep.sum())) + len(self.rows)
        self.rows = torch.cat([self.rows, rows[keep]])
        ends = torch.ones(len(rows), dtype=torch.bool)
        ends[:-1] = rows[1:, 0] != rows[:-1, 0]
        self._last = ends.nonzero()[:, 0]
        self._calls.clear()
        self._stack.clear()
        self._hidden = None

    def points(self) -> tuple[Point, ...]:
        """Everything recorded so far, in order of execution; empties the recorder."""
        found = tuple(_joined(key, recorded) for key, recorded in self._points.items())
        self._points.clear()
        return found

    def _hook(self, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._enter(name, module, [*enumerate(arguments), *keywords.items()])

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._leave(name, module, output)
            if not name and isinstance(output, torch.Tensor):
                self._hidden = output

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def _wrap_compute_logits(self, model: Any) -> None:
        compute = model.compute_logits

        def recorded(hidden: torch.Tensor, *arguments: Any) -> Any:
            with self._only(hidden):
                self._enter(COMPUTE_LOGITS, None, [(0, hidden)])
                logits = compute(hidden, *arguments)
                self._leave(COMPUTE_LOGITS, None, logits)
            return logits

        model.compute_logits = recorded

    @contextlib.contextmanager
    def _only(self, hidden: torch.Tensor) -> Iterator[None]:
        """While logits are computed, the tokens are those of `hidden`; nothing is recorded if these are unknown."""
        before = self._ids
        self._ids = before[which] if (which := self._tokens_of(hidden)) is not None else before[:0]
        self._calls.clear()
        try:
            yield
        finally:
            self._ids = before

    def _tokens_of(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Which of the forward pass's rows were handed to compute_logits: a run of them, or each sequence's last."""
        ours = self._hidden
        if ours is None or ours.dim() != 2 or hidden.shape[1:] != ours.shape[1:] or not len(hidden):
            return None
        if hidden.untyped_storage().data_ptr() == ours.untyped_storage().data_ptr():
            first = (hidden.storage_offset() - ours.storage_offset()) // max(1, ours.stride(0))
            return torch.arange(first, first + len(hidden))
        same = len(hidden) == len(self._last) and torch.equal(hidden, ours[self._last.to(ours.device)])
        return self._last if same else None

    def _enter(self, name: str, module: nn.Module | None, arguments: list[tuple[Any, Any]]) -> None:
        caller = self._stack[-1][0] if self._stack else None
        call = self._calls[name]
        self._calls[name] += 1
        self._stack.append((name, call))
        self._keep(name, "input", call, caller, module, arguments)

    def _leave(self, name: str, module: nn.Module | None, output: Any) -> None:
        while self._stack:
            found, call = self._stack.pop()
            if found == name:  # others raised, and somebody caught that
                caller = self._stack[-1][0] if self._stack else None
                self._keep(name, "output", call, caller, module, [(None, output)])
                return

    def _keep(
        self,
        name: str,
        kind: Kind,
        call: int,
        caller: str | None,
        module: nn.Module | None,
        found: list[tuple[Any, Any]],
    ) -> None:
        names = self._parameters.get(name, ()) if kind == "input" else ()
        kept = self._ids >= 0
        if not bool(kept.any()):
            return
        for part, tensor in tensors_in(found):
            by_token = _by_token(tensor, len(kept))
            if by_token is None:
                continue
            wide = torch.promote_types(by_token.dtype, torch.float32)
            values = by_token.detach()[kept.to(by_token.device)].to("cpu", wide)
            key: Key = (name, kind, part, call)
            if key not in self._points:
                columns = _declared_columns(module, kind, part, values.shape[1])
                self._points[key] = _Recorded(caller, columns, _parameter(part, names))
            self._points[key].rows.append(self._ids[kept])
            self._points[key].values.append(values)


class EngineRecorder:
    """Records one rank of an engine, in the process that has it.

    Args:
        positions: which positions to keep, by prompt.
    """

    def __init__(self, positions: Mapping[tuple[int, ...], frozenset[int]]) -> None:
        self._positions = positions
        self._recorder: Recorder | None = None
        self._requests: dict[str, tuple[int, ...]] = {}
        self._order: dict[str, int] = {}
        self._passes = 0

    def attach(self, runner: Any) -> None:
        """Begin with the next forward pass of a model runner of vLLM's; for as long as its engine lives."""
        self._recorder = Recorder(_vllm.observe_forward(runner, self._begin))

    def record(self, traces: Sequence[Trace], rank: int) -> ModuleRecord:
        """What was recorded, its requests named after the continuations they gave.

        Requests with equal prompts are told apart by the order in which they first ran.
        """
        recorder = self._recorder
        assert recorder is not None, "no engine was started"
        made = [(trace.weights, continuation) for trace in traces for continuation in trace.continuations]
        sequences = tuple(
            RecordedSequence(request=c.request.name, weights=w, prompt=len(c.request.prompt), tokens=c.sequence)
            for w, c in made
        )
        waiting: dict[tuple[int, ...], list[int]] = {}
        for index, (_, continuation) in enumerate(made):
            waiting.setdefault(continuation.request.prompt, []).append(index)
        numbers = torch.tensor([waiting[prompt].pop(0) for prompt in self._requests.values()], dtype=torch.int64)
        rows = recorder.rows.clone()
        rows[:, 0] = numbers[rows[:, 0]]
        return ModuleRecord(
            rank=rank, classes=recorder.classes, sequences=sequences, rows=rows, points=recorder.points()
        )

    def _begin(self, batch: list[tuple[str, tuple[int, ...], int]], positions: torch.Tensor) -> None:
        if self._recorder is None:  # vLLM's own warm-up, should it ever come after the start
            return
        where = positions.cpu().tolist()
        rows, keep = [], []
        at = 0
        for name, prompt, count in batch:
            self._requests.setdefault(name, prompt)
            number = self._order.setdefault(name, len(self._order))
            wanted = self._positions.get(prompt, frozenset())
            for position in where[at : at + count]:
                rows.append((number, position, self._passes, where[at]))
                keep.append(position in wanted)
            at += count
        self._passes += 1
        self._recorder.begin(torch.tensor(rows, dtype=torch.int64), torch.tensor(keep, dtype=torch.bool))


_workers: list[EngineRecorder] = []
"""The recorder of this process, if it is a worker of a deployed engine."""


def record_worker(worker: Any, positions: Mapping[tuple[int, ...], frozenset[int]]) -> None:
    """Run inside a worker by `engine.ask_workers`: record its rank from now on."""
    _workers[:] = [EngineRecorder(positions)]
    _workers[0].attach(worker.model_runner)


def worker_record(worker: Any, traces: Sequence[Trace]) -> ModuleRecord:
    """Run inside a worker by `engine.ask_workers`: what was recorded, of requests that gave these traces."""
    return _workers[0].record(traces, worker.rank)


def begin_sequence(recorder: Recorder, number: int, length: int, positions: frozenset[int]) -> None:
    """Announce a forward pass over one whole sequence, the `number`-th, of which some positions are kept."""
    at = torch.arange(length)
    zero = torch.zeros_like(at)
    recorder.begin(
        torch.stack([zero + number, at, zero + number, zero], 1),
        torch.tensor([position in positions for position in range(length)], dtype=torch.bool),
    )


def one_after_another(records: Sequence[ModuleRecord]) -> ModuleRecord:
    """Records of the same model as one, as if it had been run on all of their rows."""
    first, *others = records
    for other in others:
        more = {point.key: point for point in other.points}
        points = tuple(
            _followed(point, more[point.key], len(first.rows)) for point in first.points if point.key in more
        )
        first = replace(first, rows=torch.cat([first.rows, other.rows]), points=points)
    return first


def _followed(point: Point, more: Point, offset: int) -> Point:
    if point.values.shape[1] != more.values.shape[1]:
        return point
    rows = torch.cat([point.rows, more.rows + offset])
    return replace(point, rows=rows, values=torch.cat([point.values, more.values]))


def with_noise(tested: Sequence[Point], higher: Sequence[Point]) -> tuple[Point, ...]:
    """The higher-precision points as float32, each with how far the tested dtype is from it."""
    coarse = {point.key: point for point in tested}
    found = []
    for point in higher:
        other = coarse.get(point.key)
        if other is not None and other.values.shape == point.values.shape:
            error = difference(other.values.double(), point.values.double()).amax(1).float()
            found.append(replace(point, values=point.values.float(), noise=error))
    return tuple(found)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """|ours - theirs|, which is 0 for equal infinities."""
    return (ours - theirs).abs().masked_fill(ours == theirs, 0)


def _joined(key: Key, recorded: _Recorded) -> Point:
    """One point of all passes; with one token, other shapes than usual may look like rows: they are dropped."""
    sizes: Counter[int] = Counter()
    for values in recorded.values:
        sizes[values.shape[1]] += len(values)
    width = sizes.most_common(1)[0][0]
    usual = [i for i, values in enumerate(recorded.values) if values.shape[1] == width]
    module, kind, part, call = key
    columns = recorded.columns
    return Point(
        module=module,
        kind=kind,
        part=part,
        call=call,
        caller=recorded.caller,
        rows=torch.cat([recorded.rows[i] for i in usual]),
        values=torch.cat([recorded.values[i] for i in usual]),
        columns=columns if columns is not None and len(columns) == width else None,
        name=recorded.name,
    )


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of forward's parameters, in the order in which arguments fill them."""
    try:
        found = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _parameter(part: str, names: Sequence[str]) -> str:
    """The parameter that a part such as "0", "1.0" or "cos" is passed as."""
    first, dot, rest = part.partition(".")
    if first.isdigit():
        return names[int(first)] + dot + rest if int(first) < len(names) else ""
    return part if first in names else ""


def tensors_in(
    found: Sequence[tuple[Any, Any]], prefix: str = "", depth: int = 2
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in arguments or outputs, and where it stands: "0", "cos", "1.0"."""
    for name, value in found:
        part = f"{prefix}{'' if name is None else name}"
        if isinstance(value, torch.Tensor):
            yield part or "0", value
        elif depth and isinstance(value, (tuple, list)):
            yield from tensors_in([*enumerate(value)], f"{part}." if part else "", depth - 1)
        elif depth and isinstance(value, Mapping):
            yield from tensors_in([*value.items()], f"{part}." if part else "", depth - 1)


def _by_token(tensor: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """[T, ..] or [1, T, ..] as [T, n]; None for anything else."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dim() > 0 and tensor.shape[0] == tokens:
        return tensor.reshape(tokens, -1)
    if tensor.dim() > 2 and tensor.shape[0] == 1 and tensor.shape[1] == tokens:
        return tensor.reshape(tokens, -1)
    return None


def _declared_columns(module: nn.Module | None, kind: Kind, part: str, width: int) -> torch.Tensor | None:
    """Which columns of the full tensor this rank's [T, width] should be, if the module says how its weight is cut."""
    partition = getattr(module, "partitions", {}).get("weight")
    if not isinstance(partition, Partition) or partition.dim != (0 if kind == "output" else 1):
        return None
    own, fused, offset = [], [], 0
    for segment in partition.segments:
        columns = torch.arange(segment.start, segment.start + segment.length)
        columns[columns >= segment.size] = -1
        own.append(columns)
        fused.append(columns.where(columns < 0, columns + offset))
        offset += segment.size
    if sum(map(len, fused)) == width:
        return torch.cat(fused)
    index = int(part) if part.isdigit() else len(own)
    return own[index] if index < len(own) and len(own[index]) == width else None
