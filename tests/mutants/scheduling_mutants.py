"""Mistakes that only some ways through a scheduler show, or only a change of weights; and variants of the model.

All but the last few are judged alone: on a whole sequence each of them is right.
"""

from __future__ import annotations

import multiprocessing
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from genmodel.modeling._vllm import engine_config
from genmodel.modeling.attention import TrainableAttention
from genmodel.modeling.layers import ParallelLMHead
from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense
from mutants.dense_mutants import mutant


def one_run(positions: Tensor) -> bool:
    """Whether a step computes consecutive positions of one sequence, more than one of them."""
    return len(positions) > 1 and bool((positions.diff() == 1).all())


def with_positions(model: Any, change: Any) -> None:
    """Let the engine's forward see `change(positions)`."""
    if engine_config() is None:
        return
    forward = model.forward

    def changed(input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = forward(input_ids, change(positions))
        return hidden

    model.forward = changed


@mutant(caught_by="scheduling.chunked_prefill", reports="#52909, #26042", alone=True, at="")
def later_chunks_start_at_zero(model: Any) -> None:
    """The first chunk of a prompt is exact; in later ones positions are counted anew."""
    with_positions(model, lambda p: p - p[0] if one_run(p) and int(p[0]) % 32 else p)


@mutant(caught_by="scheduling.prefix_cache", reports="#5543, #22103", alone=True, at="")
def cached_prefix_forgotten(model: Any) -> None:
    """What follows a prefix that came from the cache is taken for the start of a sequence."""
    with_positions(model, lambda p: p - p[0] if one_run(p) and int(p[0]) and int(p[0]) % 32 == 0 else p)


@mutant(caught_by="scheduling.preemption", reports="#16832, NeMo RL#2141", alone=True, at="")
def recomputed_tokens_count_twice(model: Any) -> None:
    """A token that is computed again, as after a preemption, moves the state it had moved before."""
    if engine_config() is None:
        return
    forward, seen = model.forward, set()

    def counting(input_ids: Tensor, positions: Tensor) -> Tensor:
        keys = list(zip(input_ids.tolist(), positions.tolist(), strict=True))
        again = positions.new_tensor([key in seen for key in keys], dtype=torch.float32).cumsum(0)
        seen.update(keys)
        hidden: Tensor = forward(input_ids, positions) + 0.01 * again[:, None]
        return hidden

    model.forward = counting


@mutant(caught_by="scheduling.arrival_order", reports="#43631", alone=True, at="")
def rows_of_a_batch_are_mixed(model: Any) -> None:
    """A step that decodes some requests and prefills others centres its rows on their mean."""
    if engine_config() is None:
        return
    forward = model.forward

    def mixed(input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = forward(input_ids, positions)
        joined = 0 in positions.tolist() and int(positions[0]) > 0
        return hidden - 0.01 * hidden.mean(0) if joined else hidden

    model.forward = mixed


@mutant(caught_by="logits.decode_top_k", reports="NeMo RL#2141", alone=True, at="layers.2.mlp")
def decode_differs_from_prefill(model: Any) -> None:
    """A branch for single rows, taken while decoding alone, forgets the residual of the last MLP."""
    if engine_config() is None:
        return
    forward = model.layers[-1].mlp.forward
    model.layers[-1].mlp.forward = lambda x: torch.zeros_like(x) if len(x) <= 16 else forward(x)


@mutant(caught_by="scheduling.max_model_len", reports="", alone=True)
def one_position_too_few(model: Any) -> None:
    """Generation ends one token before the longest sequence, for the model says so of itself."""
    config = engine_config()
    if config is not None:
        model.limit = config.model_config.max_model_len = config.model_config.max_model_len - 1


@mutant(caught_by="deployment.multiprocess", reports="#5657, #10238, #16228, #18740", alone=True)
def known_to_the_driver_only(model: Any) -> None:
    """What the driver changed at run time, spawned workers know nothing of: here, that there is an MLP."""
    if multiprocessing.parent_process() is not None:
        for layer in model.layers:
            layer.mlp.forward = torch.zeros_like


@mutant(caught_by="interface.signature", reports="#27583, #30469", alone=True)
def embedding_method_renamed(model: Any) -> None:
    """The method has neither the name vLLM calls nor the one it used to call."""
    model.embed_input_ids, model.embed_tokens_of = None, model.embed_input_ids


# Refit: right with the first weights -----------------------------------------------------------------------


@mutant(caught_by="refit.changed_weights", reports="prime-rl#1650", alone=True, at="lm_head")
def copy_of_the_head_lives_on(model: Any) -> None:
    """A copy made on first use is never made again."""
    head, kept = model.lm_head, {}
    forward = type(head).forward

    def cached(hidden: Tensor) -> Tensor:
        kept.setdefault("weight", head.weight.detach().clone())
        current = head.weight.data
        head.weight.data = kept["weight"]
        logits: Tensor = forward(head, hidden)
        head.weight.data = current
        return logits

    if engine_config() is not None:
        head.forward = cached


@mutant(caught_by="refit.identity", reports="prime-rl#1650", alone=True, at="norm")
def loading_adds(model: Any) -> None:
    """The second time, `load_weights` adds to what is there."""
    loaded: list[None] = []

    def load(weights: Any) -> set[str]:
        before = model.norm.weight.detach().clone()
        names = load_weights(model, weights)
        if loaded:
            model.norm.weight.data += before
        loaded.append(None)
        return names

    model.load_weights = load


@mutant(caught_by="refit.no_drift", reports="prime-rl#1650", alone=True, at="norm")
def every_load_folds_a_scale(model: Any) -> None:
    """From the third time on, a scale is folded into the norm once more."""
    loads: list[None] = []

    def load(weights: Any) -> set[str]:
        names = load_weights(model, weights)
        loads.append(None)
        model.norm.weight.data *= 1.001 ** max(0, len(loads) - 3)
        return names

    model.load_weights = load


@mutant(caught_by="refit.changed_weights", reports="prime-rl#1650", alone=True, at="")
def rotary_table_lives_on(model: Any) -> None:
    """Rotary frequencies are learned, and the table of angles that is made of them on first use is never made again."""
    half = model.config.head_dim // 2
    model.frequencies = nn.Parameter(torch.ones(half))
    tables: dict[str, Tensor] = {}

    def forward(input_ids: Tensor, positions: Tensor) -> Tensor:
        angles = tables.setdefault("angles", torch.arange(256)[:, None] * model.frequencies.detach())
        x = model.embed_tokens(input_ids)
        table = angles[positions].unsqueeze(-2).to(x.dtype)
        for layer in model.layers:
            x = layer(x, table.cos(), table.sin())
        hidden: Tensor = model.norm(x)
        return hidden

    model.forward = forward


@mutant(caught_by="refit.changed_weights", reports="prime-rl#1650", alone=True, at="layers.0.attn")
def norm_folded_on_the_first_load_only(model: Any) -> None:
    """A norm's weight is folded into the projection after it when the model is loaded, and not when it is reloaded."""
    folded: dict[int, Tensor] = {}

    def load(weights: Any) -> set[str]:
        names = load_weights(model, weights)
        for index, layer in enumerate(model.layers):
            folded.setdefault(index, layer.attn_norm.weight.detach().clone())
        return names

    for index, layer in enumerate(model.layers):

        def normalised(x: Tensor, norm: Any = layer.attn_norm, index: int = index) -> Tensor:
            weight = folded.get(index, norm.weight)
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight

        layer.attn_norm.forward = normalised
    model.load_weights = load


@mutant(caught_by="refit.changed_weights", reports="prime-rl#1650", alone=True)
def prefix_cache_outlives_the_weights(model: Any) -> None:
    """New weights, and the keys and values of the old ones are still in the prefix cache."""
    from vllm.v1.core.block_pool import BlockPool

    loads: list[None] = []

    def load(weights: Any) -> set[str]:
        names = load_weights(model, weights)
        if loads and engine_config() is None:  # a refit: the engine is built
            reset = BlockPool.reset_prefix_cache

            def skipped(self: Any) -> bool:  # noqa: ARG001 - once, and for this engine only
                BlockPool.reset_prefix_cache = reset  # type: ignore[method-assign]
                return True

            BlockPool.reset_prefix_cache = skipped  # type: ignore[method-assign]
        loads.append(None)
        return names

    model.load_weights = load


# Variants: the correct model of each is the reference ------------------------------------------------------


def with_head_bias(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense with a bias on the head."""
    model = dense.factory(vllm_config, parallel_context)
    size, vocab = model.config.hidden_size, model.config.vocab_size
    model.lm_head = ParallelLMHead(vocab, size, bias=True, parallel_context=parallel_context)
    return model


def with_partial_rotary(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense that rotates the first half of each head only."""
    model: Any = dense.factory(vllm_config, parallel_context)

    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def half(y: Tensor) -> Tensor:
            y_THD = y.unflatten(-1, (-1, self.head_dim))
            turned, still = y_THD.chunk(2, -1)
            quarter = turned.shape[-1] // 2
            return torch.cat([dense.rotate(turned, cos[..., :quarter], sin[..., :quarter]), still], -1).flatten(-2)

        q, k, v = self.qkv(x)
        out: Tensor = self.o_proj(self.attn(half(q), half(k), v))
        return out

    for layer in model.layers:
        layer.attn.forward = MethodType(forward, layer.attn)
    return model  # type: ignore[no-any-return]


def with_head_norm(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense that normalises each query head by itself."""
    return _normalised(dense.factory(vllm_config, parallel_context), across=False)


def _normalised(model: Any, *, across: bool) -> nn.Module:
    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q_THD = q.unflatten(-1, (-1, self.head_dim))
        size = q_THD.square().mean((-1, -2) if across else -1, keepdim=True)
        q = dense.rotate(q_THD * torch.rsqrt(size + 1e-6), cos, sin).flatten(-2)
        k = dense.rotate(k.unflatten(-1, (-1, self.head_dim)), cos, sin).flatten(-2)
        out: Tensor = self.o_proj(self.attn(q, k, v))
        return out

    for layer in model.layers:
        layer.attn.forward = MethodType(forward, layer.attn)
    return model  # type: ignore[no-any-return]


def with_window(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """Dense whose layers see 16 tokens."""
    return _windowed(dense.factory(vllm_config, parallel_context), 16)


def _windowed(model: Any, window: int) -> nn.Module:
    for layer in model.layers:
        old = layer.attn.attn
        layer.attn.attn = TrainableAttention(
            old.num_heads, old.head_dim, old.num_kv_heads, sliding_window=window, prefix=f"{old.prefix}.windowed"
        )
    return model  # type: ignore[no-any-return]


@mutant(caught_by="logits.values", reports="#46835", reference="with_head_bias", at="lm_head")
def head_bias_dropped(model: Any) -> None:
    """`load_weights` knows no bias of the head, and says nothing."""

    def load(weights: Any) -> set[str]:
        return load_weights(model, ((name, tensor) for name, tensor in weights if name != "lm_head.bias"))

    model.load_weights = load


@mutant(caught_by="logits.prefill_top_k", reports="#51049", reference="with_partial_rotary", at="layers.0.attn")
def partial_rotary_ignored(model: Any) -> None:
    """All of each head is rotated."""


@mutant(caught_by="logits.tensor_parallel", reports="#16311, #35932", tp=(1, 2), alone=True, at="layers.0.attn")
def query_norm_across_heads(model: Any) -> None:
    """Queries are normalised over all heads of the rank, whose number changes with the ranks."""
    _normalised(model, across=True)


@mutant(caught_by="logits.values", reports="#16311, #35932", reference="with_head_norm", at="layers.0.attn")
def query_norm_missing(model: Any) -> None:
    """Queries are not normalised."""


@mutant(caught_by="logits.values", reports="#21863, #49795", reference="with_window", at="layers.0.attn.attn")
def window_off_by_one(model: Any) -> None:
    """Each layer sees one token more than it should."""
    _windowed(model, 17)
