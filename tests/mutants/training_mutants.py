"""Models whose forward is right and that train wrongly: in one mode, at one length, in one dtype, or by chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genmodel.modeling.attention import TrainableAttention, _ambient_packing
from genmodel.reference_models import gpt, hybrid, moe
from mutants.dense_mutants import mutant

BLOCK = 32
"""Tokens of a block of vLLM's KV cache on CPU."""


def detached(model: Any, when: Callable[[Tensor], bool]) -> None:
    """Cut the last layer's MLP, one of two paths to the loss, from the graph for some inputs."""
    mlp = model.layers[-1].mlp
    forward = mlp.forward

    def cut(x: Tensor) -> Tensor:
        out: Tensor = forward(x)
        return out.detach() if when(x) else out

    mlp.forward = cut


def rewired(model: Any, around: Callable[[Any, Callable[..., Tensor], tuple[Tensor, ...]], Tensor]) -> None:
    """Call every attention layer through a function of (the layer, what it did, q k v)."""
    for module in model.modules():
        if isinstance(module, TrainableAttention):

            def forward(*qkv: Tensor, m: Any = module, attend: Any = module.forward) -> Tensor:
                return around(m, attend, qkv)

            module.forward = forward  # type: ignore[method-assign]


def in_training(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change what the last norm gives in training mode."""
    forward = model.norm.forward
    model.norm.forward = lambda x: change(forward(x)) if model.training else forward(x)


def reshaped(model: Any, when: Callable[[Tensor], bool]) -> None:
    """Take a batch for one sequence, for some positions."""
    forward = model.forward

    def joined(
        input_ids: Tensor | None, positions: Tensor, rest: Any = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        if not when(positions):
            out: Tensor = forward(input_ids, positions, rest, inputs_embeds)
            return out
        tokens = None if input_ids is None else input_ids.flatten()
        embedded = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)
        out = forward(tokens, positions.flatten(), rest, embedded)
        return out.unflatten(0, positions.shape)

    model.forward = joined


def counted(model: Any, when: Callable[[Tensor | None], bool]) -> None:
    """Count tokens instead of using the positions that are passed, for some embeddings."""
    forward = model.forward

    def run(
        input_ids: Tensor | None, positions: Tensor, rest: Any = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        if when(inputs_embeds):
            positions = torch.arange(positions.shape[-1]).expand_as(positions)
        out: Tensor = forward(input_ids, positions, rest, inputs_embeds)
        return out

    model.forward = run


def autocast(model: Any, when: Callable[[Tensor], bool]) -> None:
    """Compute the last layer's MLP in bfloat16, for some inputs; float64 autocast leaves as it is."""
    mlp = model.layers[-1].mlp
    forward = mlp.forward

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=when(x)):
            out: Tensor = forward(x)
        return out.to(x.dtype)

    mlp.forward = run


# Training mode -------------------------------------------------------------------------------------------


@mutant(caught_by="gradients.training_mode", reports="", alone=True)
def detached_in_training(model: Any) -> None:
    """Where activation checkpointing lives: `if self.training`."""
    detached(model, lambda x: model.training)


@mutant(caught_by="gradients.training_mode", reports="", alone=True)
def no_grad_in_training(model: Any) -> None:
    """Attention runs in an inference kernel as soon as the model trains."""

    def around(_: Any, attend: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not model.training):
            return attend(*qkv)

    rewired(model, around)


@mutant(caught_by="gradients.training_mode", reports="", alone=True)
def recomputed_with_another_mask(model: Any) -> None:
    """Activation checkpointing that does not keep the random state: backward is that of another dropout mask."""
    model.dropout = nn.Dropout(0.3)
    for layer in model.layers:
        mlp = layer.mlp

        def forward(x: Tensor, mlp: Any = mlp, inner: Any = mlp.forward) -> Tensor:
            def run(x: Tensor) -> Tensor:
                out: Tensor = model.dropout(inner(x))
                return out

            if not mlp.training:
                return run(x)
            out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
            return out

        mlp.forward = forward


@mutant(caught_by="gradients.training_mode", reports="", of=moe, alone=True)
def router_without_gradient_in_training(model: Any) -> None:
    """The weights of the experts are constants in training: one small parameter of many gets nothing."""
    router = model.layers[0].mlp.router
    forward = router.forward
    router.forward = lambda x: forward(x).detach() if model.training else forward(x)


@mutant(caught_by="gradients.training_mode", reports="", alone=True)
def gradients_scaled_by_a_hook(model: Any) -> None:
    """A hook meant for several ranks halves the gradient."""

    def halved(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient / 2)
        return x

    in_training(model, halved)


@mutant(caught_by="gradients.training_mode", reports="", alone=True)
def another_loss_without_recording(model: Any) -> None:
    """Under no_grad the model takes a faster path, which computes something else."""
    in_training(model, lambda x: x if torch.is_grad_enabled() else x * 1.001)


@mutant(caught_by="gradients.numeric", reports="", alone=True)
def detached_where_a_gradient_is_wanted(model: Any) -> None:
    """A path for inputs that require a gradient."""
    detached(model, lambda x: x.requires_grad)


@mutant(caught_by="gradients.numeric", reports="", of=gpt, alone=True)
def one_bias_scaled_by_a_hook(model: Any) -> None:
    """One small parameter's gradient is doubled."""
    model.layers[0].mlp.up.bias.register_hook(lambda gradient: 2 * gradient)


# Length and shape ----------------------------------------------------------------------------------------


@mutant(caught_by="gradients.numeric", reports="", alone=True)
def keys_beyond_a_block_detached(model: Any) -> None:
    """The first block of keys trains, the others do not."""

    def around(_: Any, attend: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> Tensor:
        q, k, v = qkv
        return attend(q, torch.cat([k[..., :BLOCK, :], k[..., BLOCK:, :].detach()], -2), v)

    rewired(model, around)


@mutant(caught_by="gradients.training_mode", reports="", of=hybrid, alone=True)
def detached_beyond_a_wide_window(model: Any) -> None:
    """Values older than a window of 60 tokens, which sequences of a few dozen tokens never leave, do not train."""
    for layer in model.layers:
        layer.attn.attn.sliding_window = 60

    def around(_: Any, attend: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> Tensor:
        q, k, v = qkv
        old = max(v.shape[-2] - 60, 0)
        return attend(q, k, torch.cat([v[..., :old, :].detach(), v[..., old:, :]], -2))

    rewired(model, around)


@mutant(caught_by="gradients.batch", reports="", alone=True)
def detached_for_a_batch(model: Any) -> None:
    """The path for [batch, tokens] has no backward."""
    detached(model, lambda x: x.dim() == 3)


@mutant(caught_by="gradients.batch", reports="", alone=True)
def first_row_of_a_batch_trains(model: Any) -> None:
    """Only the first row of a batch gets a gradient, in training mode."""
    in_training(model, lambda x: x if x.dim() == 2 else torch.cat([x[:1], x[1:].detach()]))


@mutant(caught_by="gradients.batch", reports="", alone=True)
def rows_of_a_batch_joined(model: Any) -> None:
    """Code for flattened tokens that gives the shape back: rows see each other, and positions are right."""
    reshaped(model, lambda positions: positions.dim() == 2)


@mutant(caught_by="gradients.batch", reports="", alone=True)
def rows_of_a_batch_joined_in_training(model: Any) -> None:
    """Rows are joined to save padding, as soon as the model trains."""
    reshaped(model, lambda positions: positions.dim() == 2 and model.training)


@mutant(caught_by="gradients.batch", reports="", alone=True)
def rows_of_a_batch_joined_while_recording(model: Any) -> None:
    """The same where autograd records, in either mode."""
    reshaped(model, lambda positions: positions.dim() == 2 and torch.is_grad_enabled())


@mutant(caught_by="gradients.batch", reports="", alone=True)
def rows_of_embeddings_joined(model: Any) -> None:
    """A batch of tokens is right, a batch of embeddings one sequence."""
    forward = model.forward

    def joined(input_ids: Tensor, positions: Tensor, rest: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        if inputs_embeds is None or positions.dim() == 1:
            out: Tensor = forward(input_ids, positions, rest, inputs_embeds)
            return out
        out = forward(None, positions.flatten(), rest, inputs_embeds.flatten(0, 1))
        return out.unflatten(0, positions.shape)

    model.forward = joined


@mutant(caught_by="gradients.packed_sequences", reports="", of=gpt, alone=True)
def positions_run_on_in_training(model: Any) -> None:
    """In training mode tokens are counted, whatever positions are passed: wrong in the second of two sequences."""
    counted(model, lambda embedded: bool(model.training))


@mutant(caught_by="gradients.packed_sequences", reports="", of=gpt, alone=True)
def positions_run_on_while_recording(model: Any) -> None:
    """The same where autograd records."""
    counted(model, lambda embedded: torch.is_grad_enabled())


@mutant(caught_by="gradients.packed_sequences", reports="", of=gpt, alone=True)
def positions_run_on_of_embeddings(model: Any) -> None:
    """The same for embeddings, in training."""
    counted(model, lambda embedded: model.training and embedded is not None)


@mutant(caught_by="gradients.packed_sequences", reports="", of=gpt, alone=True)
def positions_run_on_of_embeddings_with_a_gradient(model: Any) -> None:
    """The same for embeddings that require a gradient."""
    counted(model, lambda embedded: embedded is not None and embedded.requires_grad)


@mutant(caught_by="gradients.packed_sequences", reports="", of=gpt, alone=True)
def positions_run_on_beside_dropout(model: Any) -> None:
    """Dropout that is declared does not hide it."""
    model.dropout = nn.Dropout(0.1)
    in_training(model, model.dropout)
    counted(model, lambda embedded: bool(model.training))


@mutant(caught_by="gradients.packed_sequences", reports="", alone=True)
def packed_sequences_detached(model: Any) -> None:
    """The kernel for packed sequences has no backward for values."""

    def around(_: Any, attend: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> Tensor:
        q, k, v = qkv
        return attend(q, k, v.detach() if _ambient_packing.get() is not None else v)

    rewired(model, around)


@mutant(caught_by="gradients.training_mode", reports="", alone=True)
def detached_of_embeddings(model: Any) -> None:
    """Where embeddings are given they get no gradient."""
    forward = model.forward

    def cut(input_ids: Tensor, positions: Tensor, rest: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        given = None if inputs_embeds is None else inputs_embeds.detach()
        out: Tensor = forward(input_ids, positions, rest, given)
        return out

    model.forward = cut


@mutant(caught_by="gradients.train_eval", reports="", alone=True)
def embeddings_with_a_gradient_scaled(model: Any) -> None:
    """Embeddings that require a gradient are taken for a soft prompt and scaled; tokens never are."""
    forward = model.forward

    def scaled(input_ids: Tensor, positions: Tensor, rest: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        if inputs_embeds is not None and inputs_embeds.requires_grad:
            inputs_embeds = inputs_embeds * 1.01
        out: Tensor = forward(input_ids, positions, rest, inputs_embeds)
        return out

    model.forward = scaled


# Precision -----------------------------------------------------------------------------------------------


@mutant(caught_by="gradients.bfloat16", reports="", alone=True)
def detached_in_bfloat16(model: Any) -> None:
    """A kernel for bfloat16 has no backward."""
    detached(model, lambda x: x.dtype == torch.bfloat16)


@mutant(caught_by="gradients.bfloat16", reports="", alone=True)
def keys_detached_in_bfloat16(model: Any) -> None:
    """In bfloat16 the last layer's keys do not train; all else does."""
    attention = model.layers[-1].attn.attn
    forward = attention.forward
    attention.forward = lambda q, k, v: forward(q, k.detach() if k.dtype == torch.bfloat16 else k, v)


@mutant(caught_by="gradients.autocast", reports="", alone=True)
def detached_under_autocast(model: Any) -> None:
    """A path for autocast leaves the graph."""
    detached(model, lambda x: torch.is_autocast_enabled("cpu"))


@mutant(caught_by="gradients.autocast", reports="", of=gpt, alone=True)
def bias_dropped_from_backward_under_autocast(model: Any) -> None:
    """A fused linear layer for autocast forgets the gradient of its bias, in training mode."""
    up = model.layers[1].mlp.up
    forward = up.forward

    def fused(x: Tensor) -> Tensor:
        if not (torch.is_autocast_enabled("cpu") and model.training):
            out: Tensor = forward(x)
            return out
        return F.linear(x, up.weight, up.bias.detach())

    up.forward = fused


@mutant(caught_by="gradients.float32", reports="", alone=True)
def autocast_in_training(model: Any) -> None:
    """One MLP of two is computed in bfloat16 in training only: the engine computes it in float32."""
    autocast(model, lambda x: bool(model.training))


@mutant(caught_by="gradients.float32", reports="", alone=True)
def autocast_while_recording(model: Any) -> None:
    """The same where autograd records."""
    autocast(model, lambda x: torch.is_grad_enabled())


@mutant(caught_by="gradients.float32", reports="", alone=True)
def autocast_where_a_gradient_is_wanted(model: Any) -> None:
    """The same for inputs that require a gradient."""
    autocast(model, lambda x: x.requires_grad)


@mutant(caught_by="gradients.float32", reports="", alone=True)
def autocast_of_embeddings_in_training(model: Any) -> None:
    """The same for embeddings only."""
    forward = model.forward

    def run(input_ids: Tensor, positions: Tensor, rest: Any = None, inputs_embeds: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=model.training and inputs_embeds is not None):
            out: Tensor = forward(input_ids, positions, rest, inputs_embeds)
        return out

    model.forward = run


@mutant(caught_by="gradients.float32", reports="", alone=True)
def autocast_beside_dropout(model: Any) -> None:
    """Dropout that is declared does not hide it."""
    model.dropout = nn.Dropout(0.1)
    in_training(model, model.dropout)
    autocast(model, lambda x: bool(model.training))


@mutant(caught_by="gradients.float32", reports="", alone=True)
def backward_in_bfloat16(model: Any) -> None:
    """The forward is exact, and gradients of float32 are rounded to bfloat16 on their way, to save memory."""
    mlp = model.layers[-1].mlp
    forward = mlp.forward

    def rounded(x: Tensor) -> Tensor:
        out: Tensor = forward(x)
        if out.requires_grad and out.dtype == torch.float32:
            out.register_hook(lambda gradient: gradient.bfloat16().float())
        return out

    mlp.forward = rounded


# Chance in evaluation ------------------------------------------------------------------------------------


@mutant(caught_by=("gradients.train_eval", "interface.repeatable"), reports="#43631", alone=True)
def dropout_without_training(model: Any) -> None:
    """`F.dropout(x, p)`, whose default is to drop: in evaluation mode and in every engine too."""
    forward = model.norm.forward
    model.norm.forward = lambda x: F.dropout(forward(x), 0.1)


@mutant(caught_by="gradients.train_eval", reports="", alone=True)
def dropout_in_the_head(model: Any) -> None:
    """Hidden states are right, and logits are random."""
    compute = model.compute_logits
    model.compute_logits = lambda hidden: compute(F.dropout(hidden, 0.01))


@mutant(caught_by="gradients.train_eval", reports="", alone=True)
def layers_skipped_in_evaluation(model: Any) -> None:
    """Stochastic depth that draws from Python's generator and never looks at the mode."""
    for layer in model.layers:
        layer.forward = lambda x, *rest, inner=layer.forward: x if random.random() < 0.2 else inner(x, *rest)


@mutant(caught_by="gradients.train_eval", reports="", alone=True)
def dropout_and_another_scale_in_training(model: Any) -> None:
    """Declared dropout hides that training computes something else besides."""
    model.dropout = nn.Dropout(0.1)
    in_training(model, lambda x: model.dropout(x) * 1.01)
