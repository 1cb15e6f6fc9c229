"""What a report draws of a target's evidence, as plain JSON: errors and noise by position, and top-K overlap."""

from __future__ import annotations

from typing import Any

import torch

from genmodel.conformance import agreement
from genmodel.conformance.access import NoEvidence, reference_of
from genmodel.conformance.alignment import Aligned, Phase, Rows, with_reference
from genmodel.conformance.catalogue import one_thread
from genmodel.runners.evidence import Evidence, Trace

PHASES = (Phase.PROMPT, Phase.FIRST, Phase.DECODE)
HUGE = 1e30
POINTS = 160
"""Most positions drawn of a phase; of several that fall together, the worst by its limit stands for all."""


def curves(evidence: Evidence) -> list[dict[str, Any]]:
    """For each trace of rank 0: by phase, the error at each position beside the noise floor and what is allowed.

    A position's error is the largest |logit difference| over candidates and requests; `noise` and `allowed` are those
    of the request it is worst for. `overlap` is how many of the engine's top K are among the reference's, the
    fewest over requests.
    """
    traces = [trace for ranks in evidence.traces.values() if isinstance(ranks, tuple) for trace in ranks]
    with one_thread():
        found = [_of_trace(evidence, trace) for trace in traces if trace.rank == 0]
    return [curve for curve in found if curve["phases"]]


def _of_trace(evidence: Evidence, trace: Trace) -> dict[str, Any]:
    phases: dict[str, Any] = {}
    for phase in PHASES:
        try:
            aligned = with_reference(reference_of(evidence, trace), trace, phase)
        except (NoEvidence, ValueError):
            continue  # a check says so
        if aligned.rows:
            phases[phase.value] = _of_phase(aligned, evidence.target.top_k)
    return {
        "scenario": trace.scenario,
        "tensor_parallel_size": trace.tensor_parallel_size,
        "dtype": trace.proof.dtype,
        "k": evidence.target.top_k,
        "phases": phases,
    }


def _of_phase(aligned: Aligned, k: int) -> dict[str, list[float]]:
    limits = agreement.tolerance(aligned)
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("position", "error", "noise", "allowed", "overlap")}
    for rows in aligned.blocks():
        columns["position"].append(torch.arange(rows.first, rows.first + len(rows.ids)))
        columns["error"].append((rows.values - rows.expected).abs().amax(dim=1).double())
        columns["noise"].append(rows.noise_max.double())
        columns["allowed"].append(limits.max(rows))
        columns["overlap"].append(_overlap(rows, k).double())
    together = {name: torch.cat(parts) for name, parts in columns.items()}
    return _thinned(**together)


def _overlap(rows: Rows, k: int) -> torch.Tensor:
    """[N], how many of the engine's best k tokens are among the reference's best k."""
    count = min(k, rows.ids.shape[1], rows.reference.shape[1])
    best = rows.reference.topk(count, dim=1).indices
    return (rows.ids[:, :count, None] == best[:, None, :]).any(dim=2).sum(dim=1)


def _thinned(
    position: torch.Tensor, error: torch.Tensor, noise: torch.Tensor, allowed: torch.Tensor, overlap: torch.Tensor
) -> dict[str, list[float]]:
    """One point for each position, or for each of POINTS stretches of them."""
    first, last = int(position.min()), int(position.max())
    width = -(-(last - first + 1) // POINTS)
    stretch = (position - first) // width
    severity = (error / allowed).nan_to_num(torch.inf, torch.inf)
    found: dict[str, list[float]] = {name: [] for name in ("position", "error", "noise", "allowed", "overlap")}
    for number in stretch.unique().tolist():
        here = (stretch == number).nonzero()[:, 0]
        worst = here[severity[here].argmax()]
        found["position"].append(int(position[worst]))
        found["overlap"].append(float(overlap[here].min()))
        for name, values in (("error", error), ("noise", noise), ("allowed", allowed)):
            found[name].append(_finite(float(values[worst])))
    return found


def _finite(x: float) -> float:
    """JSON has neither NaN nor infinities; what is drawn in their place is far above everything."""
    return x if x < HUGE else HUGE  # noqa: FURB136 - min() would keep a NaN
