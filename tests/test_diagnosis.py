"""The first module to differ is named: on made-up records, and on models with a mistake in one module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from genmodel.conformance import catalogue, text
from genmodel.conformance.diagnosis import Diagnosis, Finding, describe, first_difference
from genmodel.conformance.report import verdict_json
from genmodel.conformance.verdict import Level, Measurement, Status, Verdict
from genmodel.runners import recorded
from genmodel.runners.evidence import Failure, ModuleRecord, ModuleRun, Point, RecordedSequence
from genmodel.runners.recorded import chosen_positions
from genmodel.runners.scenarios import ENGINE_SCENARIOS
from genmodel.runners.session import Session, TargetOptions
from mutants import MUTANTS, Mutant
from mutants.one_place import FAULTS, Fault

NOISE = 1e-6
ROWS = 7
PROMPT = 4

# Made-up records: a model "layer" of "a", then "b", then "c" inside it --------------------------------------


def point(module: str, kind: Any, caller: str | None, values: Tensor, part: str = "0", **more: Any) -> Point:
    return Point(
        module=module, kind=kind, part=part, call=0, caller=caller, rows=torch.arange(ROWS), values=values, **more
    )


def true_points(width: int = 8) -> list[Point]:
    made = torch.Generator().manual_seed(0)
    x, a, b, c = (torch.randn(ROWS, width, generator=made) for _ in range(4))
    return [
        point("layer", "input", "", x),
        point("a", "input", "layer", x),
        point("a", "output", "layer", a),
        point("b", "input", "layer", a),
        point("b", "output", "layer", b),
        point("c", "input", "layer", b),
        point("c", "output", "layer", c),
        point("layer", "output", "", c + b),
        point("compute_logits", "output", None, 3 * c),
    ]


def record(points: Sequence[Point], rank: int = 0) -> ModuleRecord:
    positions = torch.arange(ROWS)
    return ModuleRecord(
        rank=rank,
        classes={"": "Model", "layer": "Layer", "a": "Linear", "b": "Norm", "c": "Linear"},
        sequences=(RecordedSequence(request="short", weights="initial", prompt=PROMPT, tokens=tuple(range(ROWS))),),
        rows=torch.stack([0 * positions, positions, (positions - PROMPT + 1).clamp(min=0), 0 * positions], 1),
        points=tuple(points),
    )


def run(*ranks: Sequence[Point], reference: Sequence[Point] | None = None) -> ModuleRun:
    exact = [replace(p, noise=torch.full([ROWS], NOISE)) for p in (true_points() if reference is None else reference)]
    return ModuleRun(
        scenario="plain",
        tensor_parallel_size=len(ranks),
        dtype="float32",
        ranks=tuple(record(points, rank) for rank, points in enumerate(ranks)),
        reference=record(exact),
    )


def changed(points: Sequence[Point], module: str, kind: str, by: float, rows: slice = slice(None)) -> list[Point]:
    """The points, with one and those of the layer's end moved."""
    moved = []
    for p in points:
        values = p.values.clone()
        if (p.module, p.kind) in ((module, kind), ("layer", "output"), ("compute_logits", "output")):
            values[rows] += by
        moved.append(replace(p, values=values))
    return moved


def cut(points: Sequence[Point], module: str, columns: Tensor, *, declared: bool) -> list[Point]:
    """The points, of which one output is a rank's share."""
    return [
        replace(p, values=p.values[:, columns], columns=columns if declared else None)
        if (p.module, p.kind) == (module, "output")
        else p
        for p in points
    ]


def found_in(made: ModuleRun) -> Finding:
    found = first_difference(made)
    assert found is not None
    assert describe(found)
    return found


def test_nothing_is_found_where_all_agrees() -> None:
    assert first_difference(run(true_points())) is None
    assert first_difference(run(changed(true_points(), "b", "output", 5 * NOISE))) is None


def test_a_wrong_module_is_named_with_phase_request_and_error() -> None:
    found = found_in(run(changed(true_points(), "b", "output", 0.5)))
    assert (found.module, found.module_class, found.between) == ("b", "Norm", None)
    assert (found.phase, found.request, found.input_good) == ("prompt", "short", True)
    assert found.error == pytest.approx(0.5, rel=1e-3)
    assert NOISE < found.allowed < 1e-4
    assert describe(found) == (
        f"First to differ: b (Norm), at TP=1, in the prompt of request short (position {found.position}). Its output "
        f"is off by 0.5, where {found.allowed:.2g} is allowed. What goes into it agrees, as do all 4 tensors compared "
        "before."
    )


@pytest.mark.parametrize(("rows", "phase"), [(slice(3, 4), "first token"), (slice(5, None), "decode")])
def test_the_first_phase_that_is_wrong_is_named(rows: slice, phase: str) -> None:
    assert found_in(run(changed(true_points(), "c", "output", 0.5, rows))).phase == phase


def test_a_wrong_input_is_the_fault_of_the_caller_between_two_modules() -> None:
    found = found_in(run(changed(changed(true_points(), "b", "output", 0.5), "b", "input", 0.1)))
    assert (found.module, found.between) == ("layer", ("a", "b"))
    assert "what layer (Layer) computes between a and b" in describe(found)


def test_a_module_whose_inner_ones_agree_is_wrong_in_its_own_code() -> None:
    found = found_in(run(changed(true_points(), "layer", "output", 0.5)))
    assert (found.module, found.own_code) == ("layer", True)
    assert "its own code" in describe(found)


def test_nan_is_a_difference() -> None:
    assert found_in(run(changed(true_points(), "a", "output", float("nan")))).module == "a"


def test_equal_infinities_are_none() -> None:
    masked = [replace(p, values=p.values.masked_fill(p.values > 1, -torch.inf)) for p in true_points()]
    assert first_difference(run(masked, reference=masked)) is None


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("shares", [(range(4), range(4, 8)), ((0, 1, 4, 5), (2, 3, 6, 7))])
def test_shares_are_compared_with_the_right_columns(shares: Sequence[Sequence[int]], declared: bool) -> None:
    right = [cut(true_points(), "a", torch.tensor(list(s)), declared=declared) for s in shares]
    assert first_difference(run(*right)) is None
    found = found_in(run(right[0], changed(right[1], "a", "output", 0.5)))
    assert (found.module, found.ranks, found.input_good) == ("a", (1,), True)
    assert "on rank 1" in describe(found)


def test_a_fault_in_decode_does_not_mislead_the_search_for_columns() -> None:
    shares = [cut(true_points(), "a", torch.tensor(s), declared=False) for s in ([1, 3, 5, 7], [0, 2, 4, 6])]
    found = found_in(run(shares[0], changed(shares[1], "a", "output", 0.5, slice(5, None))))
    assert (found.module, found.ranks, found.phase) == ("a", (1,), "decode")


def test_columns_that_no_rank_holds_are_a_difference() -> None:
    same = cut(true_points(), "a", torch.arange(4), declared=False)
    found = found_in(run(same, same))
    assert (found.module, found.ranks) == ("a", (1,))
    assert "no rank holds columns 4-7 of 8" in describe(found)


def test_a_share_of_unknown_layout_is_suspected_where_the_callers_code_seems_wrong() -> None:
    shares = [cut(true_points(), "a", torch.arange(4) + 4 * rank, declared=False) for rank in (0, 1)]
    found = found_in(run(*(changed(points, "b", "input", 0.5) for points in shares)))
    assert found.module == "layer"
    assert "On rank 0, a gives columns 0-3 of 8" in describe(found)


def test_modules_of_other_names_are_known_by_what_they_give() -> None:
    ours = [
        replace(p, module={"layer": "layer", "compute_logits": p.module}.get(p.module, f"my_{p.module}"))
        for p in changed(true_points(), "c", "output", 0.5)
    ]
    found = found_in(run(ours))
    assert found.module == "layer"
    assert found.candidates == ("my_c",)


def apart(points: Sequence[Point]) -> list[Point]:
    """The points of a model whose "b" takes positions too, and hands on a residual stream beside what it gives."""
    made = []
    for p in points:
        if (p.module, p.kind) == ("b", "input"):
            made += [
                point("b", "input", "layer", torch.arange(ROWS)[:, None].float(), name="positions"),
                replace(p, part="1", name="x"),
            ]
        elif (p.module, p.kind) == ("b", "output"):
            made += [p, replace(p, part="1", values=p.values + 1)]
        else:
            made.append(p)
    return made


def test_arguments_in_another_order_are_no_difference() -> None:
    assert first_difference(run(apart(true_points()))) is None


def test_a_module_that_gives_more_than_the_references_is_named() -> None:
    """What it gives goes into the next, and is wrong there."""
    wrong = changed(changed(true_points(), "b", "output", 0.5), "c", "input", 0.5)
    found = found_in(run(apart(changed(wrong, "c", "output", 0.5))))
    assert (found.module, found.between) == ("b", None)


# What the plugin and check_model are told ---------------------------------------------------------------------


def failed(check: str, where: str = "TP=1") -> Verdict:
    broken = Measurement(
        what="prompt: max", where=where, measured=1, allowed=0, detail="request short, position 3, token 1"
    )
    return Verdict(check=check, target="t", level=Level.REQUIRED, status=Status.FAILED, measurements=(broken,))


def test_each_scenario_is_run_again_once_and_the_plain_finding_is_enough() -> None:
    asked = []

    def rerun(scenario: str, size: int, focus: tuple[str, int] | None) -> ModuleRun:
        asked.append((scenario, size, focus))
        return run(changed(true_points(), "b", "output", 0.5))

    diagnosis = Diagnosis(rerun)
    for name in ("logits.values", "logits.kl", "logits.batching", "deployment.multiprocess"):
        assert diagnosis.explain(catalogue.get(name), failed(name)).startswith("First to differ: b (Norm)")
    assert asked == [("plain", 1, ("short", 3))]


def test_what_is_no_disagreement_has_no_diagnosis() -> None:
    diagnosis = Diagnosis(lambda *_: pytest.fail("nothing should run"))
    for name, where in (("gradients.numeric", "TP=1"), ("logits.values", "reference")):
        assert diagnosis.explain(catalogue.get(name), failed(name, where)) == ""
    passed = replace(failed("logits.values"), status=Status.PASSED)
    assert diagnosis.of(catalogue.get("logits.values"), passed) == passed


def test_a_diagnosis_that_goes_wrong_says_so_and_no_more() -> None:
    def broken(*_: Any) -> ModuleRun:
        raise OSError("no memory")

    check = catalogue.get("deployment.multiprocess")
    lost = Failure(kind="died", scenario="plain", message="host 0 died", phase="generating")
    assert Diagnosis(broken).explain(check, failed(check.id)) == "No diagnosis: OSError: no memory"
    assert Diagnosis(lambda *_: lost).explain(check, failed(check.id)) == "No diagnosis: host 0 died while generating"
    said = Diagnosis(lambda *_: run(true_points())).explain(check, failed(check.id))
    assert said.startswith("Deployed at TP=1 once more, with every module recorded: No module is beyond its own limit")
    staged = catalogue.get("deployment.pipeline")
    said = Diagnosis(lambda *_: run(true_points())).explain(staged, failed(staged.id))
    assert said.startswith("Pipeline at TP=1 once more")


@pytest.mark.parametrize("module", ["a", "b", "c"])
def test_a_diagnosis_never_contradicts_the_verdict(module: str) -> None:
    """Where no module is beyond its own limit, it says where the error grows most and by how much."""
    made = run(changed(true_points(), module, "output", 6 * NOISE))
    assert first_difference(made) is None
    check = catalogue.get("logits.values")
    said = Diagnosis(lambda *_: made).explain(check, failed(check.id))
    assert re.search(rf"grows most at {module} \(\w+\), at TP=1.* off by 6e-06, \d\d% of the .* beyond 0%", said), said
    assert "agree" not in said


def test_what_has_no_counterpart_is_said() -> None:
    mine = [replace(p, module=f"my_{p.module}") for p in true_points()]
    check = catalogue.get("logits.values")
    said = Diagnosis(lambda *_: run(mine)).explain(check, failed(check.id))
    assert "no module has a counterpart" in said


def test_a_failure_tells_where_it_begins() -> None:
    check = catalogue.get("logits.values")
    verdict = Diagnosis(lambda *_: run(changed(true_points(), "b", "output", 0.5))).of(check, failed(check.id))
    told = text.failure(verdict, check, "pytest this")
    assert "Where it begins\n  First to differ: b (Norm), at TP=1" in told
    assert told.index("worst first") < told.index("Where it begins") < told.index("Usual causes")
    assert verdict_json(verdict)["diagnosis"] == verdict.diagnosis


@pytest.mark.parametrize("count", [2, 5, 30, 100])
def test_positions_that_fit_hold_the_focus_and_the_edges(count: int) -> None:
    chosen = chosen_positions(prompt=20, length=40, count=count, focus=33)
    assert len(chosen) == min(count, 40)
    assert 33 in chosen
    assert chosen <= set(range(40))
    assert count < 5 or {0, 19, 20} <= chosen


# Real engines -------------------------------------------------------------------------------------------------

PLACED = [mutant for mutant in MUTANTS if mutant.at is not None]
CASES: list[Mutant | Fault] = [*PLACED, *FAULTS]
OPTIONS = {
    f.name: TargetOptions(
        spec=f"mutant:{f.name}",
        target=f.factory,
        tensor_parallel_sizes=f.tp if isinstance(f, Mutant) else (f.tp,),
        reference=f.reference,
        config=f.config if isinstance(f, Mutant) else None,
    )
    for f in CASES
}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(OPTIONS.values()) as running:
        yield running


def diagnosed(session: Session, fault: Mutant | Fault) -> Finding | None:
    """The first finding in the scenarios of the check that catches the fault."""
    options = OPTIONS[fault.name]
    session.collect(options, {"inspection"})
    needs = catalogue.get(fault.checks[0]).needs if isinstance(fault, Mutant) else {"plain"}
    for scenario in [name for name in ENGINE_SCENARIOS if name in needs] or ["plain"]:
        made = session.diagnose(options, scenario, max(options.tensor_parallel_sizes))
        assert isinstance(made, ModuleRun), made
        if (found := first_difference(made)) is not None:
            return found
    return None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_module_ranks_and_phase_of_a_fault_are_right(session: Session, fault: Fault) -> None:
    found = diagnosed(session, fault)
    assert found is not None
    assert (found.module, found.ranks, found.phase) == (fault.at, fault.ranks, fault.phase), describe(found)


def test_few_positions_of_a_large_model_are_enough(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "BUDGET", 1 << 20)
    fault = next(fault for fault in FAULTS if fault.name == "down_in_decode")
    session.collect(OPTIONS[fault.name], {"inspection"})
    made = session.diagnose(OPTIONS[fault.name], "plain", 1, ("short", 16))
    assert isinstance(made, ModuleRun)
    assert len(made.reference.rows) < 50
    found = found_in(made)
    assert (found.module, found.phase) == (fault.at, fault.phase)


def test_nine_of_ten_mutants_of_one_module_are_placed(session: Session) -> None:
    found = {mutant.name: diagnosed(session, mutant) for mutant in PLACED}
    missed = [m.name for m in PLACED if (f := found[m.name]) is None or f.module != m.at]
    assert len(missed) <= 0.1 * len(PLACED), missed
