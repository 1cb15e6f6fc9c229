"""gradients.*: the model trains, as plain PyTorch in float64, and what backward computes is the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator

from genmodel.conformance.access import gradients
from genmodel.conformance.catalogue import check
from genmodel.conformance.verdict import REFERENCE, Level, Measurement, NotApplicable, violations
from genmodel.runners.evidence import Evidence, ParameterGradient

ROUNDING = 1e-9
"""Relative difference that float64 arithmetic may make between two ways to compute the same hidden states. Rounding
in a network some layers deep stays below 1e-12; what these checks look for changes the leading digits."""

TRUNCATION = 1e-4
"""Relative error of a central difference over a finite step, on top of its rounding. The bugs it is there for (a path
cut from the loss, a gradient scaled by the number of ranks) are errors of order one."""

RESOLUTION = 1e-2
"""Noise of a numeric derivative that is put up with, as a share of the largest derivative of any parameter: beyond
it, agreement would prove nothing."""


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
    """The q, k and v of every attention layer get a gradient.

    Usual causes:
        Attention runs in a kernel without a backward: the layers below still train through the residual
        stream, so that the loss falls and nothing looks wrong.
    How to fix:
            self.attn = TrainableAttention(num_heads, head_dim, num_kv_heads, prefix=f"{prefix}.attn")
    Reports:
        minimind#859
    """
    layers = gradients(evidence).attention_inputs
    if not layers:
        raise NotApplicable("no TrainableAttention layer whose q, k and v could be watched")
    dead = [
        f"{name} of {module}"
        for module, norms in layers.items()
        for name, norm in zip("qkv", norms, strict=True)
        if not (math.isfinite(norm) and norm > 0)
    ]
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
        One causal mask over the whole pack; positions that run on over the boundary; state kept between
        sequences.
    How to fix:
        Pass the boundaries on: `attention(q, k, v, cu_seqlens=cu_seqlens)`, and restart `positions` at
        0 in each sequence.
    Reports:
        transformers#46634
    """
    found = gradients(evidence)
    if found.packing is None:
        raise NotApplicable(found.packing_reason or "the model takes no packed sequences")
    yield Measurement(
        what="max |hidden state packed - alone|",
        where=REFERENCE,
        measured=found.packing.difference,
        allowed=ROUNDING * found.hidden_scale,
    )
    yield Measurement(
        what="max |gradient of one sequence by the other|", where=REFERENCE, measured=found.packing.leak, allowed=0
    )


@check(needs=("inspection", "gradients"))
def train_eval(evidence: Evidence) -> Iterator[Measurement]:
    """Without dropout, training and evaluation mode compute the same.

    Usual causes:
        `F.dropout(x, p)` without `training=self.training`; another attention path or precision under
        `self.training`.
    How to fix:
        Declare dropout as `nn.Dropout` or by the `dropout=` of the attention, and branch on
        `self.training` for nothing else.
    Reports:
        NeMo-RL#2141
    """
    found = gradients(evidence)
    if found.declares_dropout:
        raise NotApplicable("the model declares dropout; gradients.dropout applies")
    yield Measurement(
        what="max |hidden state in training - in evaluation|",
        where=REFERENCE,
        measured=found.train_eval_difference,
        allowed=ROUNDING * found.hidden_scale,
    )


@check(needs=("inspection", "gradients"))
def dropout(evidence: Evidence) -> Iterator[Measurement]:
    """Declared dropout acts in training mode, and only there.

    Usual causes:
        The rate is stored and never used; `F.dropout` is called without `training=self.training`;
        sub-modules that are not registered stay in training mode after `model.eval()`.
    How to fix:
            x = F.dropout(x, self.dropout, training=self.training)
    Reports:
        minimind#859
    """
    found = gradients(evidence)
    if not found.declares_dropout:
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


def _derivative(name: str, parameter: ParameterGradient, largest: float) -> Measurement:
    size = max(abs(parameter.analytic), abs(parameter.numeric))
    return Measurement(
        what="|analytic - numeric directional derivative|",
        where=REFERENCE,
        measured=abs(parameter.analytic - parameter.numeric),
        allowed=min(parameter.noise, RESOLUTION * largest) + TRUNCATION * size,
        detail=f"{name}: {parameter.analytic:.6g} from backward, {parameter.numeric:.6g} by differences",
    )
