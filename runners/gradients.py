"""Train a model standalone, in float64, and measure what its gradients are worth."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genmodel.modeling.attention import TrainableAttention, packed_sequences
from genmodel.modeling.wrapper import accepts
from genmodel.runners import coding
from genmodel.runners.evidence import Gradients, Packing, ParameterGradient
from genmodel.runners.standalone import Standalone
from genmodel.runners.workload import edge_tokens

LENGTHS = (17, 9)
"""Tokens of the two training sequences."""
STEPS = 6
LEARNING_RATE = 1e-3
STEPS_OF_DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Lengths of the steps along a direction of length one."""


def measure(built: Standalone, seed: int) -> Gradients:
    """All gradient evidence of a loaded float64 model at TP=1; its weights end as they began."""
    model = built.model
    generator = torch.Generator().manual_seed(seed)
    batch = training_batch(built, generator)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    model.eval()
    model.zero_grad(set_to_none=True)
    with _attention_inputs(model) as inputs:
        loss = training_loss(built, batch)
        if loss.requires_grad:
            loss.backward()
    value = float(loss.detach())
    gradients = {name: None if p.grad is None else coding.local(p.grad).clone() for name, p in trainable.items()}
    reached = {name: _norms(captured) for name, captured in inputs.items()}
    model.zero_grad(set_to_none=True)

    future, past = _causality(built, batch[0][:10])
    packing, reason = _packing(built, batch)
    modes = _modes(built, batch[0])
    return Gradients(
        loss=value,
        parameters={
            name: _directional(built, batch, parameter, gradients[name], value, generator)
            for name, parameter in trainable.items()
        },
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
        attention_inputs=reached,
        future_leak=future,
        past_reach=past,
        packing=packing,
        packing_reason=reason,
        hidden_scale=modes["scale"],
        declares_dropout=_declares_dropout(model),
        train_eval_difference=modes["train_eval"],
        train_train_difference=modes["train_train"],
        eval_eval_difference=modes["eval_eval"],
        losses=_optimise(built, batch),
    )


def training_batch(built: Standalone, generator: torch.Generator) -> list[torch.Tensor]:
    """Random token sequences [T] of the LENGTHS, the same for the same seed and vocabulary.

    None begins with a token whose embedding is next to nothing (`checkpoint.SMALL_ROWS`): with nothing else to attend
    to, the loss is too steep there for differences.
    """
    vocab = built.logits(torch.tensor([0])).shape[-1]
    batch = [torch.randint(vocab, (length,), generator=generator) for length in LENGTHS]
    for tokens in batch:
        if int(tokens[0]) in edge_tokens(vocab):
            tokens[0] = vocab // 3
    return batch


def training_loss(built: Standalone, batch: list[torch.Tensor]) -> torch.Tensor:
    """Mean next-token cross-entropy over the batch's sequences, each run on its own."""
    return torch.stack([F.cross_entropy(built.logits(tokens[:-1]), tokens[1:]) for tokens in batch]).mean()


@contextlib.contextmanager
def _attention_inputs(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep the q, k and v that reach each TrainableAttention, with their gradients."""
    captured: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, TrainableAttention):

            def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], name: str = name) -> None:
                values = dict(zip("qkv", arguments, strict=False)) | {k: v for k, v in keywords.items() if k in "qkv"}
                for value in (values["q"], values["k"], values["v"]):
                    if value.requires_grad:
                        value.retain_grad()
                    captured.setdefault(name, []).append(value)

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _norms(captured: list[torch.Tensor]) -> tuple[float, float, float]:
    """Norms of the q, k and v gradients over all calls; `captured` repeats q, k, v."""

    def norm(values: list[torch.Tensor]) -> float:
        gradients = [v.grad for v in values if v.requires_grad and v.grad is not None]
        return math.sqrt(sum(float(g.norm()) ** 2 for g in gradients))

    return norm(captured[0::3]), norm(captured[1::3]), norm(captured[2::3])


@torch.no_grad()
def _directional(
    built: Standalone,
    batch: list[torch.Tensor],
    parameter: nn.Parameter,
    gradient: torch.Tensor | None,
    loss: float,
    generator: torch.Generator,
) -> ParameterGradient:
    """Analytic against numeric derivative along one direction.

    The direction is half random, half the gradient's own, so that the derivative is neither lost in
    rounding nor blind to what the gradient misses. Central differences D at h, 2h and 4h tell their own
    error: they agree where the loss is smooth and exact enough, and not where rounding dominates (a
    model that computes parts of itself in float32 needs wide steps) or a kink is near (relu needs
    narrow ones). The step whose three agree best is used, with Richardson's (4 D(h) - D(2h)) / 3.
    """
    finite = gradient is None or bool(torch.isfinite(gradient).all())
    direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    direction /= direction.norm()
    norm = None if gradient is None else float(gradient.norm())
    if gradient is not None and finite and norm:
        direction += gradient / norm
        direction /= direction.norm()
    analytic = float((gradient * direction).sum()) if gradient is not None and finite else 0.0
    values = coding.local(parameter)
    original = values.clone()

    def at(step: float) -> float:
        values.copy_(original + step * direction)
        return float(training_loss(built, batch))

    def central(step: float) -> float:
        return (at(step) - at(-step)) / (2 * step)

    best = (float("nan"), float("inf"))
    for h in STEPS_OF_DIFFERENCES:
        narrow, middle, wide = central(h), central(2 * h), central(4 * h)
        numeric = (4 * narrow - middle) / 3
        rounding = 8 * torch.finfo(torch.float64).eps * max(1.0, abs(loss)) / h
        noise = max(abs(narrow - middle), abs(middle - wide)) + rounding
        if noise < best[1]:
            best = (numeric, noise)
        if noise < 1e-6 * abs(numeric):
            break
    values.copy_(original)
    return ParameterGradient(norm=norm, finite=finite, analytic=analytic, numeric=best[0], noise=best[1])


@contextlib.contextmanager
def _tapped_embedding() -> Iterator[list[torch.Tensor]]:
    """Add a zero that requires a gradient to what the first embedding gives; yields it once a forward ran."""
    taps: list[torch.Tensor] = []

    def tap(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        looked_up = bool(arguments) and isinstance(arguments[0], torch.Tensor) and not arguments[0].is_floating_point()
        if taps or not looked_up or not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        if output.dim() != 2 or output.shape[0] != arguments[0].numel():
            return None
        taps.append(torch.zeros_like(output, requires_grad=True))
        return output + taps[0]

    handle = torch.nn.modules.module.register_module_forward_hook(tap)
    try:
        yield taps
    finally:
        handle.remove()


def _causality(built: Standalone, tokens: torch.Tensor) -> tuple[float | None, float | None]:
    """(largest |d hidden[t] / d embedding[s]| over s > t, the same over s < t)."""
    with _tapped_embedding() as taps:
        hidden = built.hidden(tokens)
    if not taps or not hidden.requires_grad:
        return None, None
    weights = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    future = past = 0.0
    for t in range(len(tokens)):
        (gradient,) = torch.autograd.grad((hidden[t] * weights).sum(), taps[0], retain_graph=True, allow_unused=True)
        if gradient is None:
            continue
        per_position = gradient.abs().amax(-1)
        future = max(future, float(per_position[t + 1 :].max()) if t + 1 < len(tokens) else 0.0)
        past = max(past, float(per_position[:t].max()) if t else 0.0)
    return future, past


def _packing(built: Standalone, batch: list[torch.Tensor]) -> tuple[Packing | None, str]:
    """Two sequences laid end to end against each alone."""
    model: Any = built.model
    first, second = batch
    boundaries = torch.tensor([0, len(first), len(first) + len(second)], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])
    tokens = torch.cat([first, second])
    extra: dict[str, torch.Tensor] = {}
    context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if accepts(model.forward, "cu_seqlens"):
        extra = {"cu_seqlens": boundaries}
    elif any(isinstance(m, TrainableAttention) for m in model.modules()):
        context = packed_sequences(boundaries)
    else:
        return (
            None,
            "the model cannot be told of packed sequences: no TrainableAttention, no forward(cu_seqlens=...)",
        )
    with context, _tapped_embedding() as taps:
        packed = model(input_ids=tokens, positions=positions, **extra)
    cut = len(first)
    with torch.no_grad():
        difference = max(
            float((packed[:cut] - built.hidden(first)).abs().max()),
            float((packed[cut:] - built.hidden(second)).abs().max()),
        )
    if not taps or not packed.requires_grad:
        return None, "no embedding could be tapped, or its gradient is cut"
    leak = 0.0
    for mine, other in ((slice(0, cut), slice(cut, None)), (slice(cut, None), slice(0, cut))):
        (gradient,) = torch.autograd.grad(packed[mine].square().sum(), taps[0], retain_graph=True, allow_unused=True)
        if gradient is not None:
            leak = max(leak, float(gradient[other].abs().max()))
    return Packing(difference=difference, leak=leak), ""


def _declares_dropout(model: nn.Module) -> bool:
    dropouts = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return any(
        (isinstance(m, dropouts) and m.p > 0) or (isinstance(m, TrainableAttention) and m.dropout > 0)
        for m in model.modules()
    )


@torch.no_grad()
def _modes(built: Standalone, tokens: torch.Tensor) -> dict[str, float]:
    """How far training mode is from evaluation mode, and each from itself under another seed."""

    def hidden(training: bool, seed: int) -> torch.Tensor:
        built.model.train(training)
        torch.manual_seed(seed)
        return built.hidden(tokens)

    runs = [hidden(False, 0), hidden(False, 1), hidden(True, 0), hidden(True, 1)]
    built.model.eval()
    return {
        "scale": float(runs[0].abs().max()),
        "eval_eval": float((runs[0] - runs[1]).abs().max()),
        "train_eval": float((runs[2] - runs[0]).abs().max()),
        "train_train": float((runs[2] - runs[3]).abs().max()),
    }


def _optimise(built: Standalone, batch: list[torch.Tensor]) -> tuple[float, ...]:
    """Losses of a few Adam steps on one batch, in evaluation mode so that only the weights move."""
    parameters = [p for p in built.model.parameters() if p.requires_grad]
    before = copy.deepcopy(built.model.state_dict())
    losses: list[float] = []
    if parameters:
        optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        for _ in range(STEPS):
            optimiser.zero_grad()
            loss = training_loss(built, batch)
            losses.append(float(loss.detach()))
            if not loss.requires_grad:
                break
            loss.backward()
            optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        losses.append(float(training_loss(built, batch)))
    built.model.load_state_dict(before)
    return tuple(losses)
