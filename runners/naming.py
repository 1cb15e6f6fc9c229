"""Name maps: what a model calls its parameters, and what an independent reference calls them.

A map has one entry for each kind of parameter, from the model's name to the reference's, or to the several that the
model has fused along its first dimension. A `*` stands for anything between two dots, and for the same on both sides:

    "tokens.weight" = "model.embed_tokens.weight"
    "blocks.*.qkv.weight" = ["model.layers.*.self_attn.q_proj.weight", "model.layers.*.self_attn.k_proj.weight",
                             "model.layers.*.self_attn.v_proj.weight"]

Names that are the same need no entry. The checkpoint has the model's own names, so its loading is what its users run;
the map is applied where the reference loads.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genmodel.modeling.registration import resolve as resolve_object
from genmodel.modeling.wrapper import InterfaceError

Shapes = Mapping[str, tuple[int, ...]]
Entries = Mapping[str, tuple[str, ...]]
Translation = dict[str, tuple[str, ...]]
"""For each of the model's names, those of the reference that make it up."""

_SHOWN = 4


class Unmapped(ValueError):
    """A name map and two models do not fit; the message is one line that names what is left over."""


def load(source: str | Mapping[str, Any]) -> Entries:
    """The entries of a TOML file, of the dict that "module:attr" names, or of a dict.

    Raises:
        Unmapped: one line if there is no such map, or it has another form.
    """
    found: Any = source
    if isinstance(source, str) and source.endswith(".toml"):
        try:
            found = tomllib.loads(Path(source).read_text())
        except OSError as error:
            raise Unmapped(f"cannot read {source}: {error.strerror}") from None
        except tomllib.TOMLDecodeError as error:
            raise Unmapped(f"{source} is not TOML: {error}") from None
    elif isinstance(source, str):
        try:
            found = resolve_object(source, callable_only=False)
        except InterfaceError as error:
            raise Unmapped(str(error)) from None
    if not isinstance(found, Mapping):
        raise Unmapped(f"{source} is a {type(found).__name__}, not a dict of names")
    return {own: _several(own, theirs) for own, theirs in found.items()}


def _several(own: str, theirs: Any) -> tuple[str, ...]:
    names = (theirs,) if isinstance(theirs, str) else theirs
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise Unmapped(f"{own!r} must be the reference's name or a list of names (quote names that have dots)")
    stars = own.count("*")
    wrong = next((name for name in names if name.count("*") != stars), None)
    if wrong is not None:
        raise Unmapped(f"{own!r} and {wrong!r} must have equally many *")
    return tuple(names)


def translate(entries: Entries, own: Shapes, theirs: Shapes) -> Translation:
    """Find for each of the model's parameters what it is made of in the reference.

    Args:
        entries: as `load` gives them.
        own: checkpoint shape by name, of the model.
        theirs: the same of the reference.

    Raises:
        Unmapped: unless every name of either side is accounted for exactly once, in shapes that fit.
    """
    patterns = [(re.compile(re.escape(key).replace(r"\*", r"([^.]*)")), names) for key, names in entries.items()]
    found = {name: _sources(name, patterns) for name in own}
    uses = Counter(source for sources in found.values() for source in sources)
    mapped = {name: sources for name, sources in found.items() if all(source in theirs for source in sources)}
    problems = [
        _left("of the model's parameters are not in the reference", [n for n in own if n not in mapped], theirs),
        _left("of the reference's parameters have no counterpart", [n for n in theirs if not uses[n]], own),
        _left("of the reference's are used more than once", [n for n in theirs if uses[n] > 1], {}),
        _left(
            "entries match none of the model's parameters",
            [key for key, (pattern, _) in zip(entries, patterns, strict=True) if not any(map(pattern.fullmatch, own))],
            own,
        ),
        *(_misfit(name, own[name], sources, theirs) for name, sources in mapped.items()),
    ]
    if any(problems):
        raise Unmapped("; ".join(filter(None, problems)))
    return mapped


def _sources(name: str, patterns: list[tuple[re.Pattern[str], tuple[str, ...]]]) -> tuple[str, ...]:
    for pattern, names in patterns:
        if (match := pattern.fullmatch(name)) is not None:
            return tuple(_filled(other, match.groups()) for other in names)
    return (name,)


def _filled(pattern: str, groups: tuple[str, ...]) -> str:
    first, *others = pattern.split("*")
    return first + "".join(group + part for group, part in zip(groups, others, strict=True))


def _left(what: str, names: list[str], others: Shapes) -> str:
    """How many, and a few of them with the closest of the others; empty for no names."""
    if not names:
        return ""
    said = [name + _closest(name, others) for name in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(said)}{more}"


def _closest(name: str, others: Shapes) -> str:
    close = difflib.get_close_matches(name, list(others), n=1, cutoff=0.3)
    return f" (closest: {close[0]})" if close else ""


def _misfit(name: str, shape: tuple[int, ...], sources: tuple[str, ...], theirs: Shapes) -> str:
    shapes = [theirs[source] for source in sources]
    fused = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
    if fused == shape and len({s[1:] for s in shapes}) == 1:
        return ""
    return f"{name} is {list(shape)} and {' + '.join(sources)} {' + '.join(str(list(s)) for s in shapes)}"


def to_own(translation: Translation, theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of the reference as one of the model's."""
    return {
        name: torch.cat([theirs[source] for source in sources]) if len(sources) > 1 else theirs[sources[0]]
        for name, sources in translation.items()
    }


def to_theirs(translation: Translation, shapes: Shapes, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of the model as one of the reference's, whose shapes are given."""
    found: dict[str, torch.Tensor] = {}
    for name, sources in translation.items():
        if len(sources) == 1:
            found[sources[0]] = own[name]
        else:
            parts = own[name].split([shapes[source][0] for source in sources])
            found |= {source: part.contiguous() for source, part in zip(sources, parts, strict=True)}
    return found


FILE = "names.json"
"""Where a translation is kept, beside the checkpoint it belongs to."""


def save(directory: Path, translation: Translation, shapes: Shapes) -> None:
    """Keep a translation beside the checkpoint it belongs to."""
    (directory / FILE).write_text(json.dumps({"translation": translation, "shapes": dict(shapes)}))


def for_reference(directory: Path, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint under the reference's names; unchanged if `directory` keeps no translation."""
    path = directory / FILE
    if not path.exists():
        return own
    kept = json.loads(path.read_text())
    return to_theirs(kept["translation"], kept["shapes"], own)
