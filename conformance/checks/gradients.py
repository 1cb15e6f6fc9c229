"""gradients.*: the model trains, as plain PyTorch in float64, and what backward computes is the gradient."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from genmodel.conformance.access import gradients, rank_gradients, sizes, whole_gradients
from genmodel.conformance.catalogue import check
from genmodel.conformance.placement import homes, place
from genmodel.conformance.verdict import REFERENCE, Level, Measurement, NotApplicable, row, violations
from genmodel.runners.evidence import (
    FEW,
    PADDING,
    Evidence,
    Layout,
    ParameterGradient,
    RankGradients,
    RoundedGradient,
    Way,
    WorstGradient,
)

ROUNDING = 1e-9
"""Relative difference that float64 arithmetic may make between two ways to compute the same hidden states. Rounding
in a network some layers deep stays below 1e-12; what these checks look for changes the leading digits."""

TRUNCATION = 1e-4
"""Relative error of a central difference over a finite step, on top of its rounding. The bugs it is there for (a path
cut from the loss, a gradient scaled by the number of ranks) are errors of order one."""

SLICES = 1e-5
"""Relative difference that is put up with between losses, and between gradient norms, of different numbers of ranks:
float64 makes less than 1e-12 of it, models that compute norms or softmax in float32 less than 1e-6, bugs of these
kinds a few percent at least."""

NOTHING = 1e-6
"""Share of the model's largest gradient that counts as none: a bias of k, say, whose gradient is rounding only."""

RESOLUTION = 1e-2
"""Noise of a numeric derivative that is put up with, as a share of the largest derivative of any parameter: beyond
it, agreement would prove nothing."""

NOISE_FACTOR = 4.0
"""Noise floors that a gradient in bfloat16 may be off: the rule that holds for logits. Of dense, gpt, moe and hybrid
under 30 seeds each, the largest error of a parameter was 2.1 noise floors, and a quarter of what is allowed."""

ULPS = 4 * torch.finfo(torch.bfloat16).eps
"""Share of a gradient's norm that it may be off on top: four units in the last place."""

FLOAT32_ULPS = 4 * torch.finfo(torch.float32).eps
"""The same in float32, of outputs and gradients."""


@check(needs=("inspection", "gradients"))
def every_parameter(evidence: Evidence) -> Iterator[Measurement]:
    """Every trainable parameter gets a gradient that is finite and not zero.

    Usual causes:
        The parameter is never used; its path to the loss is cut by `.detach()`, `.data`,
        `torch.no_grad()` or a kernel without a backward, such as vLLM's flash_attn_varlen_func.
    How to fix:
        Use `TrainableAttention`, which is differentiable outside vLLM and vLLM's paged attention
        inside. Remove parameters that do nothing, or set `requires_grad=False` on those that are not to
        be trained.
    Reports:
        minimind#859 torchtitan#1805
    """
    parameters = gradients(evidence).parameters
    yield violations("models without a trainable parameter", () if parameters else ("this one",))
    yield violations("parameters without a gradient", [n for n, p in parameters.items() if p.finite and not p.norm])
    yield violations("parameters with NaN or infinite gradients", [n for n, p in parameters.items() if not p.finite])


@check(needs=("inspection", "gradients"))
def attention_inputs(evidence: Evidence) -> Iterator[Measurement]:
    """The q, k and v of every attention layer get a gradient, but for constants and what does not change the loss.

    Usual causes:
        Attention runs in a kernel without a backward: the layers below still train through the residual
        stream, so that the loss falls and nothing looks wrong.
    How to fix:
            self.attn = TrainableAttention(num_heads, head_dim, num_kv_heads, prefix=f"{prefix}.attn")
    Reports:
        minimind#859
    """
    found = gradients(evidence)
    if not found.attention_inputs:
        raise NotApplicable("no TrainableAttention layer whose q, k and v could be watched")
    norms = {
        f"{name} of {module}": norm
        for module, three in found.attention_inputs.items()
        for name, norm in zip("qkv", three, strict=True)
    }
    exempt = found.unjudged_attention_inputs
    if norms.keys() <= exempt.keys():
        raise NotApplicable("; ".join(f"{name} {reason}" for name, reason in exempt.items()))
    dead = [name for name, norm in norms.items() if not (math.isfinite(norm) and norm > 0) and name not in exempt]
    yield violations("attention inputs without a gradient", dead)


@check(needs=("inspection", "gradients"))
def numeric(evidence: Evidence) -> Iterator[Measurement]:
    """Analytic and numeric gradients agree: the directional derivative of every parameter, in float64.

    Usual causes:
        One of several paths to the loss is detached; a hand-written backward is wrong; a reduction over
        ranks is missing or done twice; the forward has side effects, so that two evaluations differ.
    How to fix:
        Test the suspect function alone: `torch.autograd.gradcheck(function, inputs.double())`.
    Reports:
        minimind#859 torchtitan#1805 torchtitan#2106 Megatron-LM#7452
    """
    found = gradients(evidence).parameters
    if not found:
        return
    largest = max(abs(parameter.analytic) for parameter in found.values())
    derivatives = (_derivative(name, parameter, largest) for name, parameter in found.items())
    yield max(derivatives, key=lambda measurement: measurement.severity)


@check(needs=("inspection", "gradients"))
def training_mode(evidence: Evidence) -> Iterator[Measurement]:
    """Analytic and numeric gradients agree in training mode too, with one dropout mask for all passes, in float64.

    Without dropout they are those of evaluation mode, whether tokens or their embeddings are given.

    Usual causes:
        A path is detached, or runs under `no_grad`, only `if self.training` or only for long sequences;
        activation checkpointing recomputes with another dropout mask (`preserve_rng_state=False`); a hook
        scales gradients.
    How to fix:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    Reports:
        minimind#859
    """
    yield from _mode(evidence, "training")
    yield from _gradients_of(_ways(evidence, "alone"))


@check(needs=("inspection", "gradients"))
def batch(evidence: Evidence) -> Iterator[Measurement]:
    """A model that gives [batch, tokens, hidden] for [batch, tokens] gives what the rows give alone; gradients too.

    One that does not take batches raises, or gives something of another shape.

    Usual causes:
        Code for flattened tokens keeps the shape and takes the batch for one sequence; a path is detached
        in code for tensors with a batch dimension; a hand-written backward sums over the wrong
        dimensions.
    How to fix:
        Write layers for any leading dimensions: `x.unflatten(-1, (heads, dim))`, norms over the last
        dimension. Or refuse:

            (tokens,) = input_ids.shape
    Reports:
        minimind#859
    """
    found = _ways(evidence, "batch")
    yield from _outputs_of(found, SLICES)
    yield from _gradients_of(found)
    mode = gradients(evidence).modes.get("batch")
    if not found or not (mode and mode.reason):
        yield from _mode(evidence, "batch")


@check(needs=("inspection", "gradients"))
def float32(evidence: Evidence) -> Iterator[Measurement]:
    """Training in float32 computes what float64 does, but for what rounding every operation to float32 would change.

    In training and evaluation mode, while autograd records and while it does not, of tokens and of their embeddings.
    What is wrong in float64 already is left to the other checks.

    Usual causes:
        `torch.autocast`, or a kernel for bfloat16, under `if self.training`: the trainer's precision is
        lower than the engine's. Autocast leaves float64 alone, so that nothing shows there.
    How to fix:
        Leave autocast to the training loop, and branch on `self.training` for nothing but dropout.
    Reports:
        NeMo-RL#2141
    """
    found = gradients(evidence).float32_ways
    right = {_key(way) for way in gradients(evidence).ways.ways if _right(way)} | {_key(EVALUATED)}
    ways = [way for way in found.ways if not way.reason and _key(way) in right]
    if not ways:
        raise NotApplicable(found.reason or "it was not measured")
    worst = max(ways, key=lambda way: _output(way, _rounding(way)).severity)
    yield _output(worst, _rounding(worst))
    rounded = [(way, way.gradient) for way in ways if way.gradient is not None]
    if rounded:
        yield max((_gradient(way, g, _rounded(g)) for way, g in rounded), key=lambda m: m.severity)


@check(needs=("inspection", "gradients"))
def bfloat16(evidence: Evidence) -> Iterator[Measurement]:
    """Gradients of a model in bfloat16 are those of float64, but for what rounding every operation would change.

    Usual causes:
        A kernel for low precision without a backward; a cast by `.data`, `torch.tensor(x)` or numpy, which
        cuts the graph; a hand-written backward that is wrong in one dtype.
    How to fix:
        Cast by `x.to(dtype)`, which is differentiable. Test the suspect function in both dtypes.
    Reports:
        minimind#859
    """
    yield from _low_precision(evidence, "bfloat16")


@check(needs=("inspection", "gradients"))
def autocast(evidence: Evidence) -> Iterator[Measurement]:
    """Gradients under torch.autocast are those of float64, but for what rounding every operation would change.

    Usual causes:
        Those of gradients.bfloat16; a `torch.autograd.Function` without `torch.amp.custom_fwd` and
        `custom_bwd`; a branch on `torch.is_autocast_enabled()`.
    How to fix:
        Decorate forward and backward of hand-written functions with `torch.amp.custom_fwd` and
        `torch.amp.custom_bwd`.
    Reports:
        minimind#859
    """
    yield from _low_precision(evidence, "autocast")


@check(needs=("inspection", "gradients"))
def causality(evidence: Evidence) -> Iterator[Measurement]:
    """Hidden states depend on earlier tokens and, exactly, on no later one.

    Usual causes:
        The causal mask is missing or shifted by one; a norm or pooling runs over the sequence;
        `positions` are ignored. If nothing depends on earlier tokens either, attention does not reach
        the output at all.
    How to fix:
        `TrainableAttention(..., causal=True)`; norms over the last dimension only.
    Reports:
        mlx-vlm#1983
    """
    found = gradients(evidence)
    if found.future_leak is None or found.past_reach is None:
        raise NotApplicable("no embedding through which gradients could be followed")
    yield Measurement(
        what="max |gradient of a hidden state by a later token|", where=REFERENCE, measured=found.future_leak, allowed=0
    )
    unreached = () if found.past_reach > 0 else ("no hidden state depends on any earlier token",)
    yield violations("directions in which nothing is seen", unreached)


@check(needs=("inspection", "gradients"))
def packed_sequences(evidence: Evidence) -> Iterator[Measurement]:
    """Sequences packed into one forward do not see each other.

    Usual causes:
        One causal mask over the whole pack; positions that run on over the boundary, if only in training
        mode; state kept between sequences; a path without a backward for packed ones.
    How to fix:
        Pass the boundaries on: `attention(q, k, v, cu_seqlens=cu_seqlens)`, and restart `positions` at
        0 in each sequence.
    Reports:
        transformers#46634
    """
    found = gradients(evidence)
    ways = _ways(evidence, "packed")
    if found.packing is None and not ways:
        raise NotApplicable(found.packing_reason or "the model takes no packed sequences")
    plain = []
    if found.packing is not None:
        plain = [
            Measurement(
                what="max |hidden state packed - alone|",
                where=REFERENCE,
                measured=found.packing.difference,
                allowed=ROUNDING * found.hidden_scale,
            ),
            Measurement(
                what="max |gradient of one sequence by the other|",
                where=REFERENCE,
                measured=found.packing.leak,
                allowed=0,
            ),
        ]
    yield from plain
    if all(measurement.ok for measurement in plain):  # else the rest would tell the same story again
        yield from _outputs_of(ways, ROUNDING)
        yield from _gradients_of(ways)


@check(needs=("inspection", "gradients"))
def train_eval(evidence: Evidence) -> Iterator[Measurement]:
    """Evaluation draws no random numbers, and training mode computes the same but for dropout.

    Usual causes:
        `F.dropout(x, p)` without `training=self.training`; layers skipped at random in evaluation too;
        another attention path or precision under `self.training`.
    How to fix:
            x = F.dropout(x, self.dropout, training=self.training)
        Branch on `self.training` for nothing else.
    Reports:
        NeMo-RL#2141
    """
    found = gradients(evidence)
    allowed = ROUNDING * found.hidden_scale
    yield Measurement(
        what="max |difference between evaluations under two seeds|",
        where=REFERENCE,
        measured=found.eval_eval_difference,
        allowed=allowed,
    )
    random = found.declares_dropout or found.train_train_difference > 0
    difference = found.undropped_difference if random else found.train_eval_difference
    if difference is not None:
        yield Measurement(
            what="max |hidden state in training - in evaluation|" + (" without dropout" if random else ""),
            where=REFERENCE,
            measured=difference,
            allowed=allowed,
        )
    yield from _outputs_of(_ways(evidence, "alone"), ROUNDING)


@check(needs=("inspection", "gradients"))
def dropout(evidence: Evidence) -> Iterator[Measurement]:
    """Dropout acts in training mode, and only there.

    Usual causes:
        The rate is stored and never used; `F.dropout` is called without `training=self.training`;
        sub-modules that are not registered stay in training mode after `model.eval()`.
    How to fix:
            x = F.dropout(x, self.dropout, training=self.training)
    Reports:
        minimind#859
    """
    found = gradients(evidence)
    if not found.declares_dropout and not found.train_train_difference > 0:
        raise NotApplicable("the model declares no dropout; gradients.train_eval applies")
    idle = [
        runs
        for runs, difference in (
            ("two training runs under different seeds", found.train_train_difference),
            ("training and evaluation", found.train_eval_difference),
        )
        if not difference > 0
    ]
    yield violations("runs that dropout should have made differ", idle)
    yield Measurement(
        what="max |difference between two evaluations|", where=REFERENCE, measured=found.eval_eval_difference, allowed=0
    )


@check(needs=("inspection", "gradients"), level=Level.RECOMMENDED)
def loss_falls(evidence: Evidence) -> Iterator[Measurement]:
    """A few optimiser steps on one batch lower the loss.

    Usual causes:
        Gradients of the wrong sign or scale (look at gradients.numeric first); parameters the optimiser
        does not get because they are not registered; activations that are saturated from the start.
    How to fix:
        Make gradients.every_parameter and gradients.numeric pass; what is left is usually
        initialisation.
    Reports:
        minimind#859
    """
    losses = gradients(evidence).losses
    course = " -> ".join(f"{loss:.4g}" for loss in losses)
    lower = len(losses) > 1 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    yield violations("courses of the loss that do not end lower", () if lower else (course or "no step was made",))


@check(needs=("inspection", "parallel_gradients"), tensor_parallel=2)
def parallel(evidence: Evidence) -> Iterator[Measurement]:
    """In a tensor-parallel group every gradient is the slice of TP=1's, on every rank, and the loss is the same.

    In training mode too all ranks have the same hidden states: seeded alike they drop the same elements of what each
    has in full, and without dropout the states are TP=1's.

    Usual causes:
        A reduction is missing in backward (the input of a column-parallel layer needs one, the output of
        a row-parallel layer none), or there is one too many and gradients are scaled by the number of
        ranks; a replicated parameter sees only its rank's part of the work, so that replicas drift apart;
        a dropout mask of a rank's own on a tensor that every rank has in full.
    How to fix:
        Build on the layers of genmodel, whose backward reduces. In layers of your own use
        `copy_to_group` on the way in and `reduce_from_group` on the way out, both of
        `genmodel.modeling.collectives`; `torch.distributed.nn.functional.all_reduce` scales gradients.
    Reports:
        torchtitan#1805 Megatron-LM#7452 torchtitan#2106 Megatron-LM#1446
    """
    whole = whole_gradients(evidence)
    for ranks in _groups(evidence):
        where = row(ranks[0].tensor_parallel_size)
        furthest = max(ranks, key=lambda rank: abs(rank.loss - whole.loss))
        yield Measurement(
            what="|loss - loss at TP=1|",
            where=where,
            measured=abs(furthest.loss - whole.loss),
            allowed=SLICES * abs(whole.loss),
            detail=f"rank {furthest.rank}: {furthest.loss:.8g}, at TP=1 {whole.loss:.8g}",
        )
        yield violations("parameters without a gradient that have one at TP=1", _without_gradient(ranks, whole), where)
        compared = [found for rank in ranks for found in _slices(rank, whole)]
        if compared:
            worst = max(compared, key=lambda measurement: measurement.severity)
            beyond = len({m.detail.partition(" ")[0] for m in compared if not m.ok} - {worst.detail.partition(" ")[0]})
            yield replace(worst, detail=worst.detail + (f"; {beyond} more parameters are wrong" if beyond else ""))
        yield from _alike_in_training(ranks, whole, where)


def _alike_in_training(ranks: Sequence[RankGradients], whole: RankGradients, where: str) -> Iterator[Measurement]:
    """Of models whose ranks have hidden states in full, as at TP=1; of those whose ranks have shares the loss tells."""
    if any(rank.trained.shape != whole.trained.shape for rank in ranks):
        return
    trained = {rank.rank: rank.trained for rank in ranks}
    yield _furthest("max |hidden state in training - rank 0's|", where, trained, ranks[0].trained)
    undropped = {rank.rank: rank.undropped for rank in ranks if rank.undropped is not None}
    if len(undropped) == len(ranks) and whole.undropped is not None:
        yield _furthest("max |hidden state in training without dropout - at TP=1|", where, undropped, whole.undropped)


def _furthest(what: str, where: str, states: Mapping[int, torch.Tensor], right: torch.Tensor) -> Measurement:
    """Of the rank whose hidden states are furthest from the right ones."""
    off = {rank: float((held - right).abs().max()) for rank, held in states.items()}
    rank = max(off, key=lambda rank: math.inf if math.isnan(off[rank]) else off[rank])
    allowed = SLICES * float(right.abs().max())
    return Measurement(what=what, where=where, measured=off[rank], allowed=allowed, detail=f"rank {rank}")


@check(needs=("inspection", "parallel_gradients"), tensor_parallel=2)
def norm(evidence: Evidence) -> Iterator[Measurement]:
    """The global gradient norm over all ranks, with replicas counted once, is TP=1's: clipping clips alike.

    Usual causes:
        Those of gradients.parallel; look there first. If a trainer's norm differs and this one does not,
        the trainer counts replicated parameters once per rank.
    How to fix:
        Sum the squares of sharded parameters over the ranks, and those of replicated ones on one rank.
    Reports:
        torchtitan#2106 Megatron-LM#1446
    """
    whole = whole_gradients(evidence)
    expected = _norm_once([whole], whole)
    for ranks in _groups(evidence):
        measured = _norm_once(ranks, whole)
        yield Measurement(
            what="|gradient norm - norm at TP=1|",
            where=row(ranks[0].tensor_parallel_size),
            measured=abs(measured - expected),
            allowed=SLICES * expected,
            detail=f"{measured:.8g}, at TP=1 {expected:.8g}",
        )


def _groups(evidence: Evidence) -> Iterator[tuple[RankGradients, ...]]:
    """The ranks of each group of more than one, of models that share their work in training at all."""
    whole = whole_gradients(evidence)
    shapes = {name: codes.shape for name, codes in whole.codes.items()}
    for size in sizes(evidence):
        if size > 1:
            ranks = rank_gradients(evidence, size)
            if all({name: codes.shape for name, codes in rank.codes.items()} == shapes for rank in ranks):
                raise NotApplicable("outside vLLM every rank has the whole model: nothing is parallel in training")
            yield ranks


def _slices(rank: RankGradients, whole: RankGradients) -> Iterator[Measurement]:
    """Each gradient of a rank against the slice of TP=1's that its codes name."""
    largest = max((float(g.abs().max()) for g in whole.gradients.values() if g is not None and g.numel()), default=0.0)
    home = homes(rank.codes, whole.codes)
    for name, gradient in rank.gradients.items():
        full = whole.gradients.get(home.get(name, ""))
        if gradient is None or full is None or not full.numel():
            continue
        found = place(rank.codes[name], whole.codes[home[name]])
        expected = torch.where(found.positions >= 0, full.flatten()[found.positions.clamp(min=0)], 0.0)
        judged = (found.positions >= 0) | (rank.codes[name] == PADDING)
        difference = torch.where(judged, gradient - expected, 0.0)
        yield Measurement(
            what="|gradient - slice of the gradient at TP=1|",
            where=row(rank.tensor_parallel_size),
            measured=float(difference.abs().max()) if difference.numel() else 0.0,
            allowed=SLICES * float(full.abs().max()) + NOTHING * largest,
            detail=f"{name} on rank {rank.rank}{_scaled(gradient, expected)}",
        )


def _scaled(gradient: torch.Tensor, expected: torch.Tensor) -> str:
    """That a gradient is a multiple of what it should be, if it is."""
    square = float(expected.square().sum())
    factor = float((gradient * expected).sum()) / square if square > 0 else 1.0
    if abs(factor - 1) < TRUNCATION or not float((gradient - factor * expected).norm()) < 1e-3 * float(gradient.norm()):
        return ""
    return f" is {factor:.4g} times what it should be"


def _without_gradient(ranks: Collection[RankGradients], whole: RankGradients) -> list[str]:
    return [
        f"{name} on rank {rank.rank}"
        for rank in ranks
        for name, home in homes(rank.codes, whole.codes).items()
        if rank.gradients.get(name) is None and whole.gradients.get(home) is not None
    ]


def _norm_once(ranks: Collection[RankGradients], whole: RankGradients) -> float:
    """Norm over all elements that any rank holds; of replicas the first one counts."""
    total = 0.0
    seen: dict[str, torch.Tensor] = {}
    for rank in ranks:
        home = homes(rank.codes, whole.codes)
        for name, gradient in rank.gradients.items():
            if gradient is None or name not in home:
                continue
            full = whole.codes[home[name]]
            counted = seen.setdefault(home[name], torch.zeros(full.numel(), dtype=torch.bool))
            positions = place(rank.codes[name], full).positions
            new = (positions >= 0) & ~counted[positions.clamp(min=0)]
            total += float(gradient[new].square().sum())
            counted[positions[new]] = True
    return math.sqrt(total)


def _derivative(name: str, parameter: ParameterGradient, largest: float) -> Measurement:
    size = max(abs(parameter.analytic), abs(parameter.numeric))
    return Measurement(
        what="|analytic - numeric directional derivative|",
        where=REFERENCE,
        measured=abs(parameter.analytic - parameter.numeric),
        allowed=min(parameter.noise, RESOLUTION * largest) + TRUNCATION * size,
        detail=f"{name}: {parameter.analytic:.6g} from backward, {parameter.numeric:.6g} by differences",
    )


def _mode(evidence: Evidence, name: str) -> Iterator[Measurement]:
    """The laws of one way to train."""
    found = gradients(evidence).modes.get(name)
    if found is None or found.reason or not found.derivatives:
        raise NotApplicable(
            found.reason if found and found.reason else "it was not measured, or nothing can be trained"
        )
    yield Measurement(
        what="|loss while autograd records - loss under no_grad|",
        where=REFERENCE,
        measured=found.recording_difference,
        allowed=SLICES * abs(found.loss),
    )
    sequences = " and ".join(map(str, found.lengths))
    yield max(
        (
            Measurement(
                what="|analytic - numeric directional derivative|",
                where=REFERENCE,
                measured=abs(along.analytic - along.numeric),
                allowed=min(along.noise, RESOLUTION * size) + TRUNCATION * size,
                detail=f"along {along.parameters} parameters, sequences of {sequences} tokens: "
                f"{along.analytic:.6g} from backward, {along.numeric:.6g} by differences",
            )
            for along in found.derivatives
            for size in (max(abs(along.analytic), abs(along.numeric)),)
        ),
        key=lambda measurement: measurement.severity,
    )


def _ways(evidence: Evidence, layout: Layout) -> list[Way]:
    """The ways of a layout that the model can be run in, in float64."""
    return [way for way in gradients(evidence).ways.ways if way.layout == layout and not way.reason]


def _outputs_of(ways: Collection[Way], share: float) -> Iterator[Measurement]:
    """The law of what is computed: it is what evaluation of each sequence computes."""
    if ways:
        yield max((_output(way, share) for way in ways), key=lambda measurement: measurement.severity)


def _gradients_of(ways: Collection[Way]) -> Iterator[Measurement]:
    """The law of gradients: they are those of evaluation of each sequence."""
    found = [(way, way.gradient) for way in ways if way.gradient is not None]
    if found:
        yield max(
            (_gradient(way, g, SLICES * g.norm + NOTHING * g.largest) for way, g in found), key=lambda m: m.severity
        )


def _output(way: Way, allowed: float) -> Measurement:
    return Measurement(
        what="|outputs - outputs of evaluation| / |outputs of evaluation|",
        where=REFERENCE,
        measured=way.difference,
        allowed=allowed,
        detail=_described(way),
    )


def _gradient(way: Way, gradient: WorstGradient, allowed: float) -> Measurement:
    return Measurement(
        what="|gradient - gradient in evaluation|",
        where=REFERENCE,
        measured=gradient.error,
        allowed=allowed,
        detail=f"{gradient.parameter}, whose gradient has norm {gradient.norm:.3g}; {_described(way)}",
    )


EVALUATED = Way(layout="alone", given="input_ids", training=False, recording=False)
"""What all other ways are compared with in float64."""


def _key(way: Way) -> tuple[object, ...]:
    return way.layout, way.given, way.training, way.recording


def _right(way: Way) -> bool:
    """Whether a way computes in float64 what it should."""
    measured = [*_outputs_of([way], SLICES), *_gradients_of([way])]
    return not way.reason and all(measurement.ok for measurement in measured)


def _rounding(way: Way) -> float:
    return NOISE_FACTOR * way.noise + FLOAT32_ULPS


def _rounded(gradient: WorstGradient) -> float:
    return NOISE_FACTOR * gradient.noise + FLOAT32_ULPS * gradient.norm + NOTHING * gradient.largest


def _described(way: Way) -> str:
    """In words, such as "packed inputs_embeds in training mode, under no_grad"."""
    layout = {"alone": "single sequences of", "packed": "packed", "batch": "[batch, tokens] of"}[way.layout]
    mode = "training" if way.training else "evaluation"
    recorded = "while autograd records" if way.recording else "under no_grad"
    return f"{layout} {way.given} in {mode} mode, {recorded}"


def _low_precision(evidence: Evidence, name: str) -> Iterator[Measurement]:
    """The laws of gradients in low precision."""
    found = gradients(evidence).low_precision.get(name)
    if found is None or found.reason:
        raise NotApplicable(found.reason if found else "it was not measured")
    largest = max((p.norm for p in found.parameters.values()), default=0.0)
    real = {n: p for n, p in found.parameters.items() if p.norm > NOTHING * largest and _limit(p) < p.norm}
    judged = {n: p for n, p in real.items() if p.elements >= FEW}
    if not judged:
        raise NotApplicable("rounding alone can change every gradient by as much as its size")
    lost = [n for n, p in real.items() if p.error is None]
    yield violations("parameters without a gradient that have one in float64", lost)
    yield max(
        (
            Measurement(
                what="|gradient - gradient in float64|",
                where=REFERENCE,
                measured=p.norm if p.error is None else p.error,
                allowed=_limit(p),
                detail=f"{n}, whose gradient has norm {p.norm:.3g}; rounding alone changes it by {p.noise:.3g}",
            )
            for n, p in judged.items()
        ),
        key=lambda measurement: measurement.severity,
    )


def _limit(gradient: RoundedGradient) -> float:
    return NOISE_FACTOR * gradient.noise + ULPS * gradient.norm
