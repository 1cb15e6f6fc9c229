"""Evidence on disk, to be judged again elsewhere: JSON for what is plain, safetensors for tensors, never pickle.

    DIR/<target>/evidence.json          format, version, which scenarios were run, the evidence
    DIR/<target>/tensors.safetensors    tensors under the SHA-256 of their content

Whatever else lies in DIR is left alone. What is read may come from anybody: names of files are fixed, links are not
followed, sizes are bounded, and everything that is not what `genmodel.runners.evidence` declares is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import genmodel
from genmodel.runners import plain
from genmodel.runners.evidence import (
    CodedTensor,
    Evidence,
    Failure,
    RankGradients,
    ReferenceRun,
    Request,
    Scores,
    TargetInfo,
    Trace,
    WeightAudit,
)
from genmodel.runners.plain import Unreadable
from genmodel.runners.scenarios import SCENARIOS

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

FORMAT = "genmodel evidence"
VERSION = 1
"""Goes up when an older archive can no longer be read: a field was removed, or added without a default."""

DOCUMENT = "evidence.json"
TENSORS = "tensors.safetensors"
LARGEST_DOCUMENT = 256 << 20
"""Bytes; the evidence of the reference models takes a few hundred thousand."""
LARGEST_TENSORS = 32 << 30
MOST_TARGETS = 64
LARGEST_SIZE = 4096
"""Ranks."""
LARGEST_CHECKPOINT = 2**46
"""Elements: more than any model has."""


class ArchiveError(ValueError):
    """An archive that cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One target in an archive."""

    folder: Path
    target: TargetInfo
    scenarios: frozenset[str]
    """What was run."""
    environment: Mapping[str, str]
    findings: Any
    """JSON that the saver put there, unread."""
    document: Any
    """The evidence as JSON, of which only what is above was read."""

    def evidence(self) -> Evidence:
        """All of it, tensors included.

        Raises:
            ArchiveError: if it is damaged or not evidence.
        """
        with _in_one_line(self.folder / DOCUMENT):
            with _Stored(self.folder / TENSORS) as stored:
                found: Evidence = plain.decode(self.document, Evidence, stored.tensor, "evidence")
            _require_sense(found)
        return found


def save(directory: Path, evidence: Evidence, scenarios: Collection[str], findings: object = ()) -> Path:
    """Write a target's evidence into its folder of an archive, over what was there of the same target.

    The same evidence gives the same bytes.

    Args:
        directory: the archive; made if need be.
        evidence: what to write.
        scenarios: what was run, of `genmodel.runners.scenarios.SCENARIOS`.
        findings: more that is plain JSON, given back as it is.

    Returns:
        The folder.
    """
    from safetensors.torch import save as to_bytes

    tensors = plain.Tensors()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "genmodel": genmodel.__version__,
        "scenarios": sorted(scenarios),
        "findings": findings,
        "evidence": plain.encode(evidence, Evidence, tensors),
    }
    folder = directory / folder_name(evidence.target.spec)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TENSORS, to_bytes(dict(sorted(tensors.contents.items()))))
    _write(folder / DOCUMENT, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return folder


def index(directory: Path) -> dict[str, Saved]:
    """The targets in an archive by their spec; reads no tensors and imports no torch.

    Raises:
        ArchiveError: if there are none, or one is not what `save` writes.
    """
    folders = sorted(path.parent for path in directory.glob(f"*/{DOCUMENT}"))
    if not folders:
        raise ArchiveError(f"no saved evidence in {directory}: no */{DOCUMENT}")
    if len(folders) > MOST_TARGETS:
        raise ArchiveError(f"{len(folders)} targets in {directory}, more than {MOST_TARGETS}")
    found: dict[str, Saved] = {}
    for folder in folders:
        saved = _opened(folder)
        if saved.target.spec in found:
            raise ArchiveError(f"{directory} holds {saved.target.spec} twice")
        found[saved.target.spec] = saved
    return found


def folder_name(spec: str) -> str:
    """A name that is safe in every file system, readable, and different for every target."""
    digest = hashlib.sha256(spec.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', spec)[:80].strip('_') or 'target'}-{digest}"


def _opened(folder: Path) -> Saved:
    path = folder / DOCUMENT
    with _in_one_line(path):
        document = _parsed(path)
        if document.get("format") != FORMAT:
            raise Unreadable("it is not saved evidence of genmodel")
        if document.get("version") != VERSION:
            wrote = str(document.get("genmodel"))[:20]
            raise Unreadable(
                f"it has version {str(document.get('version'))[:20]} of the format, written by genmodel {wrote!r}; "
                f"this is genmodel {genmodel.__version__}, which reads version {VERSION}"
            )
        if unknown := sorted(document.keys() - {"format", "version", "genmodel", "scenarios", "findings", "evidence"}):
            raise Unreadable(f"it has a field that this genmodel does not know: {unknown[0][:60]!r}")
        evidence = document.get("evidence")
        if not isinstance(evidence, dict):
            raise Unreadable("it holds no evidence")
        scenarios = plain.decode(document.get("scenarios"), tuple[str, ...], at="scenarios")
        if unknown := sorted(set(scenarios) - set(SCENARIOS)):
            raise Unreadable(f"it has a scenario that this genmodel does not know: {unknown[0][:60]!r}")
        target: TargetInfo = plain.decode(evidence.get("target"), TargetInfo, at="evidence.target")
        _require_sizes(target)
        return Saved(
            folder=folder,
            target=target,
            scenarios=frozenset(scenarios),
            environment=plain.decode(evidence.get("environment", []), dict[str, str], at="evidence.environment"),
            findings=document.get("findings"),
            document=evidence,
        )


def _parsed(path: Path) -> dict[str, Any]:
    _require_plain_file(path, LARGEST_DOCUMENT)
    found = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    if not isinstance(found, dict):
        raise Unreadable("it is not a JSON object")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unreadable("an object in it repeats a name")
    return found


def _no_constant(name: str) -> None:
    raise Unreadable(f"it holds {name}, which is not JSON")


def _require_plain_file(path: Path, largest: int) -> None:
    """Neither a link to some other file of the reader's, nor a device, nor too large."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or path.parent.is_symlink():
        raise Unreadable(f"{path.name} is not a plain file")
    if status.st_size > largest:
        raise Unreadable(f"{path.name} has {status.st_size:,} bytes, more than {largest:,}")


class _Stored:
    """The tensors of one target; each is read, and held against its name, at most once."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        _require_plain_file(path, LARGEST_TENSORS)
        self._file: Any = safe_open(path, framework="pt")
        self._found: dict[str, torch.Tensor] = {}

    def __enter__(self) -> _Stored:
        self._file.__enter__()
        self._names = frozenset(self._file.keys())
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def tensor(self, content: str, dtype: str) -> torch.Tensor:
        """A new tensor object of this content, in the dtype it had."""
        import torch

        wanted = getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype):
            raise Unreadable(f"there is no dtype {dtype[:20]!r}")
        if content not in self._found:
            if content not in self._names:
                raise Unreadable(f"{TENSORS} lacks tensor {content}")
            stored = self._file.get_tensor(content)
            if plain.content_of(stored) != content:
                raise Unreadable(f"{TENSORS} is damaged: tensor {content} is not what it was")
            self._found[content] = stored
        found = self._found[content]
        return found.to(wanted) if found.dtype != wanted else found.view(found.shape)


def _require_sense(evidence: Evidence) -> None:
    """Shapes and dtypes are those that `genmodel.runners.evidence` states, and nothing asks for endless work."""
    _require_sizes(evidence.target)
    for part in _each(evidence):
        for kind, require in _SENSE.items():
            if isinstance(part, kind):
                require(part)
    _require_codes(evidence.coded_checkpoint.values())


def _require_request(request: Request) -> None:
    _require(0 <= request.max_tokens <= LARGEST_CHECKPOINT, f"request {request.name} generates {request.max_tokens}")


def _require_scores(scores: Scores) -> None:
    _require_tensor("ids", scores.ids, "int64", 2)
    _require_tensor("values", scores.values, "float32", 2)
    _require(scores.ids.shape == scores.values.shape, "ids and values of scores differ in shape")
    _require(scores.first >= 0, "scores begin before the first position")


def _require_ranks(part: Trace | WeightAudit | RankGradients) -> None:
    _require(1 <= part.tensor_parallel_size <= LARGEST_SIZE, f"{part.tensor_parallel_size} ranks")


def _require_local_codes(part: WeightAudit | RankGradients) -> None:
    for name, codes in part.codes.items():
        _require_tensor(name, codes, "int64" if str(codes.dtype) == "torch.int64" else "int32", None)


def _require_local_gradients(part: RankGradients) -> None:
    for name, gradient in part.gradients.items():
        if gradient is not None:
            _require_tensor(name, gradient, "float64", None)
    for states in (part.trained, part.undropped):
        if states is not None:
            _require_tensor("hidden states in training", states, "float64", 2)


def _require_reference(run: ReferenceRun) -> None:
    _require(run.logits.keys() == run.noise_max.keys() == run.noise_mean.keys(), "the reference lacks a noise floor")
    for sequence, logits in run.logits.items():
        _require_tensor("reference logits", logits, "float32", 2)
        for noise in (run.noise_max[sequence], run.noise_mean[sequence]):
            _require_tensor("reference noise", noise, "float32", 1)
            _require(len(noise) == len(logits), "the reference's noise floor is for other positions than its logits")
    for sequence, turn in (*run.turn_max.items(), *run.turn_mean.items()):
        _require_tensor("reference turn", turn, "float32", 1)
        _require(
            sequence in run.logits and len(turn) == len(run.logits[sequence]),
            "the reference's turns are for other positions than its logits",
        )
    turned = run.turn_max.keys()
    _require(turned == run.turn_mean.keys() and turned <= run.logits.keys(), "turns of sequences without logits")
    for sequence in turned:
        for turn in (run.turn_max[sequence], run.turn_mean[sequence]):
            _require_tensor("turns of the reference", turn, "float32", 1)
            _require(len(turn) == len(run.logits[sequence]), "turns are for other positions than the logits")


def _require_codes(tensors: Iterable[CodedTensor]) -> None:
    for tensor in tensors:
        _require(all(size >= 0 for size in tensor.shape) and tensor.first_code >= 1, "a coded tensor of no size")
        last = tensor.first_code + math.prod(tensor.shape)
        _require(last <= LARGEST_CHECKPOINT, f"a coded tensor up to number {last:,}")


def _require_sizes(target: TargetInfo) -> None:
    sizes = target.tensor_parallel_sizes
    _require(bool(sizes) and all(1 <= size <= LARGEST_SIZE for size in sizes), f"tensor-parallel sizes {sizes!s:.60}")
    _require(not re.search(r"[\x00-\x1f\x7f\[\]]", target.spec) and 0 < len(target.spec) <= 300, "no target's name")
    _require(target.spec == target.name, "a target of two names")


def _require_tensor(name: str, tensor: torch.Tensor, dtype: str, dimensions: int | None) -> None:
    import torch

    right = tensor.dtype == getattr(torch, dtype) and dimensions in (None, tensor.dim())
    _require(right, f"{name[:60]} is a {tensor.dim()}-dimensional tensor of {tensor.dtype}")


_SENSE: Mapping[Any, Callable[[Any], None]] = {
    Request: _require_request,
    Scores: _require_scores,
    ReferenceRun: _require_reference,
    (Trace, WeightAudit, RankGradients): _require_ranks,
    (WeightAudit, RankGradients): _require_local_codes,
    RankGradients: _require_local_gradients,
}


def _require(held: bool, otherwise: str) -> None:
    if not held:
        raise Unreadable(f"it holds what no run gives: {otherwise}")


def _each(evidence: Evidence) -> Iterator[object]:
    """Every part that has something to be held to."""
    yield from evidence.requests
    for traces in _lists(evidence.traces):
        for trace in traces:
            yield trace
            for continuation in trace.continuations:
                yield continuation.request
                yield from filter(None, (continuation.prompt_scores, continuation.step_scores))
    yield evidence.reference
    yield from evidence.references.values()
    yield from _all_of(evidence.weights)
    yield from _all_of(evidence.parallel_gradients)


def _lists(found: Mapping[Any, tuple[T, ...] | Failure]) -> Iterator[tuple[T, ...]]:
    return (value for value in found.values() if isinstance(value, tuple))


def _all_of(found: Mapping[Any, tuple[T, ...] | Failure]) -> Iterator[T]:
    return (item for items in _lists(found) for item in items)


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


@contextlib.contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        reason = str(error.strerror or error)
    except RecursionError:
        reason = "it is nested too deeply"
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
    else:
        return
    raise ArchiveError(f"cannot use {path}: {reason[:300]}")
