"""How checks get at evidence: what is absent or failed becomes `NoEvidence`, never an AttributeError."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from genmodel.conformance.verdict import REFERENCE, NotApplicable, row
from genmodel.runners.evidence import (
    Evidence,
    Failure,
    Gradients,
    Inspection,
    Precision,
    RankGradients,
    ReferenceRun,
    Trace,
    WeightAudit,
)

T = TypeVar("T")


class NoEvidence(Exception):
    """A scenario that a check needs gave nothing; `failure` is None if it was never run."""

    def __init__(self, scenario: str, where: str, failure: Failure | None) -> None:
        super().__init__(scenario)
        self.scenario = scenario
        self.where = where
        self.failure = failure


def inspection(evidence: Evidence) -> Inspection:
    """What the target is and builds; raises NoEvidence."""
    return _present(evidence.inspection, "inspection", REFERENCE)


def gradients(evidence: Evidence) -> Gradients:
    """What training the model showed.

    Raises:
        NotApplicable: for models built of vLLM's own layers, which do not train.
        NoEvidence: if the scenario failed or was not run.
    """
    _require_training(evidence)
    return _present(evidence.gradients, "gradients", REFERENCE)


def precision(evidence: Evidence) -> Precision:
    """In which dtypes the target computes outside any engine, and how large its values are; raises as `gradients`."""
    _require_training(evidence)
    return _present(evidence.precision, "precision", REFERENCE)


def reference(evidence: Evidence) -> ReferenceRun:
    """The logits that engines are compared with; raises NoEvidence."""
    return _present(evidence.reference, "reference", REFERENCE)


def reference_of(evidence: Evidence, trace: Trace) -> ReferenceRun:
    """The reference for the weights and the dtype of this trace; raises NoEvidence."""
    key = (trace.weights, trace.proof.dtype)
    if key == ("initial", evidence.target.dtype):
        return reference(evidence)
    return _present(evidence.references.get(key), "reference", REFERENCE)


def ranks(evidence: Evidence, scenario: str, size: int) -> tuple[Trace, ...]:
    """The traces of every rank of one engine, at least one.

    Raises:
        NotApplicable: if a model like this cannot be run in this way.
        NoEvidence: if the scenario failed or was not run.
    """
    if (scenario, size) in evidence.inapplicable:
        raise NotApplicable(evidence.inapplicable[scenario, size])
    return _present(evidence.traces.get((scenario, size)) or None, scenario, row(size))


def rank_zero(evidence: Evidence, scenario: str, size: int) -> Trace:
    """The trace of rank 0, the one that is compared with other runs; raises what `ranks` does."""
    for trace in ranks(evidence, scenario, size):
        if trace.rank == 0:
            return trace
    raise NoEvidence(scenario, row(size), None)


def audits(evidence: Evidence, size: int) -> tuple[WeightAudit, ...]:
    """What every rank of vLLM's workers holds of the coded checkpoint.

    Raises:
        NotApplicable: if the checkpoint could not be coded.
        NoEvidence: if the scenario failed or was not run.
    """
    if evidence.uncoded:
        raise NotApplicable(evidence.uncoded)
    return _present(evidence.weights.get(size) or None, "weights", row(size))


def every_audit(evidence: Evidence, smallest: int = 1) -> Iterator[tuple[WeightAudit, ...]]:
    """Yield the audits of each size of at least `smallest` that has them, then raise for the first that has not."""
    absent: NoEvidence | None = None
    for size in sizes(evidence):
        if size < smallest:
            continue
        try:
            found = audits(evidence, size)
        except NoEvidence as error:
            absent = absent or error
        else:
            yield found
    if absent is not None:
        raise absent


def whole_model(evidence: Evidence) -> WeightAudit:
    """What the model holds at TP=1, which tells what belongs where; raises what `audits` does."""
    try:
        return audits(evidence, 1)[0]
    except NoEvidence as absent:
        raise _nothing_to_compare(evidence, absent) from None


def rank_gradients(evidence: Evidence, size: int) -> tuple[RankGradients, ...]:
    """The gradients of every rank of a standalone process group; raises what `gradients` and `audits` do."""
    _require_training(evidence)
    if evidence.uncoded:
        raise NotApplicable(evidence.uncoded)
    return _present(evidence.parallel_gradients.get(size) or None, "parallel_gradients", row(size))


def whole_gradients(evidence: Evidence) -> RankGradients:
    """The gradients at TP=1, which those of ranks are slices of; raises what `rank_gradients` does."""
    try:
        return rank_gradients(evidence, 1)[0]
    except NoEvidence as absent:
        raise _nothing_to_compare(evidence, absent) from None


def _require_training(evidence: Evidence) -> None:
    """Raise NotApplicable for models that do not train."""
    if inspection(evidence).native:
        raise NotApplicable("built of vLLM's own layers, whose parameters are created with requires_grad=False")


def _nothing_to_compare(evidence: Evidence, absent: NoEvidence) -> NoEvidence | NotApplicable:
    """A model that was not asked to run at TP=1 need not be able to."""
    failure = absent.failure
    if failure is None or failure.kind in ("proof", "slow") or 1 in sizes(evidence):
        return absent
    return NotApplicable(f"it takes the model at TP=1 to compare with: {failure.message}")


def sizes(evidence: Evidence) -> tuple[int, ...]:
    """The tensor-parallel sizes asked for, ascending."""
    return tuple(sorted(evidence.target.tensor_parallel_sizes))


def every_size(evidence: Evidence, *scenarios: str) -> Iterator[int]:
    """Yield each size at which all `scenarios` have evidence, then raise NoEvidence for the first that has not.

    What can be measured is measured before the check fails for what cannot. Sizes at which a scenario does not apply
    are left out; NotApplicable is raised if it applies at none.
    """
    absent: NoEvidence | None = None
    inapplicable: NotApplicable | None = None
    measured = False
    for size in sizes(evidence):
        try:
            for scenario in scenarios:
                rank_zero(evidence, scenario, size)
        except NoEvidence as error:
            absent = absent or error
        except NotApplicable as error:
            inapplicable = inapplicable or error
        else:
            measured = True
            yield size
    if absent is not None:
        raise absent
    if inapplicable is not None and not measured:
        raise inapplicable


def _present(found: T | Failure | None, scenario: str, where: str) -> T:
    if found is None or isinstance(found, Failure):
        raise NoEvidence(scenario, where, found)
    return found
