"""Which positions of which sequences a diagnosis keeps: all of them, or what fits."""

from __future__ import annotations

from genmodel.runners.evidence import Inspection
from genmodel.runners.scenarios import DEPLOYMENTS, ENGINE_SCENARIOS, Plan

BUDGET = 64 << 20
"""Bytes of recorded values per rank, roughly."""


def recorded_positions(
    inspection: Inspection, drafted: Plan, scenario: str, focus: tuple[str, int] | None
) -> dict[tuple[int, ...], frozenset[int]]:
    """Which positions a diagnosis keeps, by prompt; all of them for models small enough."""
    passes = ENGINE_SCENARIOS["plain" if scenario in DEPLOYMENTS else scenario].passes
    batches = (batch for through in passes for batch in through.batches(drafted))
    requests = [request for batch in batches for request in batch]
    count = quota(inspection.hidden_size, drafted.vocab_size, len(inspection.attention), len(requests))
    name, position = focus or ("", 0)
    return {
        r.prompt: chosen_positions(
            len(r.prompt), len(r.prompt) + r.max_tokens - 1, count, position if r.name == name else None
        )
        for r in requests
    }


def quota(hidden_size: int, vocab_size: int, layers: int, sequences: int) -> int:
    """How many positions of each sequence to keep, so that a record stays within BUDGET."""
    row = 4 * (24 * hidden_size * layers + 4 * vocab_size)  # a decoder's layer has about 24 tensors of hidden size
    return max(2, BUDGET // row // max(1, sequences))


def chosen_positions(prompt: int, length: int, count: int, focus: int | None = None) -> frozenset[int]:
    """At most `count` positions of a sequence, or all: where something fails first, then evenly spread.

    Args:
        prompt: length of the prompt.
        length: of the whole sequence.
        count: how many to keep.
        focus: a position known to be wrong.
    """
    if count >= length:
        return frozenset(range(length))
    spread = [i * (length - 1) // max(1, count - 1) for i in range(count)]
    wanted = [*([] if focus is None else [focus]), prompt - 1, prompt, 0, *spread]
    return frozenset(list(dict.fromkeys(p for p in wanted if 0 <= p < length))[:count])
