"""Synthetic evidence: a model that is right, and for every check one that is wrong in just that way.

Nothing here runs a model. Logits are random numbers, engines are the reference plus noise of the size of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import coded_samples
from genmodel.conformance.alignment import Phase
from genmodel.runners.evidence import (
    AttentionInfo,
    Continuation,
    Derivative,
    Evidence,
    Gradients,
    Inspection,
    Layout,
    LowPrecision,
    Packing,
    ParameterGradient,
    ParameterInfo,
    Precision,
    Probe,
    Proof,
    ReferenceRun,
    Request,
    RoundedGradient,
    Scores,
    TargetInfo,
    Trace,
    TrainingMode,
    Way,
    Ways,
    WorstGradient,
)
from genmodel.runners.scenarios import DEPLOYMENTS

VOCABULARY = 203
HIDDEN = 64
GENERATED = 7
NOISE = 1e-6
"""Standard deviation of rounding errors, in logits."""

HALF_NOISE = 0.01
"""The same in bfloat16."""
REFITTED = ("refit.changed", "refit.again")
IN_PROCESS = (
    "arrivals",
    "chunked",
    "cached",
    "preempted",
    "compiled",
    "embeds",
    "repeated.first",
    "repeated.second",
    "refit.before",
    "refit.identity",
    "refit.restored",
    *REFITTED,
)

Corruption = Callable[[Evidence], Evidence]


@dataclass(frozen=True)
class Truth:
    """The exact logits of one request's positions, and what greedy generation makes of them."""

    request: Request
    generated: tuple[int, ...]
    logits: torch.Tensor  # [P + G - 1, V] float64

    @property
    def sequence(self) -> tuple[int, ...]:
        return self.request.prompt + self.generated[:-1]


def truths(generator: torch.Generator, vocabulary: int = VOCABULARY) -> list[Truth]:
    """Requests of the lengths that matter, one of them sampled."""
    lengths = {"one_token": 1, "two_tokens": 2, "block_crossing": 35, "long_prefix_a": 20, "sampled": 9}
    found = []
    for name, length in lengths.items():
        tokens = torch.randint(vocabulary, (length + GENERATED,), generator=generator)
        logits = 3 * torch.randn(length + GENERATED - 1, vocabulary, generator=generator, dtype=torch.float64)
        sampled = name == "sampled"
        if not sampled:
            steps = torch.arange(length - 1, length + GENERATED - 1)
            logits[steps, tokens[length:]] = logits[steps].amax(dim=1) + 0.5
        request = Request(
            name=name,
            prompt=tuple(tokens[:length].tolist()),
            max_tokens=GENERATED,
            temperature=1.0 if sampled else 0.0,
            seed=7 if sampled else None,
        )
        found.append(Truth(request, tuple(tokens[length:].tolist()), logits))
    return found


def clean(
    *,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    candidates: int | None = None,
    noise: float = NOISE,
    dtype: str = "float32",
) -> Evidence:
    """Evidence of a model that is right, at TP=1 and TP=2."""
    generator = torch.Generator().manual_seed(seed)
    exact = truths(generator, vocabulary)
    k = candidates or vocabulary

    def engine(scenario: str, size: int, ranks: int) -> tuple[Trace, ...]:
        held = other if scenario in REFITTED else exact
        scored = tuple(_on_path(scenario, _continuation(t, k, noise, generator)) for t in held)
        return tuple(_trace(scenario, size, rank, scored, dtype) for rank in range(ranks))

    other = truths(generator, vocabulary)
    moved = _reference(other, noise, dtype, generator)
    half = _reference(exact, HALF_NOISE, "bfloat16", generator)

    def rounded(scenario: str, size: int, ranks: int) -> tuple[Trace, ...]:
        scored = tuple(_continuation(t, k, HALF_NOISE, generator) for t in exact)
        return tuple(_trace(scenario, size, rank, scored, "bfloat16") for rank in range(ranks))

    return Evidence(
        target=TargetInfo(
            name="my_pkg:factory",
            spec="my_pkg:factory",
            tensor_parallel_sizes=(1, 2),
            dtype=dtype,
            top_k=10,
            seed=seed,
            weights="seeded adversarial weights (seed 0)",
            config="genmodel's tiny default",
        ),
        requests=tuple(t.request for t in exact),
        inspection=_inspection(vocabulary),
        gradients=_gradients(),
        precision=Precision(dtype="bfloat16", modules=_MODULES, largest={"": 40.0, "norm": 7.5}, declared=None),
        reference=_reference(exact, noise, dtype, generator),
        traces={
            ("plain", 1): engine("plain", 1, 1),
            ("plain", 2): engine("plain", 2, 2),
            ("alone", 1): engine("alone", 1, 1),
            ("alone", 2): engine("alone", 2, 2),
            **{(name, size): engine(name, size, 1) for name in DEPLOYMENTS for size in (1, 2)},
            **{(name, size): engine(name, size, size) for name in IN_PROCESS for size in (1, 2)},
            **{("bfloat16", size): rounded("bfloat16", size, size) for size in (1, 2)},
        },
        references={("refit", dtype): moved, ("initial", "bfloat16"): half},
        coded_checkpoint=coded_samples.coded_checkpoint(),
        weights=dict(coded_samples.audits()),
        parallel_gradients=dict(coded_samples.parallel_gradients()),
        seconds={"import": 3.0, "generate": 1.5},
        environment={"python": "3.11.7", "torch": "2.13.0+cpu", "vllm": "0.32.0"},
    )


def change_scores(
    evidence: Evidence,
    change: Callable[[Scores], Scores],
    *,
    scenario: str = "plain",
    sizes: tuple[int, ...] = (1, 2),
    ranks: tuple[int, ...] = (0, 1),
    phases: tuple[Phase, ...] = tuple(Phase),
    requests: tuple[str, ...] | None = None,
) -> Evidence:
    """The evidence with the scores of some positions changed; `change` gets one phase's rows of one request."""

    def in_steps(scores: Scores) -> Scores:
        parts = [_part(scores, 0, 1), _part(scores, 1, None)]
        changed = [
            change(part) if phase in phases else part
            for part, phase in zip(parts, (Phase.FIRST, Phase.DECODE), strict=True)
        ]
        return Scores(
            first=changed[0].first,
            ids=torch.cat([part.ids for part in changed]),
            values=torch.cat([part.values for part in changed]),
        )

    def in_continuation(continuation: Continuation) -> Continuation:
        if requests is not None and continuation.request.name not in requests:
            return continuation
        prompt = continuation.prompt_scores
        if prompt is not None and Phase.PROMPT in phases:
            prompt = change(prompt)
        return replace(continuation, prompt_scores=prompt, step_scores=in_steps(continuation.step_scores))

    return change_traces(
        evidence,
        lambda trace: replace(trace, continuations=tuple(map(in_continuation, trace.continuations))),
        scenario=scenario,
        sizes=sizes,
        ranks=ranks,
    )


def change_traces(
    evidence: Evidence,
    change: Callable[[Trace], Trace],
    *,
    scenario: str = "plain",
    sizes: tuple[int, ...] = (1, 2),
    ranks: tuple[int, ...] = (0, 1),
) -> Evidence:
    """The evidence with some traces changed."""
    traces = dict(evidence.traces)
    for (name, size), found in evidence.traces.items():
        if name == scenario and size in sizes:
            assert isinstance(found, tuple)
            traces[name, size] = tuple(change(trace) if trace.rank in ranks else trace for trace in found)
    return replace(evidence, traces=traces)


def change_proof(evidence: Evidence, scenario: str, **fields: Any) -> Evidence:
    return change_traces(evidence, lambda t: replace(t, proof=replace(t.proof, **fields)), scenario=scenario)


def change_inspection(evidence: Evidence, **fields: Any) -> Evidence:
    assert isinstance(evidence.inspection, Inspection)
    return replace(evidence, inspection=replace(evidence.inspection, **fields))


def change_gradients(evidence: Evidence, **fields: Any) -> Evidence:
    assert isinstance(evidence.gradients, Gradients)
    return replace(evidence, gradients=replace(evidence.gradients, **fields))


def change_reference(evidence: Evidence, **fields: Any) -> Evidence:
    assert isinstance(evidence.reference, ReferenceRun)
    return replace(evidence, reference=replace(evidence.reference, **fields))


def shifted(by: float) -> Callable[[Scores], Scores]:
    """Every logit off by the same constant: argmax and probabilities stay right."""
    return lambda scores: replace(scores, values=scores.values + by)


def scaled(by: float) -> Callable[[Scores], Scores]:
    """Every logit off by the same factor: argmax stays right."""
    return lambda scores: replace(scores, values=scores.values * by)


def swapped(first: int, second: int) -> Callable[[Scores], Scores]:
    """The tokens of two ranks (from 0) exchanged, as an engine would that scored them the other way round."""

    def change(scores: Scores) -> Scores:
        ids = scores.ids.clone()
        ids[:, [first, second]] = ids[:, [second, first]]
        return replace(scores, ids=ids)

    return change


def spoiled(value: float) -> Callable[[Scores], Scores]:
    """The best logit of the last position replaced."""

    def change(scores: Scores) -> Scores:
        values = scores.values.clone()
        values[-1:, 0] = value
        return replace(scores, values=values)

    return change


def shortened(scores: Scores) -> Scores:
    """The last position dropped."""
    return _part(scores, 0, -1)


def delayed(scores: Scores) -> Scores:
    """Right logits at the wrong positions: each row holds the one before it."""
    return replace(scores, ids=scores.ids.roll(1, dims=0), values=scores.values.roll(1, dims=0))


def _same_as(evidence: Evidence, scenario: str, other: str) -> Evidence:
    """A refit that had no effect: the scores are still those of before, said of the new weights."""
    traces = dict(evidence.traces)
    for size in (1, 2):
        found = evidence.traces[other, size]
        assert isinstance(found, tuple)
        traces[scenario, size] = tuple(replace(trace, scenario=scenario) for trace in found)
    return replace(evidence, traces=traces)


def with_dropout(evidence: Evidence, **fields: Any) -> Evidence:
    """A model with dropout that works."""
    right = {"declares_dropout": True, "train_eval_difference": 0.3, "train_train_difference": 0.4}
    return change_gradients(evidence, **right | fields)


def scale_reference(evidence: Evidence, factor: float) -> Evidence:
    """A reference whose logits are all multiplied, its noise floor untouched."""
    assert isinstance(evidence.reference, ReferenceRun)
    return change_reference(evidence, logits={s: x * factor for s, x in evidence.reference.logits.items()})


def _gradient(**fields: Any) -> dict[str, ParameterGradient]:
    right = {"norm": 1.0, "finite": True, "analytic": 0.7, "numeric": 0.7 + 1e-12, "noise": 1e-10}
    return {"embed.weight": ParameterGradient(**right), "head.weight": ParameterGradient(**right | fields)}


def _mode(name: str, **fields: Any) -> dict[str, TrainingMode]:
    right = {"analytic": 0.7, "numeric": 0.7 + 1e-12, "noise": 1e-10, "parameters": 2}
    along = (Derivative(**right), Derivative(**right | fields))
    return {name: TrainingMode(derivatives=along, lengths=(41, 9), loss=5.3)}


def _tried(layout: Layout, *, noise: float = 0.0, difference: float = 0.0, error: float = 0.0) -> Ways:
    """All layouts, of which one is off in training mode."""

    def way(at: Layout, training: bool) -> Way:
        off = training and at == layout
        gradient = WorstGradient(
            parameter="embed.weight", error=error if off else 0.0, norm=1.0, largest=2.0, noise=noise
        )
        return Way(
            layout=at,
            given="input_ids",
            training=training,
            recording=True,
            difference=difference if off else 0.0,
            noise=noise,
            gradient=gradient,
        )

    layouts: tuple[Layout, ...] = ("alone", "packed", "batch")
    return Ways(ways=tuple(way(at, training) for at in layouts for training in (False, True)))


def _rounded(name: str, **fields: Any) -> dict[str, LowPrecision]:
    right = {"norm": 1.0, "error": 0.02, "noise": 0.03, "elements": 100}
    parameters = {"embed.weight": RoundedGradient(**right), "head.weight": RoundedGradient(**right | fields)}
    return {name: LowPrecision(parameters=parameters)}


def _prefixed(*prefixes: str) -> tuple[AttentionInfo, ...]:
    return tuple(
        AttentionInfo(module=f"layers.{i}.attn", prefix=prefix, num_heads=2, num_kv_heads=1, head_dim=32)
        for i, prefix in enumerate(prefixes)
    )


def _from_the_boundary(by: float) -> Callable[[Scores], Scores]:
    """The first chunk exact, all later positions off."""

    def change(scores: Scores) -> Scores:
        values = scores.values.clone()
        values[max(0, 5 - scores.first) :] += by
        return replace(scores, values=values)

    return change


_MODULES = {"norm": "float32", "head": "bfloat16", "": "bfloat16"}
"""In which dtypes a model computes that keeps its norm in float32."""


def _computing(scenario: str, **dtypes: str) -> Corruption:
    return lambda e: change_traces(e, lambda trace: replace(trace, modules=_MODULES | dtypes), scenario=scenario)


def _range(value: float) -> Corruption:
    return lambda e: replace(e, precision=Precision(dtype="bfloat16", modules={}, largest={"n": value}, declared=None))


FAILING: Mapping[str, Mapping[str, Corruption]] = {
    "interface.builds": {"no parameters": lambda e: change_inspection(e, parameters={})},
    "interface.signature": {"method missing": lambda e: change_inspection(e, problems=("compute_logits is missing",))},
    "interface.embed_input_ids": {
        "batch dimension": lambda e: change_inspection(e, embed=_probe((1, 7, HIDDEN))),
        "raises": lambda e: change_inspection(e, embed=_probe(None, "TypeError: no")),
        "no tensor": lambda e: change_inspection(e, embed=_probe(None)),
    },
    "interface.forward": {"returns logits": lambda e: change_inspection(e, forward=_probe((7, VOCABULARY)))},
    "interface.compute_logits": {"padding left in": lambda e: change_inspection(e, logits=_probe((7, 256)))},
    "interface.vllm_accepts": {
        "with a reason": lambda e: change_inspection(e, vllm_accepts=False, vllm_says="no compute_logits"),
        "without": lambda e: change_inspection(e, vllm_accepts=False, vllm_says=""),
    },
    "interface.arguments_kept": {
        "positions": lambda e: change_inspection(e, changed_arguments=("positions by forward",)),
    },
    "interface.inputs_embeds": {
        "ignored": lambda e: change_inspection(e, embeds=_probe(None, "TypeError: no"), embeds_difference=None),
        "scaled": lambda e: change_inspection(e, embeds_difference=1e-7),
        "NaN": lambda e: change_inspection(e, embeds_difference=float("nan")),
    },
    "interface.random_state": {
        "a buffer": lambda e: change_inspection(e, rebuilt_difference=1e-6, rebuilt_buffers=("jitter",)),
        "NaN": lambda e: change_inspection(e, rebuilt_difference=float("nan")),
    },
    "interface.repeatable": {
        "dropout": lambda e: change_scores(e, scaled(1.001), scenario="repeated.second", sizes=(2,)),
        "other tokens": lambda e: change_scores(e, swapped(0, 150), scenario="repeated.second"),
        "NaN": lambda e: change_scores(e, spoiled(float("nan")), scenario="repeated.second"),
    },
    "interface.prompt_embeddings": {
        "first token": lambda e: change_scores(e, shifted(1e-3), scenario="embeds", phases=(Phase.FIRST,)),
        "decode": lambda e: change_scores(e, swapped(0, 9), scenario="embeds", phases=(Phase.DECODE,), sizes=(2,)),
    },
    "interface.parameters_registered": {"in a list": lambda e: change_inspection(e, unregistered=("layers[0]",))},
    "interface.attention_prefixes": {
        "shared": lambda e: change_inspection(e, attention=_prefixed("a", "a")),
        "empty": lambda e: change_inspection(e, attention=_prefixed("a", "")),
        "no number": lambda e: change_inspection(
            e, attention=tuple(replace(layer, refused="no integer") for layer in _prefixed("a", "b"))
        ),
    },
    "interface.rebuild": {
        "renamed": lambda e: change_inspection(e, rebuilt_parameters={"other": ParameterInfo(**_PARAMETER)}),
        "resized": lambda e: change_inspection(
            e, rebuilt_parameters={"w": ParameterInfo(**_PARAMETER | {"shape": (1,)})}
        ),
        "shared": lambda e: change_inspection(e, rebuilt_shared=("w",)),
    },
    "interface.reaches_workers": {
        "in the driver": lambda e: change_proof(e, "deployed", worker_pids=(100, 200)),
        "one worker": lambda e: change_proof(e, "deployed", worker_pids=(200,)),
        "forked": lambda e: change_proof(e, "deployed", start_method="fork"),
        "other class": lambda e: change_proof(e, "deployed", model_class="transformers.TransformersForCausalLM"),
    },
    "gradients.every_parameter": {
        "none": lambda e: change_gradients(e, parameters=_gradient(norm=None)),
        "zero": lambda e: change_gradients(e, parameters=_gradient(norm=0.0)),
        "not finite": lambda e: change_gradients(e, parameters=_gradient(finite=False)),
        "all frozen": lambda e: change_gradients(e, parameters={}),
    },
    "gradients.attention_inputs": {
        "k is dead": lambda e: change_gradients(e, attention_inputs={"attn": (1.0, 0.0, 1.0)}),
        "v is NaN": lambda e: change_gradients(e, attention_inputs={"attn": (1.0, 1.0, float("nan"))}),
    },
    "gradients.numeric": {
        "one of two paths": lambda e: change_gradients(e, parameters=_gradient(analytic=0.35)),
        "detached": lambda e: change_gradients(e, parameters=_gradient(analytic=0.0)),
        "NaN": lambda e: change_gradients(e, parameters=_gradient(numeric=float("nan"))),
        "useless steps": lambda e: change_gradients(e, parameters=_gradient(analytic=0.5, noise=float("inf"))),
        "drowned in noise": lambda e: change_gradients(e, parameters=_gradient(analytic=0.5, noise=1.0)),
    },
    "gradients.training_mode": {
        "detached": lambda e: change_gradients(e, modes=_mode("training", analytic=0.0)),
        "another mask": lambda e: change_gradients(e, modes=_mode("training", numeric=0.8)),
        "NaN": lambda e: change_gradients(e, modes=_mode("training", numeric=float("nan"))),
        "useless steps": lambda e: change_gradients(e, modes=_mode("training", analytic=0.5, noise=float("inf"))),
        "another loss under no_grad": lambda e: change_gradients(
            e, modes={"training": replace(_mode("training")["training"], recording_difference=0.1)}
        ),
    },
    "gradients.batch": {
        "other values": lambda e: change_gradients(e, ways=_tried("batch", difference=1e-3)),
        "other gradients": lambda e: change_gradients(e, ways=_tried("batch", error=1e-3)),
        "other values, and random": lambda e: change_gradients(
            e, ways=_tried("batch", difference=1e-3), modes={"batch": TrainingMode(reason="differ")}
        ),
        "detached": lambda e: change_gradients(e, modes=_mode("batch", analytic=0.0)),
        "NaN": lambda e: change_gradients(e, modes=_mode("batch", analytic=float("nan"))),
    },
    "gradients.float32": {
        "other values": lambda e: change_gradients(e, float32_ways=_tried("alone", noise=1e-6, difference=1e-4)),
        "other gradients": lambda e: change_gradients(e, float32_ways=_tried("alone", noise=1e-6, error=1e-4)),
        "NaN": lambda e: change_gradients(e, float32_ways=_tried("alone", noise=1e-6, difference=float("nan"))),
    },
    "gradients.bfloat16": {
        "half of it": lambda e: change_gradients(e, low_precision=_rounded("bfloat16", error=0.5)),
        "lost": lambda e: change_gradients(e, low_precision=_rounded("bfloat16", error=None)),
        "lost, of one element": lambda e: change_gradients(
            e, low_precision=_rounded("bfloat16", error=None, elements=1)
        ),
        "NaN": lambda e: change_gradients(e, low_precision=_rounded("bfloat16", error=float("nan"))),
    },
    "gradients.autocast": {
        "half of it": lambda e: change_gradients(e, low_precision=_rounded("autocast", error=0.5)),
        "lost": lambda e: change_gradients(e, low_precision=_rounded("autocast", error=None)),
    },
    "gradients.causality": {
        "sees the future": lambda e: change_gradients(e, future_leak=1e-300),
        "sees nothing": lambda e: change_gradients(e, past_reach=0.0),
    },
    "gradients.packed_sequences": {
        "other values": lambda e: change_gradients(e, packing=Packing(difference=1e-3, leak=0.0)),
        "leak": lambda e: change_gradients(e, packing=Packing(difference=0.0, leak=1e-300)),
        "one mode": lambda e: change_gradients(e, ways=_tried("packed", difference=1e-6)),
        "gradients": lambda e: change_gradients(e, ways=_tried("packed", error=1e-3)),
        "embeddings, untapped": lambda e: change_gradients(
            e, packing=None, packing_reason="no tap", ways=_tried("packed", difference=1e-6)
        ),
    },
    "gradients.train_eval": {
        "differ": lambda e: change_gradients(e, train_eval_difference=1e-3),
        "differ without dropout": lambda e: with_dropout(e, undropped_difference=1e-3),
        "differ for embeddings": lambda e: change_gradients(e, ways=_tried("alone", difference=1e-6)),
        "random in evaluation": lambda e: change_gradients(e, eval_eval_difference=0.1),
        "random in evaluation, dropout declared": lambda e: with_dropout(e, eval_eval_difference=0.1),
    },
    "gradients.dropout": {
        "never acts": lambda e: with_dropout(e, train_train_difference=0.0),
        "acts in evaluation": lambda e: with_dropout(e, eval_eval_difference=0.1),
    },
    "gradients.loss_falls": {
        "rises": lambda e: change_gradients(e, losses=(5.0, 5.1)),
        "stays": lambda e: change_gradients(e, losses=(5.0, 5.0)),
        "NaN": lambda e: change_gradients(e, losses=(5.0, float("nan"))),
        "no step": lambda e: change_gradients(e, losses=(5.0,)),
    },
    "logits.bfloat16": {
        "scaled": lambda e: change_scores(e, scaled(1.1), scenario="bfloat16"),
        "NaN on one position": lambda e: change_scores(e, spoiled(float("nan")), scenario="bfloat16", sizes=(2,)),
    },
    "scheduling.chunked_prefill": {
        "second chunk": lambda e: change_scores(
            e, _from_the_boundary(1e-3), scenario="chunked", phases=(Phase.PROMPT,)
        ),
        "decode": lambda e: change_scores(e, swapped(0, 9), scenario="chunked", phases=(Phase.DECODE,), sizes=(2,)),
    },
    "scheduling.prefix_cache": {
        "first token": lambda e: change_scores(e, shifted(1e-3), scenario="cached", phases=(Phase.FIRST,)),
    },
    "scheduling.preemption": {"decode": lambda e: change_scores(e, delayed, scenario="preempted", sizes=(1,))},
    "scheduling.arrival_order": {
        "one request": lambda e: change_scores(e, shifted(1e-3), scenario="arrivals", requests=("one_token",)),
    },
    "scheduling.max_model_len": {
        "beyond": lambda e: change_inspection(e, max_positions=41),
        "not reached": lambda e: change_inspection(e, max_positions=43),
    },
    "refit.changed_weights": {
        "old weights": lambda e: _same_as(e, "refit.changed", "refit.before"),
        "some old values": lambda e: change_scores(e, shifted(1e-3), scenario="refit.changed", sizes=(2,)),
        "wrong before": lambda e: change_scores(e, shifted(1e-3), scenario="refit.before"),
    },
    "refit.identity": {"moved": lambda e: change_scores(e, shifted(1e-3), scenario="refit.identity")},
    "refit.no_drift": {
        "restored": lambda e: change_scores(e, scaled(1.001), scenario="refit.restored"),
        "again": lambda e: change_scores(e, shifted(1e-3), scenario="refit.again", sizes=(2,)),
    },
    "deployment.pipeline": {
        "stages": lambda e: change_scores(e, shifted(1e-3), scenario="pipeline", phases=(Phase.FIRST,), sizes=(1,)),
        "stages of two ranks": lambda e: change_scores(e, shifted(1e-3), scenario="pipeline", sizes=(2,)),
    },
    "deployment.compiled": {
        "values": lambda e: change_scores(e, shifted(1e-3), scenario="compiled", phases=(Phase.DECODE,)),
        "tokens": lambda e: change_scores(e, swapped(0, 1), scenario="compiled", phases=(Phase.PROMPT,)),
    },
    "logits.complete": {
        "NaN": lambda e: change_scores(e, spoiled(float("nan")), requests=("one_token",)),
        "infinite": lambda e: change_scores(e, spoiled(float("inf")), sizes=(2,)),
        "short": lambda e: change_scores(e, shortened, phases=(Phase.DECODE,)),
        "one request less": lambda e: change_traces(e, lambda t: replace(t, continuations=t.continuations[1:])),
        "no request": lambda e: change_traces(e, lambda t: replace(t, continuations=())),
        "token twice": lambda e: change_scores(e, lambda s: replace(s, ids=torch.zeros_like(s.ids))),
        "reference NaN": lambda e: scale_reference(e, torch.nan),
    },
    "logits.resolution": {"constant logits": lambda e: scale_reference(e, 1e-9)},
    "logits.prefill_top_k": {
        "swap": lambda e: change_scores(e, swapped(3, 4), phases=(Phase.PROMPT,)),
        "tenth": lambda e: change_scores(e, swapped(9, 30), phases=(Phase.PROMPT,), sizes=(2,)),
        "wrong positions": lambda e: change_scores(e, delayed, phases=(Phase.PROMPT,)),
    },
    "logits.first_token": {"swap": lambda e: change_scores(e, swapped(0, 1), phases=(Phase.FIRST,))},
    "logits.decode_top_k": {
        "swap": lambda e: change_scores(e, swapped(0, 9), phases=(Phase.DECODE,), requests=("sampled",)),
        "wrong positions": lambda e: change_scores(e, delayed, phases=(Phase.DECODE,)),
    },
    "logits.values": {
        "shifted": lambda e: change_scores(e, shifted(1e-3)),
        "scaled": lambda e: change_scores(e, scaled(1.001)),
        "one position": lambda e: change_scores(e, spoiled(9.0), requests=("one_token",), phases=(Phase.FIRST,)),
        "NaN": lambda e: change_scores(e, spoiled(float("nan"))),
        "short": lambda e: change_scores(e, shortened, phases=(Phase.PROMPT,)),
    },
    "logits.greedy_rank": {
        "second best": lambda e: change_scores(e, swapped(0, 1), phases=(Phase.PROMPT,)),
        "outside the vocabulary": lambda e: change_scores(
            e, lambda s: replace(s, ids=s.ids + VOCABULARY), phases=(Phase.PROMPT,)
        ),
        "reference NaN": lambda e: scale_reference(e, torch.nan),
    },
    "logits.kl": {
        "scaled": lambda e: change_scores(e, scaled(1.001)),
        "NaN": lambda e: change_scores(e, spoiled(float("nan"))),
    },
    "logits.tensor_parallel": {
        "decode at TP=2": lambda e: change_scores(e, scaled(1.001), sizes=(2,), phases=(Phase.DECODE,)),
        "request missing": lambda e: change_traces(
            e, lambda t: replace(t, continuations=t.continuations[1:]), sizes=(2,)
        ),
        "other tokens": lambda e: change_traces(e, _generating(5), sizes=(2,)),
    },
    "logits.ranks_agree": {
        "last bit": lambda e: change_scores(e, shifted(1e-6), ranks=(1,)),
        "NaN": lambda e: change_scores(e, spoiled(float("nan")), ranks=(1,)),
        "NaN on all": lambda e: change_scores(e, spoiled(float("nan"))),
        "rank missing": lambda e: replace(e, traces={**e.traces, ("plain", 2): e.traces["plain", 2][:1]}),
        "other tokens": lambda e: change_traces(e, _generating(5), ranks=(1,)),
    },
    "logits.batching": {
        "shifted": lambda e: change_scores(e, shifted(1e-3), scenario="alone"),
        "other tokens": lambda e: change_traces(e, _generating(5), scenario="alone"),
    },
    "deployment.multiprocess": {
        "shifted": lambda e: change_scores(e, shifted(1e-3), scenario="deployed"),
        "NaN": lambda e: change_scores(e, spoiled(float("nan")), scenario="deployed"),
        "at one size": lambda e: change_scores(e, shifted(1e-3), scenario="deployed", sizes=(1,)),
    },
    "deployment.eager": {"shifted": lambda e: change_scores(e, shifted(1e-3), scenario="deployed_eager")},
    "logits.module_dtypes": {
        "head in float32": _computing("bfloat16", head="float32"),
        "norm in bfloat16": _computing("bfloat16", norm="bfloat16"),
    },
    "logits.float16_range": {"too large": _range(1e5), "without reserve": _range(3e4)},
    **coded_samples.FAILING,
}
"""By check: evidence that must fail it, each made from clean evidence and named for what is wrong."""


def _generating(token: int) -> Callable[[Trace], Trace]:
    """The last generated token of every request replaced; the sequence that was computed on stays the same."""
    return lambda trace: replace(
        trace, continuations=tuple(replace(c, generated=(*c.generated[:-1], token)) for c in trace.continuations)
    )


_PARAMETER: dict[str, Any] = {"shape": (VOCABULARY, HIDDEN), "dtype": "float32", "requires_grad": True}


def _probe(shape: tuple[int, ...] | None, error: str | None = None) -> Probe:
    return Probe(call="forward(input_ids[7], positions[7])", shape=shape, dtype="float32", error=error)


def _reference(exact: list[Truth], noise: float, dtype: str, generator: torch.Generator) -> ReferenceRun:
    errors = {t.sequence: _noise(t.logits, noise, generator).abs() for t in exact}
    return ReferenceRun(
        description="random numbers",
        independent=True,
        dtype=dtype,
        higher_dtype="float64" if dtype == "float32" else "float32",
        logits={t.sequence: t.logits.float() for t in exact},
        noise_max={sequence: error.amax(dim=1).float() for sequence, error in errors.items()},
        noise_mean={sequence: error.mean(dim=1).float() for sequence, error in errors.items()},
    )


def _on_path(scenario: str, continuation: Continuation) -> Continuation:
    """What the engine's scheduler would have done with a request in this scenario."""
    prompt = len(continuation.request.prompt)
    decode = (1,) * (GENERATED - 1)
    if scenario == "chunked" and prompt > 5:
        return replace(continuation, steps=(5, prompt - 5, *decode))
    if scenario == "preempted":
        return replace(continuation, prompt_scores=None, steps=(prompt, 1, prompt + 2, *decode[2:]))
    if scenario in ("cached", "embeds") or scenario.startswith("refit."):
        return replace(continuation, prompt_scores=None, cached_tokens=min(16, prompt - 1))
    if scenario == "arrivals":
        return replace(continuation, joined=1)
    return continuation


def _noise(like: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    return size * torch.randn(like.shape, generator=generator, dtype=torch.float64)


def _continuation(truth: Truth, k: int, noise: float, generator: torch.Generator) -> Continuation:
    scored = (truth.logits + _noise(truth.logits, noise, generator)).float()
    values, ids = scored.topk(k, dim=1)
    last = len(truth.request.prompt) - 1
    everything = Scores(first=0, ids=ids, values=values)
    return Continuation(
        request=truth.request,
        generated=truth.generated,
        prompt_scores=_part(everything, 0, last) if last else None,
        step_scores=_part(everything, last, None),
    )


def _part(scores: Scores, start: int, stop: int | None) -> Scores:
    return Scores(first=scores.first + start, ids=scores.ids[start:stop], values=scores.values[start:stop])


def _trace(scenario: str, size: int, rank: int, scored: tuple[Continuation, ...], dtype: str) -> Trace:
    deployed = scenario in DEPLOYMENTS
    stages = (0, 1) if scenario == "pipeline" else (0,)
    world = size * len(stages)
    return Trace(
        scenario=scenario,
        tensor_parallel_size=size,
        rank=rank,
        continuations=scored,
        weights="refit" if scenario in REFITTED else "initial",
        proof=Proof(
            world_size=world,
            tensor_parallel_size=size,
            rank=rank,
            pid=100 + rank,
            worker_pids=tuple(200 + i for i in range(world)) if deployed else (100 + rank,),
            model_class="my_pkg.Model",
            attention_backend="CPU_ATTN",
            dtype=dtype,
            executor="mp" if deployed else "external_launcher",
            eager=scenario not in ("deployed", "pipeline", "compiled"),
            start_method="spawn" if deployed else "in-process",
            batch_sizes=(1,) * len(scored) if scenario == "alone" else (len(scored),),
            block_size=32,
            stages=tuple(sorted(stages * size)),
            embedded_tokens=sum(len(c.request.prompt) for c in scored) if scenario == "embeds" else 0,
        ),
        modules=_MODULES if dtype == "bfloat16" else {},
    )


def _inspection(vocabulary: int) -> Inspection:
    parameters = {"w": ParameterInfo(**_PARAMETER)}
    return Inspection(
        kind="function",
        signature="(vllm_config, parallel_context)",
        model_class="my_pkg.Model",
        native=False,
        problems=(),
        vllm_accepts=True,
        vllm_says="",
        parameters=parameters,
        rebuilt_parameters=dict(parameters),
        unregistered=(),
        attention=_prefixed("layers.0.attn", "layers.1.attn"),
        embed=replace(_probe((7, HIDDEN)), reads=("embed.weight",)),
        forward=_probe((7, HIDDEN)),
        logits=replace(_probe((7, vocabulary)), reads=("head.weight",)),
        probe_tokens=7,
        hidden_size=HIDDEN,
        vocab_size=vocabulary,
        max_positions=35 + GENERATED,
        supports_pipeline=True,
        ignores_config=False,
        ties_embeddings=False,
        takes_embeddings=True,
        embeds=_probe((7, HIDDEN)),
        embeds_difference=0.0,
        rebuilt_difference=0.0,
    )


def _gradients() -> Gradients:
    return Gradients(
        loss=5.3,
        parameters=_gradient(),
        frozen=(),
        attention_inputs={"layers.0.attn": (0.1, 0.2, 0.3)},
        future_leak=0.0,
        past_reach=0.4,
        packing=Packing(difference=1e-15, leak=0.0),
        packing_reason="",
        hidden_scale=3.0,
        declares_dropout=False,
        train_eval_difference=0.0,
        train_train_difference=0.0,
        eval_eval_difference=0.0,
        losses=(5.3, 5.1, 4.8),
        lengths=(41, 9),
        undropped_difference=0.0,
        modes=_mode("training") | _mode("batch"),
        low_precision=_rounded("bfloat16") | _rounded("autocast"),
        ways=_tried("alone"),
        float32_ways=_tried("alone", noise=1e-6),
    )
