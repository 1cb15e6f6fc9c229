"""The catalogue of checks: what a check is, which there are, and how one is judged on evidence.

A check is a plain function from `Evidence` to measurements, declared with `@check` in a module of
`genmodel.conformance.checks`. Its docstring is what people read when it fails:

    @check(needs=("reference", "plain"))
    def prefill_top_k(evidence: Evidence) -> Iterator[Measurement]:
        \"\"\"One sentence that must hold.

        Usual causes:
            what breaks it
        How to fix:
            what to do, with code where that is short
        Reports:
            #123 owner/project#45
        \"\"\"
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

from genmodel.conformance.access import NoEvidence, sizes
from genmodel.conformance.verdict import Level, Measurement, NotApplicable, Status, Verdict
from genmodel.runners.evidence import Evidence, Failure
from genmodel.runners.scenarios import SCENARIOS

GROUPS = ("interface", "gradients", "weights", "parallelism", "logits", "scheduling", "refit", "deployment")
"""Modules of `genmodel.conformance.checks`, in the order in which their checks run and are reported."""

CheckFunction = Callable[[Evidence], Iterable[Measurement]]

F = TypeVar("F", bound=CheckFunction)

_SECTIONS = {"Usual causes:": "causes", "How to fix:": "fix", "Reports:": "reports"}
_ATTRIBUTE = "__genmodel_check__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One law, and what it takes to judge it."""

    id: str
    """"<group>.<function>", such as "logits.prefill_top_k"; never changes once released."""
    group: str
    level: Level
    needs: frozenset[str]
    """Scenarios whose evidence it reads, of `genmodel.runners.scenarios.SCENARIOS`."""
    tensor_parallel: int
    """Not applicable unless a tensor-parallel size at least this large was asked for."""
    function: CheckFunction
    claim: str
    causes: str
    fix: str
    reports: tuple[str, ...]
    """Public bug reports; a bare #number is in vllm-project/vllm."""


class UnknownCheck(LookupError):
    """No check has this id; the message is one line that names the closest ones."""


def check(*, needs: Collection[str], level: Level = Level.REQUIRED, tensor_parallel: int = 1) -> Callable[[F], F]:
    """Declare the decorated function a check; it stays the plain function it was.

    Raises:
        ValueError: if `needs` names something that is no scenario.
    """
    if unknown := set(needs) - set(SCENARIOS):
        raise ValueError(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")

    def declare(function: F) -> F:
        group = function.__module__.rpartition(".")[2]
        sections = _sections(inspect.getdoc(function) or "")
        declared = Check(
            id=f"{group}.{function.__name__}",
            group=group,
            level=level,
            needs=frozenset(needs),
            tensor_parallel=tensor_parallel,
            function=function,
            claim=" ".join(sections["claim"].split()),
            causes=sections["causes"],
            fix=sections["fix"],
            reports=tuple(sections["reports"].split()),
        )
        setattr(function, _ATTRIBUTE, declared)
        return function

    return declare


@functools.cache
def all_checks() -> tuple[Check, ...]:
    """Every check, by group in the order of `GROUPS` and within a group as written."""
    modules = (importlib.import_module(f"genmodel.conformance.checks.{group}") for group in GROUPS)
    return tuple(found for module in modules for found in _declared_in(module))


def get(check_id: str) -> Check:
    """The check of this id; raises UnknownCheck with the closest ids there are."""
    by_id = {found.id: found for found in all_checks()}
    if check_id in by_id:
        return by_id[check_id]
    close = difflib.get_close_matches(check_id, by_id, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(by_id)}"
    raise UnknownCheck(f"no check {check_id!r}; {hint}")


def select(
    *, ids: Collection[str] | None = None, groups: Collection[str] | None = None, level: Level = Level.RECOMMENDED
) -> tuple[Check, ...]:
    """The checks that match all that is given, in catalogue order.

    Args:
        ids: exact ids; None means all. Raises UnknownCheck.
        groups: names of `GROUPS`; None means all.
        level: REQUIRED leaves out what is only recommended.
    """
    wanted = None if ids is None else {get(check_id).id for check_id in ids}
    return tuple(
        found
        for found in all_checks()
        if (wanted is None or found.id in wanted)
        and (groups is None or found.group in groups)
        and (level is Level.RECOMMENDED or found.level is Level.REQUIRED)
    )


def judge(check: Check, evidence: Evidence) -> Verdict:
    """Run one check on evidence. Never raises: whatever goes wrong is a verdict.

    It passes only if it measured something and every measurement is within its limit. Missing evidence
    that is the model's doing fails it, the harness's own faults are errors, and what was measured before
    either is kept.
    """
    began = time.perf_counter()
    measurements: list[Measurement] = []
    where = details = ""
    try:
        _require_size(check, evidence)
        with one_thread():
            measurements.extend(check.function(evidence))
        status, reason = _outcome(measurements)
    except NotApplicable as inapplicable:
        status, reason = Status.NOT_APPLICABLE, str(inapplicable)
        if measurements:
            status, reason = Status.ERROR, f"called not applicable after it had measured: {reason}"
    except NoEvidence as absent:
        status, reason, details = _without_evidence(absent)
        where = absent.where
    except Exception as error:  # noqa: BLE001 - a broken check must not take the report of all others down
        status, reason = Status.ERROR, f"the check itself raised {type(error).__name__}: {error}"
        details = traceback.format_exc()
    return Verdict(
        check=check.id,
        target=evidence.target.name,
        level=check.level,
        status=status,
        reason=reason,
        details=details,
        where=where,
        measurements=tuple(measurements),
        seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch without its thread pool.

    What checks compute is limited by memory, and other processes hold the other cores: waiting for a thread that has
    lost its core was measured to cost eight times what a second one gains.
    """
    import torch  # not at the top: listing the checks must not cost it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_size(check: Check, evidence: Evidence) -> None:
    asked = sizes(evidence)
    if max(asked, default=0) < check.tensor_parallel:
        wanted, found = check.tensor_parallel, ", ".join(map(str, asked)) or "none"
        raise NotApplicable(f"needs a tensor-parallel size of {wanted} or more; asked for: {found}")


def _outcome(measurements: Collection[Measurement]) -> tuple[Status, str]:
    if not measurements:
        return Status.ERROR, "the check measured nothing"
    return (Status.PASSED if all(m.ok for m in measurements) else Status.FAILED), ""


def _without_evidence(absent: NoEvidence) -> tuple[Status, str, str]:
    """Status, reason and details."""
    failure = absent.failure
    if failure is None:
        return Status.ERROR, f"no evidence: the {absent.scenario} scenario was not run at {absent.where}", ""
    status = Status.ERROR if failure.kind in ("proof", "slow") else Status.FAILED
    return status, f"no evidence: {_happened(failure)}", failure.details


def _happened(failure: Failure) -> str:
    """One line, the same for all scenarios that one cause took down."""
    rank = "" if failure.rank is None else f" (rank {failure.rank})"
    said = not failure.phase or failure.message.endswith(f"while {failure.phase}")
    phase = "" if said else f" while {failure.phase}"
    return f"{failure.message}{phase}{rank}"


def _declared_in(module: ModuleType) -> list[Check]:
    found = (getattr(value, _ATTRIBUTE, None) for value in vars(module).values())
    return [value for value in found if isinstance(value, Check) and value.function.__module__ == module.__name__]


def _sections(doc: str) -> dict[str, str]:
    """The docstring's parts by field name; text before the first heading is the claim."""
    lines: dict[str, list[str]] = {"claim": [], **{name: [] for name in _SECTIONS.values()}}
    current = "claim"
    for line in doc.splitlines():
        if line.strip() in _SECTIONS:
            current = _SECTIONS[line.strip()]
        else:
            lines[current].append(line)
    return {name: inspect.cleandoc("\n".join(["", *part])) for name, part in lines.items()}
