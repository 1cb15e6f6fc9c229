"""What a check returns, and how the harness states it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

REFERENCE = "reference"
"""Row of the summary table for what was measured in pure PyTorch, outside any engine."""

_NAMES_SHOWN = 4  # of what violates a law, before "and N more"


def row(size: int) -> str:
    """Row of the summary table for engines of this tensor-parallel size."""
    return f"TP={size}"


class Status(StrEnum):
    """How a check ended. Everything but `PASSED`, `XFAILED` and `NOT_APPLICABLE` fails the run."""

    PASSED = "passed"
    FAILED = "failed"
    XFAILED = "xfailed"
    XPASSED = "xpassed"
    NOT_APPLICABLE = "not applicable"
    ERROR = "error"
    """The harness's own fault, such as a scenario that could not prove its path."""


class Level(StrEnum):
    """How much a check weighs; `--genmodel-level` chooses what runs."""

    REQUIRED = "required"
    RECOMMENDED = "recommended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number against its limit: `measured` must not exceed `allowed`.

    Facts that are not numbers are stated as counts of violations with `allowed=0`.
    """

    what: str
    """What was measured, such as "max |logit difference|"."""
    where: str
    """Row of the summary table: "reference", "TP=1" or "TP=2"."""
    measured: float
    allowed: float
    detail: str = ""
    """Where it is worst, such as "request long_prefix_b, position 71, token 17, rank 1"."""

    @property
    def ok(self) -> bool:
        """False for NaN, and for an infinite limit, which would let anything pass."""
        return math.isfinite(self.allowed) and self.measured <= self.allowed

    @property
    def ratio(self) -> float:
        """`measured` as a share of `allowed`; 0 or infinity where nothing is allowed, NaN where `ok` cannot be told."""
        if math.isnan(self.measured) or not math.isfinite(self.allowed):
            return math.nan
        if self.measured <= 0:
            return 0.0
        return self.measured / self.allowed if self.allowed > 0 else math.inf

    @property
    def severity(self) -> tuple[bool, float]:
        """Sort key: the larger, the worse; NaN is worst."""
        return math.isnan(self.ratio), self.ratio


def violations(what: str, found: Sequence[str], where: str = REFERENCE) -> Measurement:
    """A law about facts as a measurement: `found` names what breaks it, and nothing may."""
    hidden = len(found) - _NAMES_SHOWN
    detail = "; ".join(found[:_NAMES_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
    return Measurement(what=what, where=where, measured=len(found), allowed=0, detail=detail)


class NotApplicable(Exception):
    """Raised by a check that does not concern this target; the message is the reason shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of one check on one target."""

    check: str
    target: str
    level: Level
    status: Status
    reason: str = ""
    """Why not applicable, failed without measurements, xfailed or in error: one line."""
    details: str = ""
    """Supporting lines: a trimmed traceback or the end of a log."""
    diagnosis: str = ""
    """Where the failure begins: the first module at which engine and reference part, in words."""
    where: str = ""
    """Row of the summary table whose evidence is missing, if any is."""
    measurements: tuple[Measurement, ...] = field(default=())
    seconds: float = 0.0

    @property
    def blocking(self) -> bool:
        """Whether this verdict alone makes the run fail."""
        if self.status in (Status.ERROR, Status.XPASSED):
            return True
        return self.status is Status.FAILED and self.level is Level.REQUIRED
