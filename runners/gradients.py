"""Train a model standalone, in float64, and measure what its gradients are worth."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genmodel.modeling.attention import TrainableAttention
from genmodel.runners import coding, derivatives, low_precision, training_modes, ways
from genmodel.runners.evidence import Gradients, Layout, Packing, ParameterGradient, TrainingMode
from genmodel.runners.standalone import Standalone
from genmodel.runners.workload import edge_tokens

LENGTHS = (41, 9)
"""Tokens of the two training sequences: one of them longer than a block of the KV cache and than many a window."""
SHORTER = (17, 9)
"""Tokens of the first one for models that take fewer positions."""
LONGEST = 521
"""Most tokens of a sequence that is made longer than a window."""
BATCHED = 1e-5
"""Relative difference between a row in a batch and alone, which models that compute parts in float32 stay below."""
STEPS = 6
LEARNING_RATE = 1e-3


def measure(built: Standalone, seed: int) -> Gradients:
    """All gradient evidence of a loaded float64 model at TP=1; its weights end as they began."""
    model = built.model
    generator = torch.Generator().manual_seed(seed)
    batch = training_batch(built, generator)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}

    model.eval()
    with _attention_inputs(model) as inputs:
        value, gradients = training_modes.gradients_of(lambda: training_loss(built, batch), trainable)

    def moved() -> torch.Tensor:
        with training_modes.elsewhere(trainable.values()):
            return training_loss(built, batch)

    reached = {name: _norms(captured) for name, captured in inputs.items()}
    unjudged = _unjudged(built, batch, trainable.values(), reached)

    future, past = _causality(built, batch[0])
    packing, reason = _packing(built, batch)
    modes = _modes(built, batch[0])
    deterministic = modes["undropped"] is not None
    directional = {
        name: _directional(moved, parameter, gradients[name], value, generator) for name, parameter in trainable.items()
    }
    rows = torch.stack([batch[0], _tokens(_taken(built, (1,))[1], len(batch[0]), generator)])
    trained = _training(built, batch, rows, trainable, generator)
    groups: dict[tuple[Layout, ...], Sequence[torch.Tensor]] = {
        ("alone", "packed") if ways.can_be_packed(model) else ("alone",): batch
    }
    if not trained["batch"].refused:
        groups["batch",] = rows.unbind()
    wide, narrow = ways.measure(model, trainable, groups, training=deterministic)
    return Gradients(
        loss=value,
        parameters=directional,
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
        lengths=tuple(map(len, batch)),
        unjudged_attention_inputs=unjudged,
        undropped_difference=modes["undropped"],
        modes=trained,
        low_precision=low_precision.measure(
            model, lambda: training_loss(built, batch[:1]), trainable, training=deterministic
        ),
        ways=wide,
        float32_ways=narrow,
    )


def training_batch(built: Standalone, generator: torch.Generator) -> list[torch.Tensor]:
    """Random token sequences [T] of the LENGTHS, or shorter; the same for the same seed, vocabulary and positions."""
    longest, vocab = _taken(built, (LENGTHS[0], *SHORTER))
    return [_tokens(vocab, length, generator) for length in (longest, *LENGTHS[1:])]


def _tokens(vocab: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random token ids [T].

    None of them has an embedding that is next to nothing (`checkpoint.SMALL_ROWS`): the loss is too steep there for
    differences.
    """
    tokens = torch.randint(vocab, (length,), generator=generator)
    edges = torch.tensor(edge_tokens(vocab), dtype=tokens.dtype)
    return torch.where(torch.isin(tokens, edges), vocab // 3, tokens)


@torch.no_grad()
def _taken(built: Standalone, lengths: Sequence[int]) -> tuple[int, int]:
    """The first of these lengths that the model takes, in tokens, and the size of its vocabulary."""
    for length in lengths[:-1]:
        with contextlib.suppress(Exception):  # of the last one, whatever is raised is the author's to see
            return length, built.logits(torch.zeros(length, dtype=torch.long)).shape[-1]
    return lengths[-1], built.logits(torch.zeros(lengths[-1], dtype=torch.long)).shape[-1]


def training_loss(
    built: Standalone, batch: Sequence[torch.Tensor], begin: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Mean next-token cross-entropy over the batch's sequences, in float32 at least.

    Each is run on its own, after a call of `begin`.
    """

    def one(tokens: torch.Tensor) -> torch.Tensor:
        begin()
        return _cross_entropy(built.logits(tokens[:-1]), tokens[1:])

    return torch.stack([one(tokens) for tokens in batch]).mean()


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


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
def _unjudged(
    built: Standalone,
    batch: list[torch.Tensor],
    trainable: Collection[nn.Parameter],
    reached: Mapping[str, tuple[float, float, float]],
) -> dict[str, str]:
    """Why none has to arrive where no gradient did: {"k of attn": reason}, of those for which there is a reason."""
    missing = [
        (module, name) for module, norms in reached.items() for name, norm in zip("qkv", norms, strict=True) if not norm
    ]
    if not missing:
        return {}
    generator = torch.Generator().manual_seed(0)

    def run() -> tuple[float, dict[str, list[torch.Tensor]]]:
        with _attention_inputs(built.model) as captured, training_modes.elsewhere(trainable):
            return float(training_loss(built, batch)), captured

    loss, before = run()
    originals = [coding.local(p).clone() for p in trainable]
    for parameter, original in zip(trainable, originals, strict=True):
        noise = torch.randn(original.shape, generator=generator, dtype=torch.float64)
        coding.local(parameter).add_(0.01 * _scale(original) * noise)
    _, after = run()
    for parameter, original in zip(trainable, originals, strict=True):
        coding.local(parameter).copy_(original)
    found = {}
    for module, name in missing:
        part = "qkv".index(name)
        if all(map(torch.equal, before[module][part::3], after[module][part::3])):
            found[f"{name} of {module}"] = "is a constant"
            continue
        with _shifted(built.model.get_submodule(module), name, generator), training_modes.elsewhere(trainable):
            moved = abs(float(training_loss(built, batch)) - loss)
        if moved <= training_modes.SAME * max(1.0, abs(loss)):
            found[f"{name} of {module}"] = "does not change the loss"
    return found


@contextlib.contextmanager
def _shifted(attention: nn.Module, name: str, generator: torch.Generator) -> Iterator[None]:
    """Add a random part of its own size to what an attention layer is given as q, k or v."""

    def moved(value: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return value + 0.01 * _scale(value) * noise

    def shift(
        _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if name in keywords:
            return arguments, keywords | {name: moved(keywords[name])}
        part = "qkv".index(name)
        return (*arguments[:part], moved(arguments[part]), *arguments[part + 1 :]), keywords

    handle = attention.register_forward_pre_hook(shift, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _scale(values: torch.Tensor) -> float:
    """Root mean square, and 1 for zeros."""
    return float(values.square().mean().sqrt()) or 1.0


@torch.no_grad()
def _directional(
    run: Callable[[], torch.Tensor],
    parameter: nn.Parameter,
    gradient: torch.Tensor | None,
    loss: float,
    generator: torch.Generator,
) -> ParameterGradient:
    """Analytic against numeric derivative along one direction."""
    values = coding.local(parameter)
    finite = gradient is None or bool(torch.isfinite(gradient).all())
    along = derivatives.direction(values.shape, (gradient,) if finite else (), generator)
    original = values.clone()

    def at(step: float) -> float:
        values.copy_(original + step * along)
        return float(run())

    numeric, noise = derivatives.by_differences(at, loss)
    values.copy_(original)
    return ParameterGradient(
        norm=None if gradient is None else float(gradient.norm()),
        finite=finite,
        analytic=float((gradient * along).sum()) if gradient is not None and finite else 0.0,
        numeric=numeric,
        noise=noise,
    )


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
    """(largest |d hidden[t] / d embedding[s]| over s > t, the same over s < t), at some t."""
    with _tapped_embedding() as taps:
        hidden = built.hidden(tokens)
    if not taps or not hidden.requires_grad:
        return None, None
    weights = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    future = past = 0.0
    for t in sorted({*range(5), *range(5, len(tokens), 9), len(tokens) - 1}):
        per_position = _reached((hidden[t] * weights).sum(), taps[0]).abs().amax(-1)
        future = max(future, float(per_position[t + 1 :].max()) if t + 1 < len(tokens) else 0.0)
        past = max(past, float(per_position[:t].max()) if t else 0.0)
    built.model.zero_grad(set_to_none=True)
    return future, past


def _reached(value: torch.Tensor, tap: torch.Tensor) -> torch.Tensor:
    """Gradient of a value by the tap, or zeros; by `backward`, for reentrant checkpointing refuses `autograd.grad`."""
    value.backward(retain_graph=True)
    found, tap.grad = tap.grad, None
    return torch.zeros_like(tap) if found is None else found


def _packing(built: Standalone, batch: list[torch.Tensor]) -> tuple[Packing | None, str]:
    """Two sequences laid end to end against each alone."""
    model: Any = built.model
    first, second = batch
    boundaries = torch.tensor([0, len(first), len(first) + len(second)], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])
    tokens = torch.cat([first, second])
    if not ways.can_be_packed(model):
        return (
            None,
            "the model cannot be told of packed sequences: no TrainableAttention, no forward(cu_seqlens=...)",
        )
    leak = 0.0
    # Backward too is inside: checkpointing computes activations there once more.
    with ways.packed(model, boundaries) as extra:
        with _tapped_embedding() as taps:
            packed = model(input_ids=tokens, positions=positions, **extra)
        if not taps or not packed.requires_grad:
            return None, "no embedding could be tapped, or its gradient is cut"
        cut = len(first)
        for mine, other in ((slice(0, cut), slice(cut, None)), (slice(cut, None), slice(0, cut))):
            leak = max(leak, float(_reached(packed[mine].square().sum(), taps[0])[other].abs().max()))
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        difference = max(
            float((packed[:cut] - built.hidden(first)).abs().max()),
            float((packed[cut:] - built.hidden(second)).abs().max()),
        )
    return Packing(difference=difference, leak=leak), ""


def _declares_dropout(model: nn.Module) -> bool:
    dropouts = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return any(
        (isinstance(m, dropouts) and m.p > 0) or (isinstance(m, TrainableAttention) and m.dropout > 0)
        for m in model.modules()
    )


@torch.no_grad()
def _modes(built: Standalone, tokens: torch.Tensor) -> dict[str, Any]:
    """How far training mode is from evaluation mode, and each from itself under other seeds, in states or logits."""
    model: Any = built.model

    def run(training: bool, seed: int) -> torch.Tensor:
        begin(training, seed)
        states = built.hidden(tokens)
        return torch.cat([states.flatten(), model.compute_logits(states).flatten()])

    def difference(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().max())

    with training_modes.passes(model) as begin:
        evaluated = run(False, 0)
        # Several, for what is skipped at random may be the same twice.
        trained = [run(True, seed) for seed in range(4)]
        begin(False, 0)
        scale = float(built.hidden(tokens).abs().max())
        with training_modes.NoDropout():
            undropped = run(True, 0)
            repeats = difference(undropped, run(True, 1)) <= training_modes.SAME * scale
        return {
            "scale": scale,
            "eval_eval": difference(evaluated, run(False, 1)),
            "train_eval": max(difference(one, evaluated) for one in trained),
            "train_train": max(difference(one, trained[0]) for one in trained),
            "undropped": difference(undropped, evaluated) if repeats else None,
        }


def _training(
    built: Standalone,
    batch: list[torch.Tensor],
    rows: torch.Tensor,
    trainable: Mapping[str, nn.Parameter],
    generator: torch.Generator,
) -> dict[str, TrainingMode]:
    """Derivatives in training mode, of sequences one by one and as [batch, tokens]."""
    sequences = [*batch, *_beyond_windows(built, batch, generator)]
    with training_modes.passes(built.model) as begin:

        def trained(loss: Callable[[], torch.Tensor], plain: list[torch.Tensor]) -> TrainingMode:
            begin(False, 0)
            _, guides = training_modes.gradients_of(lambda: training_loss(built, plain), trainable)
            return training_modes.measure(loss, trainable, guides, tuple(map(len, plain)), generator)

        def train() -> None:
            begin(True, 0)

        begin(False, 0)
        refusal = _refuses_batch(built, rows)
        return {
            "training": trained(lambda: training_loss(built, sequences, train), sequences),
            "batch": TrainingMode(reason=refusal, refused=True)
            if refusal
            else trained(lambda: _batch_loss(built, rows, train), list(rows)),
        }


def _beyond_windows(built: Standalone, batch: list[torch.Tensor], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """A sequence [T] longer than every window of the model that is not too long, unless the batch has one."""
    windows = [
        getattr(holder, "sliding_window", None)
        for holder in (*built.model.modules(), built.vllm_config.model_config.hf_config)
    ]
    wanted = [w + 9 for w in windows if isinstance(w, int) and len(batch[0]) <= w <= LONGEST - 9]
    if wanted:
        length, vocab = _taken(built, (max(wanted), len(batch[0])))
        yield _tokens(vocab, length, generator)


def _batched(built: Standalone, rows: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states of token ids [B, T], in one pass."""
    if positions is None:
        positions = torch.arange(rows.shape[1]).expand_as(rows)
    states: torch.Tensor = built.model(input_ids=rows, positions=positions.contiguous())
    return states


def _batch_loss(built: Standalone, rows: torch.Tensor, begin: Callable[[], None]) -> torch.Tensor:
    """`training_loss` of the rows [B, T] in one pass."""
    model: Any = built.model
    begin()
    logits = model.compute_logits(_batched(built, rows[:, :-1]).flatten(0, 1))
    return _cross_entropy(logits, rows[:, 1:].flatten())


@torch.no_grad()
def _refuses_batch(built: Standalone, rows: torch.Tensor) -> str:
    """Why the model does not take [B, T]; empty if it takes it, rightly or not.

    A model that does not take batches says so: it raises, or what it gives has not the shape of a batch, as where
    tokens are flattened and stay so. One that gives [B, T, hidden] claims a state for each token of each row, and a
    trainer that reads them has no other sign that rows saw each other. So does a model that was written for
    flattened tokens and whose layers happen to keep the shape: it is told from one that is right by what it
    computes, and has to raise. Models of vLLM's own layers, which are called with flattened tokens only, are not
    measured here at all. [tokens, batch], Megatron's order, is another input; it is known by giving the rows' states
    if they are laid out so.
    """
    alone = torch.stack([built.hidden(row) for row in rows])
    given = f"forward(input_ids={list(rows.shape)}, positions={list(rows.shape)})"
    try:
        together = _batched(built, rows)
    except Exception as error:  # noqa: BLE001 - vLLM passes flattened tokens only, and a model may take nothing else
        return f"{given} raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if together.shape != alone.shape:
        return f"{given} gives {list(together.shape)}: the model takes flattened tokens only"
    transposed = _tokens_first(built, rows)
    if transposed is not None and _close(transposed, alone) and not _close(together, alone):
        return f"{given} is taken for {list(rows.mT.shape)}: the model takes [tokens, batch]"
    return ""


def _tokens_first(built: Standalone, rows: torch.Tensor) -> torch.Tensor | None:
    """Hidden states [B, T, C] of a model that takes [T, B]; None if it does not."""
    positions = torch.arange(rows.shape[1])[:, None].expand_as(rows.mT)
    try:
        states = _batched(built, rows.mT.contiguous(), positions)
    except Exception:  # noqa: BLE001 - in whatever way it refuses
        return None
    return states.transpose(0, 1) if states.shape[:-1] == rows.mT.shape else None


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """But for the order of additions."""
    return float((one - other).abs().max()) <= BATCHED * float(other.abs().max())


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
    with training_modes.elsewhere(parameters):
        losses.append(float(training_loss(built, batch)))
    built.model.load_state_dict(before)
    return tuple(losses)
