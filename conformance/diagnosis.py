"""Where a failure begins: the first module, in order of execution, at which an engine parts from the reference.

What is compared are tensors on their way into and out of modules, in the order in which they occur. If the first
one to differ comes out of a module whose inputs and inner modules all agree, that module is wrong. If it goes into
one, it is the code of the caller, between two modules, that is wrong.

A tensor differs where it is further from the reference than

    NOISE_FACTOR * noise + ULP_FACTOR * eps(dtype) * max |value|

where noise is what rounding has added up to at this very tensor: how far the reference in the tested dtype is from
the one in higher precision there, the largest over the rows of a phase.

Shapes: N rows (tokens), n columns of an engine's tensor, m of the reference's; n < m where ranks hold shares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from genmodel.conformance.agreement import ULP_FACTOR
from genmodel.conformance.catalogue import Check, one_thread
from genmodel.conformance.verdict import Measurement, Status, Verdict
from genmodel.runners.evidence import Failure, ModuleRecord, ModuleRun, Point
from genmodel.runners.scenarios import DEPLOYMENTS, ENGINE_SCENARIOS

NOISE_FACTOR = 8.0
"""Noise floors an error may be: more than for logits, for hundreds of tensors are looked at and none may be blamed by
chance. A fault is clearest where it begins, before later layers blur it. Measured on reference_models.dense and gpt in
all in-process scenarios, TP=1 and TP=2: no tensor is off by more than 0.23 of what is allowed."""
MINOR = 0.01
MOST_MINOR = 8.0
"""A tensor so many limits off, or fewer, is not where a failure begins if it is this share of what another is off.

Noise floors do not hold everything that two right implementations may do otherwise: vLLM's rotary tables have float32
angles, which is 1.3 limits where the reference's are float64. A fault is a hundred limits off and more where it
begins.
"""
GROUPS = ("logits", "scheduling", "refit", "deployment")
"""Checks that compare what engines compute."""

UNLIKE = 0.1
"""Share of the largest value expected that a tensor has to be off by at least to be taken for another one."""

_Found = list[tuple[ModuleRecord, Point]]
"""One tensor on all ranks that have it."""

_Key = tuple[str, str, str, int]
_Pair = list[tuple[Point, Point, bool]]
"""What to compare of an engine with what of the reference, in other ways each; True where they must agree."""

Findings = dict[tuple[str, int], "Finding | str | None"]
"""By scenario and size: the finding, why there can be none, or None where nothing could be compared."""

Rerun = Callable[[str, int, tuple[str, int] | None], ModuleRun | Failure]
"""`Session.diagnose` of one target: scenario, tensor-parallel size, and a request and position known to be wrong."""

_PHASES = ("prompt", "first token", "decode")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_BLOCK_ELEMENTS = 1 << 24
_FAR = 10.0  # tolerances beyond which one column is as unlike another as any


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One rank's share of a tensor next to the reference's."""

    rank: int
    rows: torch.Tensor
    """[N] int64, rows of the rank's record."""
    error: torch.Tensor
    """[N] float32, the largest |difference| of each row."""
    allowed: torch.Tensor
    """[N] float32."""
    columns: torch.Tensor
    """[n] int64, which of the reference's m columns were compared; -1 is padding."""
    full: int
    """m."""
    known: bool
    """Whether these are its columns for sure: all of them, or those the module declares; else, by their values."""
    scale: float
    """The largest |value| expected."""
    must: bool
    """Whether the two must agree; False where both sides need not mean the same by it."""

    @property
    def wrong(self) -> torch.Tensor:
        """bool [N]; NaN on either side is wrong."""
        return ~(self.error <= self.allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first thing to differ."""

    module: str
    """Whose code or weights are wrong, such as "layers.0.mlp.down"; "" is the model's own forward."""
    module_class: str
    between: tuple[str, str] | None
    """The modules between which the module's own code goes wrong; None if it is the module's output that is wrong."""
    tensor: str
    """What differs, such as "its output" or "input 1 of layers.0.attn"."""
    own_code: bool
    """Whether modules inside it agree, so that only its own forward is left."""
    tensor_parallel_size: int
    ranks: tuple[int, ...]
    """Tensor-parallel ranks, of its stage."""
    phase: str
    """"prompt", "first token" or "decode"."""
    how: str
    """How the row was computed, such as "after a chunk boundary"; often empty."""
    request: str
    position: int
    error: float
    allowed: float
    input_good: bool | None
    """None if nothing that went into the module could be compared."""
    share: str
    """Which of a sharded tensor's columns were compared, or are missing; empty for a whole tensor."""
    candidates: tuple[str, ...]
    """Modules the reference does not have that ran since the last tensor known to be good."""
    hint: str
    """What else is known of the module before, where its share or its name leaves room for doubt; often empty."""
    agreeing: int
    """Tensors before this one that agree."""
    stage: int | None = None
    """Of a pipeline; None where there is none."""
    within: bool = False
    """Whether it is within its limit too, and only where the error grows most."""
    before: float = 0.0
    """Then, the largest error of the tensors before, as a share of what is allowed there."""


def first_difference(run: ModuleRun) -> Finding | None:
    """The first tensor that is wrong on some rank, or of which no rank holds some columns; None if there is none."""
    with one_thread():
        return _first_difference(run)


def _first_difference(run: ModuleRun) -> Finding | None:
    reference = _Reference(run)
    passed = _Passed()
    order = list(_in_order(run))
    compared = [
        [part for record, point in found if (part := reference.compare(record, point)) is not None] for found in order
    ]
    largest = max((_excess(part) for parts in compared for part in parts if part.must), default=0.0)
    beyond = min(MOST_MINOR, max(1.0, MINOR * largest))
    for number, (found, parts) in enumerate(zip(order, compared, strict=True)):
        if not parts:
            passed.unknown.append(found[0])
        elif not _wrong(parts, run, beyond):
            passed.add(*found[0], parts[0])
        elif not all(part.must for part in parts) or _unlike(found[0][1], parts, reference, order[number + 1 :]):
            passed.unknown.append(found[0])
        else:
            return _finding(run, reference, _origin(found[0][1], reference, passed), parts, passed)
    return None


def largest_growth(run: ModuleRun) -> Finding | None:
    """Where the error grows most, of a run in which no tensor is beyond its limit; None if there is nothing to compare.

    Grown is what share of its limit a tensor's error is, over that of all tensors before.
    """
    with one_thread():
        return _largest_growth(run)


def _largest_growth(run: ModuleRun) -> Finding | None:
    reference = _Reference(run)
    passed = _Passed()
    before = 0.0
    most: tuple[float, Finding] | None = None
    for found in _in_order(run):
        compared = [part for record, point in found if (part := reference.compare(record, point)) is not None]
        parts = [part for part in compared if part.must and not bool(part.wrong.any())]
        if not parts:
            passed.unknown.append(found[0])
            continue
        share = max(float((part.error / part.allowed).nan_to_num(0).max()) for part in parts)
        if most is None or share - before > most[0]:
            here = _finding(run, reference, _origin(found[0][1], reference, passed), parts, passed)
            most = share - before, replace(here, within=True, before=before)
        before = max(before, share)
        passed.add(*found[0], parts[0])
    return None if most is None else most[1]


def _excess(part: Part) -> float:
    """The largest finite error as a multiple of what is allowed."""
    shares = part.error / part.allowed
    return float(shares[shares.isfinite()].max()) if bool(shares.isfinite().any()) else 0.0


def _wrong(parts: Sequence[Part], run: ModuleRun, beyond: float) -> bool:
    """Whether a tensor is so many limits off on some rank, or no rank holds some of its columns."""
    off = any(bool((part.wrong & ~(part.error <= beyond * part.allowed)).any()) for part in parts)
    return off or (len(parts) == run.tensor_parallel_size and len(_missing(parts)) > 0)


def _unlike(point: Point, parts: Sequence[Part], reference: _Reference, later: Sequence[_Found]) -> bool:
    """Whether the two sides mean different things by a tensor: it has nothing of the other, and what holds it agrees.

    A fault is in all that is computed from it: in what the modules around it give, while a branch beside it, such as
    a shared expert beside a router, agrees whatever happens. What depends on the position alone, such as a rotary
    table, is computed from neither.
    """
    broken = {part.rank: set(part.rows[part.wrong].tolist()) for part in parts if bool(part.wrong.any())}
    if not broken or any(float(part.error.nan_to_num(0).max()) < UNLIKE * part.scale for part in parts):
        return False
    for found in later:
        after = found[0][1]
        around = not after.module or f"{point.module}.".startswith(f"{after.module}.")
        if after.kind != "output" or not around or not _depends_on_tokens(*found[0]):
            continue
        compared = [part for record, point in found if (part := reference.compare(record, point)) is not None]
        again = [part for part in compared if part.rank in broken and part.must and part.known]
        if len(again) == len(broken) and all(_agrees_at(part, broken[part.rank]) for part in again):
            return True
    return False


def _agrees_at(part: Part, rows: set[int]) -> bool:
    here = torch.tensor([row in rows for row in part.rows.tolist()])
    return int(here.sum()) == len(rows) and not bool(part.wrong[here].any())


def _depends_on_tokens(record: ModuleRecord, point: Point) -> bool:
    """Whether some two sequences differ at their first positions."""
    first = record.rows[point.rows][:, 1] == 0
    values = point.values[first]
    return len(values) > 1 and not bool((values == values[0]).all())


def _origin(point: Point, reference: _Reference, passed: _Passed) -> Point:
    """The output that a wrong tensor is, if it is that of a module which gives other tensors than the reference's."""
    for _, made in reversed(passed.unknown):
        same = made.kind == "output" and made.module != point.module and torch.equal(made.rows, point.rows)
        if same and torch.equal(made.values, point.values) and made.module in reference.modules:
            return made
    return point


def describe(found: Finding) -> str:
    """A finding in a few sentences."""
    name = (
        f"{found.module} ({found.module_class})" if found.module else f"the model's own forward ({found.module_class})"
    )
    what = f"what {name} computes between {found.between[0]} and {found.between[1]}" if found.between else name
    phase = {"prompt": "in the prompt", "first token": "at the prompt's last token", "decode": "in decode"}[found.phase]
    how = f", {found.how}" if found.how else ""
    place = f"at TP={found.tensor_parallel_size}, {phase} of request {found.request} (position {found.position}{how})"
    if found.within:
        return (
            f"No module is beyond its own limit, which is looser than that of logits. The error grows most at "
            f"{what}{_on_ranks(found)}, {place}: {found.tensor} is off by {found.error:.2g}, "
            f"{found.error / found.allowed:.0%} of the {found.allowed:.2g} allowed there, where nothing before it is "
            f"beyond {found.before:.0%}."
        )
    said = [f"First to differ: {what}{_on_ranks(found)}, {place}.", _difference(found), _what_agrees(found)]
    if found.candidates:
        shown = ", ".join(found.candidates[:4]) + (", ..." if len(found.candidates) > 4 else "")
        said.append(f"Since the last tensor that agrees, there also ran what the reference does not have: {shown}.")
    return " ".join(filter(None, [*said, found.hint]))


def _on_ranks(found: Finding) -> str:
    stage = "" if found.stage is None else f" in stage {found.stage} of the pipeline"
    if found.tensor_parallel_size == 1:
        return stage
    if len(found.ranks) == found.tensor_parallel_size:
        return " on every rank" + stage
    return (" on rank " if len(found.ranks) == 1 else " on ranks ") + ", ".join(map(str, found.ranks)) + stage


def _difference(found: Finding) -> str:
    if found.share.startswith("no rank"):
        return f"Of {found.tensor}, {found.share}; what the ranks do hold agrees."
    share = f" in {found.share}" if found.share else ""
    subject = found.tensor[0].upper() + found.tensor[1:]
    return f"{subject} is off by {found.error:.2g}{share}, where {found.allowed:.2g} is allowed."


def _what_agrees(found: Finding) -> str:
    before = f"all {found.agreeing} tensors compared before" if found.agreeing > 1 else "what was compared before"
    if found.own_code and found.between is None:
        return f"The modules inside it agree, as do {before}: what is left is its own code."
    if found.input_good:
        return f"What goes into it agrees, as do {before}."
    return ""


class Diagnosis:
    """Explains the failed verdicts of one target; every scenario is run again at most once at each size.

    Args:
        rerun: runs a scenario with every module recorded.
        known: what an earlier run found.
    """

    def __init__(self, rerun: Rerun, known: Findings | None = None) -> None:
        self._rerun = rerun
        self._known: Findings = dict(known or {})

    @property
    def findings(self) -> Findings:
        """All that was found so far."""
        return dict(self._known)

    def of(self, check: Check, verdict: Verdict) -> Verdict:
        """The verdict with its diagnosis, if it has one."""
        return replace(verdict, diagnosis=self.explain(check, verdict))

    def explain(self, check: Check, verdict: Verdict) -> str:
        """Where a failed verdict's failure begins; empty if it is not of the kind that has a first module.

        Whatever goes wrong on the way is said instead, and is no failure of its own.
        """
        broken = [m for m in verdict.measurements if not m.ok and m.where.startswith("TP=")]
        if check.group not in GROUPS or "precision" in check.needs or verdict.status is not Status.FAILED or not broken:
            return ""
        try:
            return self._explain(check, broken)
        except Exception as error:  # noqa: BLE001 - a diagnosis that fails must not fail anything else
            return f"No diagnosis: {type(error).__name__}: {error}"

    def _explain(self, check: Check, broken: Sequence[Measurement]) -> str:
        sizes = sorted({int(m.where.removeprefix("TP=")) for m in broken})
        # What a deployed engine does is compared with what an engine in one process did, which was right.
        scenarios = [name for name in DEPLOYMENTS if name in check.needs]
        scenarios = scenarios or [name for name in ENGINE_SCENARIOS if name in check.needs] or ["plain"]
        for size in sizes:
            known = self._known.get(("plain", size))
            if isinstance(known, Finding) and not known.within:
                return describe(known)  # what goes wrong without any scheduling needs no other scenario
        grown: Finding | None = None
        for name in scenarios:
            found = self._find(name, sizes[0], _focus(broken, sizes[0]))
            if isinstance(found, str):
                return f"No diagnosis: {found}"
            if found is not None and not found.within:
                return describe(found) + (f" (Scenario {name}.)" if name != "plain" else "")
            grown = grown or found
        again = f"{', '.join(scenarios)} at TP={sizes[0]} once more, with every module recorded"
        if grown is None:
            return f"No diagnosis: {again}: no module has a counterpart in the reference to be compared with."
        return f"{again[0].upper()}{again[1:]}: {describe(grown)}"

    def _find(self, scenario: str, size: int, focus: tuple[str, int] | None) -> Finding | str | None:
        if (scenario, size) not in self._known:
            run = self._rerun(scenario, size, focus)
            if isinstance(run, Failure):
                self._known[scenario, size] = f"{run.message}{f' while {run.phase}' if run.phase else ''}"
            else:
                self._known[scenario, size] = first_difference(run) or largest_growth(run)
        return self._known[scenario, size]


def _focus(broken: Sequence[Measurement], size: int) -> tuple[str, int] | None:
    """A request and position that a measurement says is worst."""
    for measurement in broken:
        match = re.search(r"request (\S+), position (\d+)", measurement.detail)
        if match and measurement.where == f"TP={size}":
            return match[1], int(match[2])
    return None


class _Passed:
    """What is known of the tensors before the first that differs."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        """Modules whose tensors were compared last, each once, the latest at the end."""
        self.shares: dict[str, Part] = {}
        """What rank 0 holds of outputs whose columns only their values tell, by module."""
        self.count = 0
        self.inputs: set[tuple[str, int]] = set()
        """Calls of which some input was compared."""
        self.states: set[int] = set()
        """Ranks of which something that modules computed from the tokens was compared."""
        self.callers: set[str | None] = set()
        """Modules inside which some tensor was compared."""
        self.unknown: list[tuple[ModuleRecord, Point]] = []
        """Since the last good one, without a counterpart in the reference."""

    def add(self, record: ModuleRecord, point: Point, part: Part) -> None:
        self.unknown = []
        if point.module and _depends_on_tokens(record, point):
            self.states.add(record.rank)
        self.count += 1
        if not self.modules or self.modules[-1] != point.module:
            self.modules.append(point.module)
        if point.kind == "output" and not part.known:
            self.shares[point.module] = part
        self.callers.add(point.caller)
        if point.kind == "input":
            self.inputs.add((point.module, point.call))


class _Reference:
    """The reference's tensors and how far from them an engine's may be."""

    def __init__(self, run: ModuleRun) -> None:
        self._record = run.reference
        self._points = {point.key: point for point in run.reference.points}
        self.modules = {point.module for point in run.reference.points}
        self.ranks = run.tensor_parallel_size
        self._pairs: dict[int, dict[_Key, _Pair]] = {}
        self._eps = torch.finfo(getattr(torch, run.dtype)).eps
        self._phases = phases(run.reference)
        sequences = run.reference.sequences
        self._rows = {
            (sequences[number].weights, sequences[number].tokens, position): row
            for row, (number, position, *_) in enumerate(run.reference.rows.tolist())
        }
        self._rows_of: dict[int, torch.Tensor] = {}

    def compare(self, record: ModuleRecord, point: Point, other: Point | None = None) -> Part | None:
        """One rank's tensor against the reference's, the one it is paired with unless another is given.

        None where there is nothing to compare.
        """
        if other is not None:
            return self._compare(record, point, other, must=True)
        if record.rank not in self._pairs:
            self._pairs[record.rank] = _pairs(record.points, self._record.points, self.ranks)
        found: Part | None = None
        for ours, theirs, must in self._pairs[record.rank].get(point.key, ()):
            part = self._compare(record, ours, theirs, must=must)
            if part is not None and (found is None or not bool(part.wrong.any())):
                found = part
        return found

    def _compare(self, record: ModuleRecord, point: Point, theirs: Point, *, must: bool) -> Part | None:
        index = torch.full([len(self._record.rows) + 1], -1)  # the last is for rows the reference does not have
        index[theirs.rows] = torch.arange(len(theirs.rows))
        at = index[self._matching(record)[point.rows]]
        common = at >= 0
        if not bool(common.any()):
            return None
        ours, expected = point.values[common], theirs.values[at[common]]
        allowed = self._allowed(theirs)[at[common]]
        columns, known = _columns(record.rank % self.ranks, ours, expected, allowed, point.columns)
        return Part(
            rank=record.rank,
            rows=point.rows[common],
            error=_error(ours, expected, columns),
            allowed=allowed,
            columns=columns,
            full=expected.shape[1],
            known=known,
            scale=float(expected.abs().nan_to_num(0, 0, 0).max()),
            must=must,
        )

    def same_as(self, record: ModuleRecord, point: Point) -> str | None:
        """The module of the reference, of any name, that gave what this one did; None if there is none."""
        for theirs in self._points.values():
            if theirs.kind == "output" and theirs.values.shape[1] == point.values.shape[1]:
                part = self.compare(record, point, theirs)
                if part is not None and not bool(part.wrong.any()):
                    return theirs.module
        return None

    def is_leaf(self, module: str) -> bool:
        """Whether no other module runs inside the reference's of this name."""
        return all(point.caller != module for point in self._points.values())

    def _matching(self, record: ModuleRecord) -> torch.Tensor:
        """[R] int64, the reference's row of each of a record's; -1 for none."""
        if record.rank not in self._rows_of:
            sequences = record.sequences
            self._rows_of[record.rank] = torch.tensor(
                [
                    self._rows.get((sequences[number].weights, sequences[number].tokens, position), -1)
                    for number, position, *_ in record.rows.tolist()
                ],
                dtype=torch.int64,
            )
        return self._rows_of[record.rank]

    def _allowed(self, theirs: Point) -> torch.Tensor:
        """[N] float32, by row of the reference's tensor."""
        assert theirs.noise is not None
        allowed = torch.full([len(theirs.rows)], torch.nan)
        phase = self._phases[theirs.rows]
        for number in range(len(_PHASES)):
            here = phase == number
            if bool(here.any()):
                scale = theirs.values[here].abs().nan_to_num(0, 0, 0).max()
                allowed[here] = NOISE_FACTOR * theirs.noise[here].max() + ULP_FACTOR * self._eps * scale
        return allowed


def _pairs(ours: Sequence[Point], theirs: Sequence[Point], ranks: int) -> dict[_Key, _Pair]:
    """What of the reference each tensor is to be compared with, by key, and whether the two must agree.

    Arguments belong together by the names of the parameters, or in order where the names differ and all shapes fit.
    A module that takes or gives another number of tensors than the reference's may mean something else by them, such
    as a residual stream apart: they may agree, and need not.
    """
    calls: dict[tuple[str, str, int], list[Point]] = {}
    for point in theirs:
        calls.setdefault((point.module, point.kind, point.call), []).append(point)
    own: dict[tuple[str, str, int], list[Point]] = {}
    for point in ours:
        own.setdefault((point.module, point.kind, point.call), []).append(point)
    found: dict[_Key, _Pair] = {}
    for call, mine in own.items():
        for point, pair in _paired(mine, calls.get(call, []), ranks):
            found.setdefault(point.key, []).extend(pair)
    return found


def _paired(ours: Sequence[Point], theirs: Sequence[Point], ranks: int) -> Iterator[tuple[Point, _Pair]]:
    """The tensors of one call."""
    names = {point.name: point for point in theirs if point.name}
    if len(names) == len(theirs) and {point.name for point in ours} == names.keys():
        yield from ((p, [(p, names[p.name], True)]) for p in ours if _fits(p, names[p.name], ranks))
    elif len(ours) == len(theirs):
        pairs = list(zip(ours, theirs, strict=True))
        if ours[0].kind == "output" or all(_fits(*pair, ranks) for pair in pairs):
            yield from ((p, [(p, other, True)]) for p, other in pairs if _fits(p, other, ranks))
    elif not theirs:
        return
    elif len(ours) == 1 and _fits(ours[0], joined := _side_by_side(theirs), ranks):
        yield ours[0], [(ours[0], joined, True)]
    elif ours[0].kind == "input":
        yield from (
            (p, [(p, names[p.name], False)]) for p in ours if p.name in names and _fits(p, names[p.name], ranks)
        )
    else:
        alike = [p for p in ours if p.values.shape == ours[0].values.shape]
        total = replace(ours[0], values=torch.stack([p.values for p in alike]).sum(0))
        yield ours[0], [(p, theirs[0], False) for p in (ours[0], total) if _fits(p, theirs[0], ranks)]


def _fits(ours: Point, theirs: Point, ranks: int) -> bool:
    """Whether one can be the other, or a rank's share of it."""
    n, m = ours.values.shape[1], theirs.values.shape[1]
    return n == m or n < m <= n * ranks


def _side_by_side(points: Sequence[Point]) -> Point:
    """Several tensors of one call as one, in the rows that the first has."""
    first = points[0]
    if any(not torch.equal(point.rows, first.rows) for point in points):
        return first
    noises = [point.noise for point in points if point.noise is not None]
    return replace(
        first,
        values=torch.cat([point.values for point in points], 1),
        noise=torch.stack(noises).amax(0) if len(noises) == len(points) else first.noise,
    )


def phases(record: ModuleRecord) -> torch.Tensor:
    """[R] int64, the phase of each row: 0 for the prompt but its last token, 1 for that one, 2 for generated ones."""
    prompts = torch.tensor([sequence.prompt for sequence in record.sequences], dtype=torch.int64)
    last = prompts[record.rows[:, 0]] - 1
    return (record.rows[:, 1] >= last).long() + (record.rows[:, 1] > last).long()


def _in_order(run: ModuleRun) -> Iterator[_Found]:
    """Every tensor in order of execution, stage by stage, on all ranks that have it."""
    for first in range(0, len(run.ranks), run.tensor_parallel_size):
        stage = run.ranks[first : first + run.tensor_parallel_size]
        by_key = [{point.key: point for point in record.points} for record in stage]
        for key in dict.fromkeys(key for points in by_key for key in points):
            yield [(record, points[key]) for record, points in zip(stage, by_key, strict=True) if key in points]


def _columns(
    rank: int, ours: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor, declared: torch.Tensor | None
) -> tuple[torch.Tensor, bool]:
    """Which of the reference's m columns these n are, and whether that is known without looking at the values."""
    n, m = ours.shape[1], expected.shape[1]
    if n == m:
        return torch.arange(m), True
    if declared is not None and len(declared) == n and int(declared.max()) < m:
        return declared, True
    even = torch.arange(rank * n, rank * n + n)
    if rank * n + n <= m and bool((_error(ours, expected, even) <= allowed).all()):
        return even, False
    return _nearest(ours, expected, allowed), False


def _nearest(ours: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """For each of n columns the one of m that most rows agree with; how far the others are off does not matter."""
    scale = allowed[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
    size = max(1, _BLOCK_ELEMENTS // max(1, expected.numel()))
    found = [
        ((piece[:, :, None] - expected[:, None, :]).abs() / scale).nan_to_num(_FAR).clamp(max=_FAR).mean(0).argmin(1)
        for piece in ours.split(size, 1)
    ]
    return torch.cat(found)


def _error(ours: torch.Tensor, expected: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[N], the largest |difference| of each row; equal infinities are equal, padding is no difference."""
    theirs = expected[:, columns.clamp(min=0)]
    return (ours - theirs).abs().masked_fill((ours == theirs) | (columns < 0), 0).amax(1)


def _missing(parts: Sequence[Part]) -> torch.Tensor:
    """The columns that no rank holds."""
    held = torch.zeros(parts[0].full, dtype=torch.bool)
    for part in parts:
        held[part.columns[part.columns >= 0]] = True
    return (~held).nonzero()[:, 0]


def _finding(run: ModuleRun, reference: _Reference, point: Point, parts: Sequence[Part], passed: _Passed) -> Finding:
    broken = [part for part in parts if bool(part.wrong.any())] or _repeating(parts)
    part, at = _worst(run, broken)
    record = _record_of(run, part.rank)
    row = int(part.rows[at])
    sequence = record.sequences[int(record.rows[row, 0])]
    functional = point.kind == "input" and point.caller is not None
    module = point.caller if functional and point.caller is not None else point.module
    last, candidates, alias = _before(reference, point, passed)
    stage = part.rank // run.tensor_parallel_size
    first = stage > 0 and all(rank // run.tensor_parallel_size != stage for rank in passed.states)
    handed_on = (
        f"It is the first in its stage to be compared: what stage {stage - 1} sends may be wrong." if first else ""
    )
    return Finding(
        module=module,
        module_class=_class_of(record, module),
        between=("its start" if last == module else last, point.module) if functional else None,
        tensor=_tensor(record, point, functional),
        own_code=functional or module in passed.callers,
        tensor_parallel_size=run.tensor_parallel_size,
        ranks=_ranks(run, reference, stage, point, broken),
        stage=stage if len(run.ranks) > run.tensor_parallel_size else None,
        phase=_PHASES[int(phases(record)[row])],
        how=_how(record, row),
        request=sequence.request,
        position=int(record.rows[row, 1]),
        error=float(part.error[at]),
        allowed=float(part.allowed[at]),
        input_good=True if any(name == module for name, _ in passed.inputs) else None,
        share=_share(part, parts),
        candidates=() if point.kind == "output" and reference.is_leaf(module) else tuple(candidates),
        hint=(functional and (alias or _fused(passed.shares.get(last), last, reference.ranks))) or handed_on,
        agreeing=passed.count,
    )


def _ranks(
    run: ModuleRun, reference: _Reference, stage: int, point: Point, broken: Collection[Part]
) -> tuple[int, ...]:
    """Ranks of a stage on which this or any other tensor of the same call is wrong."""
    ranks = {part.rank for part in broken}
    for found in _in_order(run):
        record, other = found[0]
        here = record.rank // run.tensor_parallel_size == stage
        if here and other.key[::3] == point.key[::3] and other.kind == point.kind:
            parts = (reference.compare(record, other) for record, other in found)
            ranks |= {part.rank for part in parts if part is not None and bool(part.wrong.any())}
    return tuple(sorted(rank % run.tensor_parallel_size for rank in ranks))


def _share(part: Part, parts: Sequence[Part]) -> str:
    if not bool(part.wrong.any()) and len(_missing(parts)):
        return f"no rank holds columns {_span(_missing(parts))} of {part.full}"
    if len(part.columns) == part.full:
        return ""
    return f"columns {_span(part.columns)} of {part.full}" if part.known else f"its share of {part.full} columns"


def _fused(part: Part | None, module: str, ranks: int) -> str:
    """A hint for weights of unknown layout: what looks right by its values may still be the wrong share."""
    if part is None or not bool((part.columns.diff() == 1).all()):
        return ""
    return (
        f"On rank {part.rank % ranks}, {module} gives columns {_span(part.columns)} of {part.full}: right for a plain "
        "layer, and the cause if it is a fused one, such as [gate | up], each part of which has to be cut."
    )


def _record_of(run: ModuleRun, rank: int) -> ModuleRecord:
    return next(record for record in run.ranks if record.rank == rank)


def _worst(run: ModuleRun, parts: Sequence[Part]) -> tuple[Part, int]:
    """The worst row of the first phase in which anything is wrong."""
    found = []
    for part in parts:
        record = _record_of(run, part.rank)
        severity = (part.error / part.allowed).nan_to_num(torch.inf, torch.inf)
        phase = phases(record)[part.rows].masked_fill(~part.wrong, len(_PHASES))
        first = int(phase.min())
        at = int(severity.masked_fill(phase != first, -1).argmax())
        found.append((first, -float(severity[at]), part.rank, part, at))
    return min(found, key=lambda candidate: candidate[:3])[3:]


def _repeating(parts: Sequence[Part]) -> list[Part]:
    """Ranks that hold what a lower one holds already; all, if none does."""
    taken: set[int] = set()
    found = []
    for part in parts:
        mine = set(part.columns.tolist())
        if mine & taken:
            found.append(part)
        taken |= mine
    return found or list(parts)


def _before(reference: _Reference, point: Point, passed: _Passed) -> tuple[str, list[str], str]:
    """The module before `point` whose tensors agree, those since then that the reference does not have, and a hint.

    A module that the reference has under another name is known by what it gives.
    """
    last = next((name for name in reversed(passed.modules) if name != point.module), point.caller or "")
    names: list[str] = []
    hint = ""
    for record, other in (found for found in passed.unknown if found[1].kind == "output"):
        if (theirs := reference.same_as(record, other)) is not None:
            last, names = other.module, []
            rank = record.rank % reference.ranks
            hint = f"On rank {rank}, {last} gives what {theirs} does in the reference, and just that."
        elif other.module not in names:
            names.append(other.module)
    return last, names, hint


def _how(record: ModuleRecord, row: int) -> str:
    """What the scheduler did to this row, if anything."""
    number, position, turn, start = record.rows[row].tolist()
    sequence = record.sequences[number]
    mine = record.rows[record.rows[:, 0] == number]
    earlier = mine[mine[:, 2] < turn]
    weights = f"with {sequence.weights} weights" if sequence.weights != "initial" else ""
    if len(earlier) and int(earlier[:, 1].max()) >= start:
        return f"computed again after a preemption {weights}".strip()
    if start > 0 and position < sequence.prompt:
        return f"after {'a chunk boundary' if len(earlier) else 'a prefix-cache hit'} {weights}".strip()
    return weights


def _class_of(record: ModuleRecord, module: str) -> str:
    return record.classes.get(module, f"method of {record.classes.get('', 'the model')}")


def _tensor(record: ModuleRecord, point: Point, functional: bool) -> str:
    """Which one it is: its output, its second output, the first input of layers.0.attn."""
    alike = [p for p in record.points if p.key[::3] == point.key[::3] and p.kind == point.kind]
    if len(alike) == 1:
        which = ""
    elif point.part.isdigit() and int(point.part) < len(_ORDINALS):
        which = f"{_ORDINALS[int(point.part)]} "
    else:
        which = f"{point.part!r} "
    return f"the {which}input of {point.module}" if functional else f"its {which}{point.kind}"


def _span(columns: torch.Tensor) -> str:
    """Runs of consecutive columns: "0-31, 64-79"; of many runs the first three."""
    held = sorted({column for column in columns.tolist() if column >= 0})
    runs: list[list[int]] = []
    for column in held:
        if runs and column == runs[-1][1] + 1:
            runs[-1][1] = column
        else:
            runs.append([column, column])
    said = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs[:3])
    return said + (", ..." if len(runs) > 3 else "")
