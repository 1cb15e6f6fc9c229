"""The suite as one function call, for those who do not want a pytest run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from genmodel.conformance.catalogue import judge, select
from genmodel.conformance.replay import Replay, diagnosis_of, save_run
from genmodel.conformance.verdict import Level, Verdict
from genmodel.runners.archive import index
from genmodel.runners.session import Session, TargetOptions


def check_model(
    target: str | Callable[..., Any],
    *,
    config: str | Path | None = None,
    reference: str | None = None,
    names: str | Mapping[str, str | Sequence[str]] | None = None,
    weights: str | Path | None = None,
    tp: Sequence[int] = (1, 2),
    dtype: str = "float32",
    top_k: int = 10,
    timeout: float | None = None,
    level: Level = Level.RECOMMENDED,
    checks: Collection[str] | None = None,
    save_evidence: str | Path | None = None,
    replay: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Verdict]:
    """Run a model through PyTorch and real vLLM engines and judge it.

    Only the scenarios that the chosen checks need are run, in processes of their own.

    Args:
        target: "module:attr", an architecture of vLLM's own, or the class or factory itself.
        config: a JSON file, "module:attr" or "tiny"; None means a tiny default.
        reference: "module:attr" of an independent factory, or a class "transformers:NAME"; None means the
            target's own pure-PyTorch run, and transformers' class for one of vLLM's own architectures.
        names: the model's parameter names with the reference's, where they differ: a TOML file, "module:attr"
            or a dict.
        weights: a directory with safetensors; None means seeded adversarial weights.
        tp: tensor-parallel sizes of the engines.
        dtype: what the engines compute in.
        top_k: how many of the best tokens have to be in the reference's order.
        timeout: seconds that any one phase of a scenario may take; None means 120, and more for large models.
        level: REQUIRED leaves recommended checks out.
        checks: ids such as "logits.values"; None means all of `level`.
        save_evidence: a directory to write what the scenarios gave into.
        replay: such a directory, to judge what it holds of `target` instead of running anything: config, reference,
            weights, tp, dtype and top_k are then those of the saved run, and checks whose scenarios were not run are in
            error.
        progress: called with one line whenever something slow begins.

    Returns:
        One verdict per check, in catalogue order. `all(not v.blocking for v in verdicts)` is a pass.

    Raises:
        UnknownCheck: for an id that does not exist.
        UnusableTarget: for a target or options that cannot be used.
        ArchiveError: for a `replay` that is not what `save_evidence` writes.

    Example:
        >>> for verdict in check_model("my_pkg:factory", tp=(1,)):
        ...     print(verdict.check, verdict.status, verdict.reason)
    """
    chosen = select(ids=checks, level=level)
    options = TargetOptions(
        spec=target if isinstance(target, str) else describe(target),
        target=None if isinstance(target, str) else target,
        config=None if config is None else str(config),
        reference=reference,
        names=names,
        weights=None if weights is None else Path(weights),
        tensor_parallel_sizes=tuple(tp),
        dtype=dtype,
        top_k=top_k,
        timeout=timeout,
    )
    source = Session([options], progress) if replay is None else Replay(index(Path(replay)))
    with contextlib.closing(source) as session:
        scenarios = frozenset().union(*(check.needs for check in chosen))
        evidence = session.collect(options, scenarios)
        diagnosis = diagnosis_of(session, options)
        verdicts = [diagnosis.of(check, judge(check, evidence)) for check in chosen]
    if save_evidence is not None:
        save_run(Path(save_evidence), evidence, scenarios, diagnosis.findings)
    return verdicts


def describe(target: Callable[..., Any]) -> str:
    """What reports call a target that has no "module:attr"."""
    named = target if hasattr(target, "__qualname__") else type(target)
    return f"{named.__module__}:{named.__qualname__}"
