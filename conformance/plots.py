"""Pictures for the HTML report: SVG by matplotlib, in colours that the page's style sheet defines.

Text stays text, in the page's font, and colours are CSS variables, so that one picture suits light and dark pages. No
name that comes from a model is drawn: the page says those, escaped.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from genmodel.conformance.alignment import Phase
from genmodel.conformance.curves import HUGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASES = {Phase.PROMPT.value: "prompt", Phase.FIRST.value: "first", Phase.DECODE.value: "decode"}
_MARKERS = {"prompt": "o", "first": "D", "decode": "s"}
_COLOURS = ("ink", "muted", "grid", "prompt", "first", "decode", "bad", "noise", "limit", "engine", "torch", "host")
_STAND_IN = {name: f"#0102{number:02x}" for number, name in enumerate(_COLOURS, 1)}
"""matplotlib takes no CSS variables: these colours, which nothing else has, are replaced by them."""

_KINDS = {
    "engine": ("TP=", "deployed", "pipeline", "diagnosis", "weights"),
    "torch": ("gradients", "parallel_gradients", "reference"),
}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "genmodel",
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _STAND_IN["muted"],
    "axes.labelcolor": _STAND_IN["ink"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _STAND_IN["muted"],
    "ytick.color": _STAND_IN["muted"],
    "text.color": _STAND_IN["ink"],
    "text.parse_math": False,
    "grid.color": _STAND_IN["grid"],
    "grid.linewidth": 0.6,
}


def agreement_plot(curve: Mapping[str, Any]) -> str:
    """Errors by position against noise floor and tolerance, and the top-K overlap below; one of `curves`."""
    with _figure(4.6, 2.9) as figure:
        figure.subplots_adjust(left=0.145, right=0.99, top=0.97, bottom=0.15, hspace=0.12)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        phases = curve["phases"]
        drawn = [value for of in phases.values() for name in ("error", "noise", "allowed") for value in of[name]]
        lowest = min((value for value in drawn if value > 0), default=1e-9) / 2
        highest = max((value for value in drawn if value < HUGE), default=1.0)
        for name, colour, line, worst in (("noise", "noise", "-", max), ("allowed", "limit", "--", min)):
            top.plot(*_merged(phases, name, worst), line, color=_STAND_IN[colour], linewidth=1)
        for name, of in phases.items():
            _errors(top, _PHASES[name], of, lowest, highest * 2.5)
            bottom.plot(of["position"], of["overlap"], ".", color=_STAND_IN[_PHASES[name]], markersize=3)
        top.set(yscale="log", ylabel="|logit error|", ylim=(lowest / 1.5, highest * 4))
        top.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
        top.yaxis.set_minor_formatter(lambda value, _: "")
        k = curve["k"]
        bottom.set(ylim=(-0.08 * k, 1.12 * k), yticks=[0, k], ylabel=f"top {k}", xlabel="position")
        for axes in (top, bottom):
            axes.grid(axis="y")
            axes.yaxis.set_label_coords(-0.12, 0.5)
        return _svg(figure)


def _merged(
    phases: Mapping[str, Mapping[str, Sequence[float]]], name: str, choose: Callable[[float, float], float]
) -> tuple[list[float], list[float]]:
    """One line through all phases: positions, and what `choose` takes where phases share one."""
    found: dict[float, float] = {}
    for of in phases.values():
        for position, value in zip(of["position"], of[name], strict=True):
            found[position] = choose(found.get(position, value), value)
    return sorted(found), [found[position] for position in sorted(found)]


def _errors(axes: Axes, phase: str, of: Mapping[str, Sequence[float]], lowest: float, highest: float) -> None:
    """One mark for each position, another kind of mark where the error is more than is allowed."""
    shown = [min(max(error, lowest), highest) for error in of["error"]]
    good = [error <= allowed for error, allowed in zip(of["error"], of["allowed"], strict=True)]
    for colour, marker, kept in ((phase, _MARKERS[phase], True), ("bad", "X", False)):
        x, y = ([v for v, ok in zip(values, good, strict=True) if ok is kept] for values in (of["position"], shown))
        axes.plot(x, y, marker, color=_STAND_IN[colour], markersize=3.2 if kept else 5, markeredgewidth=0)


def timeline_plot(timeline: Sequence[Mapping[str, Any]]) -> str:
    """What each host did when: one row per rank, one bar per command, its number in the page's list on it."""
    ranks = sorted({span["rank"] for span in timeline})
    with _figure(7.2, 0.75 + 0.42 * len(ranks)) as figure:
        figure.subplots_adjust(left=0.075, right=0.99, top=0.95, bottom=0.5 / (0.75 + 0.42 * len(ranks)))
        axes = figure.subplots()
        bars = [
            (float(span["begin"]), math.fsum(map(float, span["phases"].values())), ranks.index(span["rank"]))
            for span in timeline
        ]
        end = max((begin + length for begin, length, _ in bars), default=1.0)
        for number, (span, (begin, length, row)) in enumerate(zip(timeline, bars, strict=True), 1):
            colour = _STAND_IN[kind_of(span["what"])]
            axes.broken_barh([(begin, length)], (row - 0.38, 0.76), facecolors=colour, edgecolors="none")
            if length > end / 45:
                axes.text(begin + length / 2, row, str(number), ha="center", va="center", fontsize=8)
        axes.set(xlabel="seconds", yticks=range(len(ranks)), yticklabels=[f"host {rank}" for rank in ranks])
        axes.set_xlim(0, end * 1.01)
        axes.set_ylim(-0.5, len(ranks) - 0.5)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        return _svg(figure)


def kind_of(what: str) -> str:
    """Which colour a command has: "engine", "torch" (standalone PyTorch) or "host"."""
    return next((kind for kind, begins in _KINDS.items() if what.startswith(begins)), "host")


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot, which looks for a display and keeps every figure

    with mpl.rc_context(_SETTINGS):
        yield Figure(figsize=(width, height))


def _svg(figure: Figure) -> str:
    """An <svg> element to be put into a page."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = written.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)
    for name, colour in _STAND_IN.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    # Its size is the page's business: a phone's screen is narrower.
    drawn = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawn, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', drawn, count=1)
