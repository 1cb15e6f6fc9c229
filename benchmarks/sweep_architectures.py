"""Every text-generation architecture of the installed vLLM against transformers' class of the same name.

Each runs with a tiny configuration and seeded adversarial weights in an in-process engine (the plain batch of
prompts, float32), and is judged by the checks on logits that any model is judged by. Where one disagrees, every
module is recorded to name the first that differs. Where the cause is known that is put to the test: vLLM's model
with just this changed (architecture_corrections.py) runs too, and has to agree. Results are kept in a JSON file as
they come, so that a run can be ended and continued, and single architectures run again; docs/architectures.md is
made from that file:

    python benchmarks/sweep_architectures.py --results sweep.json > docs/architectures.md
    python benchmarks/sweep_architectures.py --results sweep.json LlamaForCausalLM > docs/architectures.md
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genmodel.conformance import catalogue
from genmodel.conformance.diagnosis import Diagnosis
from genmodel.conformance.verdict import Status, Verdict
from genmodel.modeling import _vllm
from genmodel.runners import hugging_face
from genmodel.runners.evidence import Evidence, Failure
from genmodel.runners.session import Session, TargetOptions, UnusableTarget

AGREES, DISAGREES, CANNOT = "agrees", "disagrees", "cannot run here"
SCENARIOS = {"reference", "plain"}
ROTARY = "vLLM's rotary kernel for CPU computes something else here than vLLM's own PyTorch code"
CORRECTIONS = {
    "ApertusForCausalLM": ("Apertus", "vLLM keeps the parameters of xIELU in bfloat16, in a float32 engine too"),
    "BloomForCausalLM": (
        "Bloom",
        "vLLM has the exact GELU, transformers the tanh approximation BLOOM was trained with",
    ),
    "Cohere2ForCausalLM": ("Cohere2", "vLLM's sliding layers see sliding_window + 1 positions, transformers' one less"),
    "Cohere2MoeForCausalLM": (
        "Cohere2Moe",
        "vLLM's sliding layers see sliding_window + 1 positions, transformers' one less",
    ),
    "DeepseekV2ForCausalLM": ("DeepseekV2", ROTARY),
    "DeepseekV3ForCausalLM": ("DeepseekV3", ROTARY),
    "Ernie4_5_MoeForCausalLM": ("Ernie45Moe", "vLLM's router for CPU leaves out the correction bias of the scores"),
    "Glm4MoeLiteForCausalLM": (
        "Glm4MoeLite",
        f"{ROTARY}, and its norms inside attention have the config's epsilon, transformers' always 1e-6",
    ),
    "Lfm2ForCausalLM": ("Lfm2", ROTARY),
    "Lfm2MoeForCausalLM": ("Lfm2Moe", ROTARY),
    "Llama4ForCausalLM": (
        "Llama4",
        "vLLM tunes the temperature of attention only for lengths above 32768, whatever the config says",
    ),
    "MiniCPM3ForCausalLM": (
        "MiniCPM3",
        "vLLM's norms inside attention have the config's epsilon, transformers' always 1e-6",
    ),
    "Ministral3ForCausalLM": (
        "Ministral3",
        "vLLM leaves out the scaling of queries by position, which it reads in Mistral's own format of a config only",
    ),
}
"""Why an architecture disagrees, and the class of architecture_corrections.py in which that is changed."""

GROUPED_NORM = "vLLM's gated norm takes each of n_groups apart, transformers' all together; with one group they agree"
REMARKS = {
    "GraniteMoeHybridForCausalLM": GROUPED_NORM,
    "HrmTextForCausalLM": "a prefix LM: in vLLM prompts are seen both ways, in transformers only if token types say so",
    "Mamba2ForCausalLM": GROUPED_NORM,
}
"""Why others disagree, as far as a configuration or the two sides' own words tell."""

DEADLINE = 90.0
"""Seconds for any one step of one architecture; most take five."""


def main() -> None:
    """Run what has no result yet, or the architectures named, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architectures", nargs="*", help="run these again; without any, all that have no result")
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON file that is read, and written as results come"
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    known = _vllm.text_generation_architectures()
    twins = sorted(name for name in known if hugging_face.twin(name))
    size = str(arguments.tp)
    chosen = arguments.architectures or [name for name in twins if size not in results.get(name, {})]
    options = [TargetOptions(spec=name, tensor_parallel_sizes=(arguments.tp,), timeout=DEADLINE) for name in chosen]
    sys.path.append(str(Path(__file__).parent))  # where hosts find the corrections
    with Session(options, lambda line: print(line, file=sys.stderr, flush=True)) as session:
        for option in options:
            results.setdefault(option.spec, {})[size] = _run(session, option)
            print(json.dumps({option.spec: results[option.spec][size]}), file=sys.stderr, flush=True)
            arguments.results.write_text(json.dumps(results, indent=1, sort_keys=True))
    print(*_lines({name: results[name] for name in twins if name in results}, known, len(twins)), sep="\n")


def _run(session: Session, option: TargetOptions) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        evidence = session.collect(option, {"plain"})
        if not isinstance(evidence.traces.get(("plain", option.tensor_parallel_sizes[0])), Failure):
            session.collect(option, SCENARIOS)
    except UnusableTarget as error:
        return {"result": CANNOT, "why": str(error), "seconds": time.perf_counter() - begun}
    found = _judged(session, option, evidence)
    return {**found, "seconds": time.perf_counter() - begun, "environment": evidence.environment}


def _judged(session: Session, option: TargetOptions, evidence: Evidence) -> dict[str, Any]:
    (size,) = option.tensor_parallel_sizes
    for lacking in (evidence.inspection, evidence.traces.get(("plain", size)), evidence.reference):
        if isinstance(lacking, Failure):
            return {"result": CANNOT, "why": _reason(lacking)}
    checks = [c for c in catalogue.all_checks() if c.group == "logits" and c.needs <= SCENARIOS]
    verdicts = [catalogue.judge(check, evidence) for check in checks]
    wrong = [v for v in verdicts if v.status in (Status.FAILED, Status.ERROR)]
    worst = max(_values(verdicts).measurements, key=lambda m: m.severity)
    numbers = {"measured": worst.measured, "allowed": worst.allowed}
    if not wrong:
        return {"result": AGREES, **numbers}
    if option.spec in CORRECTIONS and (reason := _explained(session, option)):
        return {"result": DISAGREES, **numbers, "failed": [v.check for v in wrong], "why": reason}
    diagnosis = Diagnosis(lambda scenario, tp, focus: session.diagnose(option, scenario, tp, focus))
    said = diagnosis.of(catalogue.get("logits.values"), _values(verdicts)).diagnosis
    return {"result": DISAGREES, **numbers, "failed": [v.check for v in wrong], "why": said}


def _reason(lacking: Failure) -> str:
    """What a failure says, and of a bare assertion which one."""
    asserted = [line.strip() for line in lacking.details.splitlines() if line.strip().startswith("assert ")]
    bare = asserted[-1] if asserted and lacking.message.strip().endswith("AssertionError:") else ""
    return f"{lacking.phase or lacking.scenario}: {lacking.message} {bare}".strip()


def _explained(session: Session, option: TargetOptions) -> str:
    """The known cause of a disagreement, if there is none without it."""
    name, cause = CORRECTIONS[option.spec]
    corrected = TargetOptions(
        spec=f"architecture_corrections:{name}",
        reference=f"{hugging_face.MODULE}{option.spec}",
        config=hugging_face.TINY,
        tensor_parallel_sizes=option.tensor_parallel_sizes,
    )
    verdict = catalogue.judge(catalogue.get("logits.values"), session.collect(corrected, SCENARIOS))
    if verdict.status is not Status.PASSED:
        return ""
    worst = max(verdict.measurements, key=lambda m: m.severity)
    return f"{cause}: without that, it agrees ({worst.measured:.1e} of {worst.allowed:.1e} allowed)"


def _values(verdicts: list[Verdict]) -> Verdict:
    return next(v for v in verdicts if v.check == "logits.values")


def _lines(results: dict[str, dict[str, Any]], known: dict[str, str], twins: int) -> Iterator[str]:
    """The document, line by line."""
    latest = [found for by_size in results.values() for found in by_size.values() if "environment" in found]
    environment = latest[-1]["environment"] if latest else {}
    sizes = sorted({size for by_size in results.values() for size in by_size}, key=int)
    yield "# Architectures"
    yield ""
    yield (
        f"Generated by `python benchmarks/sweep_architectures.py` with vLLM {environment.get('vllm')}, transformers "
        f"{environment.get('transformers')}, torch {environment.get('torch')}. Of the {len(known)} architectures this "
        f"vLLM generates text with, transformers has a class for {twins}. Each of these ran with `--genmodel=NAME "
        "--genmodel-config=tiny`: seeded weights, float32, an in-process engine on the plain batch of prompts, "
        "against transformers' class in eager attention and float64. *Measured* is the largest difference of a logit, "
        "*allowed* what rounding explains there."
    )
    for size in sizes:
        rows = {name: by_size[size] for name, by_size in results.items() if size in by_size}
        counts = Counter(found["result"] for found in rows.values())
        seconds = sorted(found["seconds"] for found in rows.values())
        yield ""
        yield f"## TP={size}"
        yield ""
        yield (
            f"Of {len(rows)} tried, {counts[AGREES]} agree, {counts[DISAGREES]} disagree, "
            f"{counts[CANNOT]} cannot run here; "
            f"median {seconds[len(seconds) // 2]:.1f} s each."
        )
        yield ""
        yield "| architecture | code | result | measured | allowed | where it begins, or why not |"
        yield "|---|---|---|---|---|---|"
        for name, found in rows.items():
            numbers = [f"{found[key]:.1e}" if key in found else "" for key in ("measured", "allowed")]
            remark = REMARKS.get(name) if found["result"] == DISAGREES else None
            why = " ".join((remark or found.get("why", "")).split()).replace("|", "/")[:400]
            yield f"| {name} | {known[name]} | {found['result']} | {' | '.join(numbers)} | {why} |"


if __name__ == "__main__":
    main()
