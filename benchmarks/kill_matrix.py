"""Which check catches which mutant, and which of the usual comparisons would have.

Runs every mutant of tests/mutants through the suite, and judges the same traces by four comparators in use elsewhere,
each written from its published definition. Default engines, which each mutant has to start for itself, run only where
nothing else has failed. Results are kept in a JSON file as they come, so that a run can be ended and continued, and
single mutants run again; docs/kill-matrix.md is made from that file:

    python benchmarks/kill_matrix.py --results kill.json > docs/kill-matrix.md
    python benchmarks/kill_matrix.py --results kill.json missing_all_reduce > docs/kill-matrix.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from genmodel import __version__
from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners.evidence import Continuation, Evidence, ReferenceRun
from genmodel.runners.scenarios import DEPLOYMENTS, SCENARIOS
from genmodel.runners.session import Session, TargetOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mutants import MUTANTS

CHECKS = catalogue.all_checks()
OWN_ENGINES = {*SCENARIOS} - {*DEPLOYMENTS}
CORRECT = "genmodel.reference_models.dense:factory"
Comparator = Callable[[Continuation, torch.Tensor], bool]
"""From an engine's answer to one request and the reference's logits [T, V] of it to whether they agree."""


def greedy_text(answer: Continuation, reference: torch.Tensor) -> bool:
    """The engine's greedy tokens are the reference's, one by one."""
    start = len(answer.request.prompt) - 1
    return reference[start:].argmax(-1).tolist() == list(answer.generated)


def check_logprobs_close(answer: Continuation, reference: torch.Tensor, top: int = 5) -> bool:
    """vLLM's tests/models/utils.py: at the first token that differs, each is in the other's top 5; the rest is free."""
    start = len(answer.request.prompt) - 1
    theirs = reference[start:].argmax(-1).tolist()
    for step, (ours, other) in enumerate(zip(answer.generated, theirs, strict=False)):
        if ours != other:
            mine = answer.step_scores.ids[step, :top].tolist()
            return ours in reference[start + step].topk(top).indices.tolist() and other in mine
    return True


def logprobs(answer: Continuation, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the generated tokens, [G]: the engine's and the reference's."""
    tokens = torch.tensor(answer.generated)
    start = len(answer.request.prompt) - 1
    theirs = reference[start : start + len(tokens)].double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    scores = answer.step_scores
    at = (scores.ids == tokens[:, None]).double().argmax(1)
    ours = scores.values.double().log_softmax(-1).gather(1, at[:, None])[:, 0]
    return ours, theirs


def token_mult_prob_error(answer: Continuation, reference: torch.Tensor) -> bool:
    """NeMo RL's mean of exp(|logprob difference|) of the generated tokens, below 1.05."""
    ours, theirs = logprobs(answer, reference)
    return bool((ours - theirs).abs().exp().mean() < 1.05)


def k3_kl(answer: Continuation, reference: torch.Tensor) -> bool:
    """Schulman's k3 estimate of the KL divergence on the generated tokens, mean of r - 1 - log r, below 0.015."""
    ours, theirs = logprobs(answer, reference)
    log_ratio = theirs - ours
    return bool((log_ratio.exp() - 1 - log_ratio).mean() < 0.015)


COMPARATORS: dict[str, Comparator] = {
    "greedy text": greedy_text,
    "check_logprobs_close": check_logprobs_close,
    "mean exp abs dlogprob < 1.05": token_mult_prob_error,
    "k3 KL < 0.015": k3_kl,
}


def compared(evidence: Evidence, comparator: Comparator) -> bool:
    """Whether the comparator finds anything in what people usually run: a batch of prompts, at each TP size."""
    for size in evidence.target.tensor_parallel_sizes:
        traces, reference = evidence.traces.get(("plain", size)), evidence.reference
        if not isinstance(traces, tuple) or not isinstance(reference, ReferenceRun):
            return True  # an engine that does not start is noticed by anybody
        for answer in traces[0].continuations:
            greedy = answer.request.temperature == 0
            if greedy and not comparator(answer, reference.logits[answer.sequence]):
                return True
    return False


def main() -> None:
    """Run what has no result yet, or the mutants named, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mutants", nargs="*", help="run these again; without any, all that have no result")
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON file that is read, and written as results come"
    )
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    options = {
        m.name: TargetOptions(
            spec=m.name, target=m.factory, tensor_parallel_sizes=(1, 2), reference=m.reference, config=m.config
        )
        for m in MUTANTS
    }
    options = {CORRECT: TargetOptions(spec=CORRECT), **options}
    chosen = [options[name] for name in arguments.mutants or options if arguments.mutants or name not in results]
    with Session(chosen, lambda line: print(line, file=sys.stderr)) as session:
        for option in chosen:
            evidence, caught = failing(session, option, OWN_ENGINES)
            if not caught:
                evidence, caught = failing(session, option, set(SCENARIOS))
            results[option.spec] = {
                "caught": caught,
                "compared": [compared(evidence, comparator) for comparator in COMPARATORS.values()],
                "environment": evidence.environment,
            }
            arguments.results.write_text(json.dumps(results, indent=1))
    print(*lines({name: results[name] for name in options if name in results}), sep="\n")


def failing(session: Session, option: TargetOptions, scenarios: set[str]) -> tuple[Evidence, list[str]]:
    """What was measured, and the checks that fail."""
    evidence = session.collect(option, scenarios)
    verdicts = [catalogue.judge(check, evidence) for check in CHECKS if check.needs <= scenarios]
    return evidence, [v.check for v in verdicts if v.status is Status.FAILED]


def lines(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The document, line by line."""
    caught = {name: found["caught"] for name, found in results.items()}
    others = {name: found["compared"] for name, found in results.items()}
    environment = results[CORRECT]["environment"]
    yield "# Kill matrix"
    yield ""
    yield (
        "Generated by `python benchmarks/kill_matrix.py` with "
        f"pytest-genmodel {__version__}, vLLM {environment['vllm']}, torch {environment['torch']}, float32, TP=1 and "
        "TP=2, seed 0. A cell counts the checks of a group that fail; "
        "**yes** says that the comparator notices, on the plain batch of prompts at TP=1 and TP=2 that it is usually "
        "given. Default engines ran only where nothing else failed. The first row is the correct model."
    )
    yield ""
    groups = [g for g in catalogue.GROUPS if any(check.group == g for check in CHECKS)]
    yield "| mutant | reports | " + " | ".join((*groups, *COMPARATORS)) + " |"
    yield "|---|---|" + "---|" * (len(groups) + len(COMPARATORS))
    reports = {m.name: m.reports for m in MUTANTS}
    for name, checks in caught.items():
        counts = [sum(check.startswith(f"{group}.") for check in checks) for group in groups]
        cells = [str(count or "") for count in counts] + ["**yes**" if found else "" for found in others[name]]
        yield f"| {name} | {reports.get(name, '')} | " + " | ".join(cells) + " |"
    names = [name for name in caught if name != CORRECT]
    found = sum(bool(caught[name]) for name in names)
    yield ""
    yield f"The suite notices {found} of {len(names)} mutants; the comparators, of the same mutants on the same traces:"
    yield ""
    for index, name in enumerate(COMPARATORS):
        yield f"- {name}: {sum(others[name][index] for name in names)}"


if __name__ == "__main__":
    main()
