"""One session of hosts that turns targets into evidence."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from genmodel.runners.evidence import Evidence, TargetInfo

SCENARIOS = ("inspection", "gradients", "reference", "plain", "alone", "deployed")


class UnusableTarget(Exception):
    """The target or its options cannot be used; the message is one line that says what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """What an author asks for; fields are the `--genmodel-*` options of the same name."""

    spec: str
    config: str | None = None
    """A JSON file or "module:attr" (a dict, a Hugging Face config, or a function returning either)."""
    reference: str | None = None
    """ "module:attr" of an independent factory; None means the factory itself outside vLLM."""
    weights: Path | None = None
    """A directory with safetensors; None means seeded adversarial weights."""
    tensor_parallel_sizes: tuple[int, ...] = (1, 2)
    dtype: str = "float32"
    top_k: int = 10
    seed: int = 0
    target: object = None
    """The factory itself, for callers in Python that have no "module:attr"; None means `spec` names it."""


class Session:
    """Host processes started once and shared by every target; a context manager.

    Args:
        options: the targets; the largest tensor-parallel size among them is the number of hosts.
        progress: called with one line whenever something slow begins or ends.

    Raises:
        UnusableTarget: (from any method) for a user's mistake, such as a missing vLLM.
    """

    def __init__(self, options: Collection[TargetOptions], progress: Callable[[str], None] = lambda line: None) -> None: ...

    def start(self) -> None:
        """Start importing in the hosts and return at once."""

    def resolve(self, options: TargetOptions) -> TargetInfo:
        """Import the target in a host; raises UnusableTarget."""
        raise NotImplementedError

    def collect(self, options: TargetOptions, scenarios: Collection[str] = SCENARIOS) -> Evidence:
        """Run what is named (and what that needs) and return the evidence; cached per target."""
        raise NotImplementedError

    def close(self) -> None:
        """End the hosts; leaves no process behind."""

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
