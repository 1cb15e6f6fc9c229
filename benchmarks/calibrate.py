"""Measure what the tolerance is made of: errors over the noise floor, of correct models and of mutants.

Runs the reference models under many weight seeds, at TP=1 and TP=2, and the mutants whose logits are wrong, and
prints the distribution of (largest |logit error| / noise floor) per phase. With --plot it draws both, and
the chosen factor between them. What a near-tied choice of the reference accounts for counts as no error.

    python benchmarks/calibrate.py --seeds 20 --dtype float32 --plot docs/calibration-float32.svg
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from genmodel.conformance import agreement, catalogue
from genmodel.conformance.access import rank_zero, reference
from genmodel.conformance.alignment import Phase, Rows, with_reference
from genmodel.conformance.verdict import Status
from genmodel.runners.evidence import Evidence
from genmodel.runners.session import Session, TargetOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mutants import MUTANTS

MODELS = tuple(f"genmodel.reference_models.{name}:factory" for name in ("dense", "gpt", "moe"))
SCENARIOS = {"inspection", "plain", "reference"}
LOGITS = [check for check in catalogue.all_checks() if check.group == "logits" and check.needs <= SCENARIOS]


def ratios(evidence: Evidence) -> Iterator[tuple[str, float]]:
    """(phase, largest |logit error| / noise floor over positions) at every size, by the rule of the tolerance."""
    known = reference(evidence)
    for size in evidence.target.tensor_parallel_sizes:
        for phase in (Phase.PROMPT, Phase.FIRST, Phase.DECODE):
            aligned = with_reference(known, rank_zero(evidence, "plain", size), phase)
            if aligned.rows:
                typical = agreement.tolerance(aligned).typical_max
                shares = [_beyond_turns(rows) / rows.noise_max.clamp(min=typical) for rows in aligned.rows]
                yield phase.value, float(torch.cat(shares).max())


def _beyond_turns(rows: Rows) -> torch.Tensor:
    """Largest |logit error| at each position, zero where a near-tied choice of the reference accounts for it."""
    error = (rows.values - rows.expected).abs().amax(1)
    return error.where(error > agreement.TURN_FACTOR * rows.turn_max, torch.zeros_like(error))


def quantiles(values: list[float]) -> str:
    """Minimum, median, 99th percentile and maximum."""
    found = torch.tensor(values, dtype=torch.float64)
    parts = [found.min(), found.median(), found.quantile(0.99), found.max()]
    return "  ".join(f"{float(x):10.3g}" for x in parts)


def main() -> None:
    """Run, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--model", action="append", help="a correct model, my_pkg.my_module:factory; may be repeated")
    parser.add_argument("--mutants", action=argparse.BooleanOptionalAction, default=True, help="run these too")
    parser.add_argument("--plot", type=Path, help="an .svg or .png file")
    arguments = parser.parse_args()

    models = arguments.model or MODELS
    correct = [
        TargetOptions(spec=spec, seed=seed, dtype=arguments.dtype)
        for spec, seed in itertools.product(models, range(arguments.seeds))
    ]
    broken = {
        m.name: TargetOptions(
            spec=m.name,
            target=m.factory,
            tensor_parallel_sizes=m.tp,
            reference=m.reference,
            dtype=arguments.dtype,
            config=m.config,
        )
        for m in MUTANTS
        if arguments.mutants and m.checks[0].startswith("logits.") and m.checks[0] != "logits.batching"
    }
    right: dict[str, list[float]] = defaultdict(list)
    wrong: dict[str, float] = {}
    alarms: list[str] = []
    with Session([*correct, *broken.values()]) as session:
        for options in correct:
            evidence = session.collect(options, SCENARIOS)
            for phase, ratio in ratios(evidence):
                right[phase].append(ratio)
            verdicts = [catalogue.judge(check, evidence) for check in LOGITS]
            alarms += [f"{options.spec} seed {options.seed}: {v.check}" for v in verdicts if v.status is Status.FAILED]
        for name, options in broken.items():
            wrong[name] = max(ratio for _, ratio in ratios(session.collect(options, SCENARIOS)))

    print(f"{arguments.dtype}, {len(models)} models x {arguments.seeds} seeds x TP=1, 2: error / noise floor")
    print(f"{'':14} {'min':>10}  {'median':>10}  {'99 %':>10}  {'max':>10}")
    for phase, values in right.items():
        print(f"{phase:14} {quantiles(values)}")
    print(f"chosen factor  {agreement.NOISE_FACTOR:10.3g}")
    for name, ratio in sorted(wrong.items(), key=lambda item: item[1]):
        print(f"mutant {name:32} {ratio:10.3g}")
    print(f"false alarms: {len(alarms)} of {len(correct) * len(LOGITS)} verdicts", *alarms, sep="\n  ")
    if arguments.plot:
        draw(arguments.plot, arguments.dtype, right, wrong)


def draw(path: Path, dtype: str, right: dict[str, list[float]], wrong: dict[str, float]) -> None:
    """One dot per run and phase for correct models, one per mutant, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    generator = torch.Generator().manual_seed(0)

    def dots(row: int, values: list[float], colour: str) -> None:
        jitter = (torch.rand(len(values), generator=generator) - 0.5) * 0.5
        axes.scatter(values, (row + jitter).tolist(), s=12, alpha=0.5, color=colour, linewidths=0)

    rows = list(right)
    for row, phase in enumerate(rows):
        dots(row, right[phase], "tab:blue")
    dots(len(rows), list(wrong.values()), "tab:red")
    axes.axvline(agreement.NOISE_FACTOR, color="black", linewidth=1)
    axes.text(
        agreement.NOISE_FACTOR * 1.1, len(rows) + 0.62, f"tolerance: {agreement.NOISE_FACTOR:g} floors", va="center"
    )
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows) + 1), [*(f"correct, {phase}" for phase in rows), "mutants"])
    axes.set_ylim(-0.5, len(rows) + 0.9)
    axes.set_xlabel(f"largest |logit error| / noise floor ({dtype})")
    figure.savefig(path)


if __name__ == "__main__":
    main()
