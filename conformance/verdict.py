"""What a check returns, and how the harness states it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum


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
        """`measured` as a share of `allowed`; 0 or infinity where nothing is allowed, NaN for NaN."""
        if math.isnan(self.measured) or math.isnan(self.allowed):
            return math.nan
        if self.measured <= 0:
            return 0.0
        return self.measured / self.allowed if self.allowed > 0 else math.inf


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
