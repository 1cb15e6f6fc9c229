"""Mistakes in how weights are loaded and shared, and in what backward does about ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import Tensor, nn

from correct_models import buffers, placed_experts
from genmodel.modeling.attention import TrainableAttention
from genmodel.modeling.collectives import copy_to_group, gather_from_group, reduce_from_group
from genmodel.modeling.layers import ColumnParallelLinear
from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense, gpt
from genmodel.runners.checkpoint import TINY_CONFIG
from mutants.dense_mutants import MUTANTS, Mutant, _context, mutant

TIED = TINY_CONFIG | {"tie_word_embeddings": True}
ONE_KV_HEAD = TINY_CONFIG | {"num_key_value_heads": 1}
LARGE = TINY_CONFIG | {"vocab_size": 36011}
"""Nearly ten million elements, more than float32 can tell apart."""
BOTH = (1, 2)
WILD = 1e30
"""No weight is as large."""


# Loading ---------------------------------------------------------------------------------------------------


@mutant(caught_by="weights.every_element", reports="vllm-gguf-plugin#103", tp=BOTH, alone=True, at="lm_head")
def head_s_shard_0_on_every_rank(model: Any) -> None:
    """Every rank loads the first rows of the head."""

    def load(parameter: Tensor, full: Tensor) -> None:
        parameter.data.copy_(full[: len(parameter)])

    model.lm_head.weight.weight_loader = load


@mutant(
    caught_by="weights.local_order",
    reports="",
    tp=BOTH,
    alone=True,
    at="lm_head",
    config="mutants.weight_mutants:LARGE",
)
def two_rows_swapped_in_a_large_head(model: Any) -> None:
    """The last two rows of the last rank, in a checkpoint of more elements than float32 can tell apart."""
    loader = model.lm_head.weight.weight_loader
    last = _context(model).get_tensor_parallel_rank() == 1

    def load(parameter: Tensor, full: Tensor) -> None:
        loader(parameter, torch.cat([full[:-2], full[[-1, -2]]]) if last else full)

    model.lm_head.weight.weight_loader = load


@mutant(caught_by="weights.all_loaded", reports="#10327", alone=True, at="norm")
def norm_never_loaded(model: Any) -> None:
    """`load_weights` looks for an older name of the last norm."""
    _load_leniently(model, skip=lambda name: name == "norm.weight")


@mutant(caught_by="weights.replicated", reports="Megatron-LM#1446", tp=BOTH, alone=True, at="norm")
def norm_loaded_on_rank_0_only(model: Any) -> None:
    """The others keep what the constructor made."""
    rank = _context(model).get_tensor_parallel_rank()
    _load_leniently(model, skip=lambda name: name == "norm.weight" and rank > 0)


@mutant(caught_by="weights.unknown_refused", reports="#10327", alone=True)
def unknown_names_skipped(model: Any) -> None:
    """`if name not in params: continue`."""
    _load_leniently(model)


@mutant(caught_by="weights.missing_refused", reports="#10327", alone=True)
def nothing_missed(model: Any) -> None:
    """Unknown names are refused, but nobody counts what was loaded, and vLLM's guard is told nothing."""
    parameters = dict(model.named_parameters())

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            _load_one(parameters[name], tensor)

    model.load_weights = load


def apart(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
    """The reference whose checkpoint has gate and up as tensors of their own."""
    model = dense.factory(vllm_config, parallel_context)
    for layer in model.layers:
        mlp: Any = layer.mlp
        inner, size = mlp.gate_up.out_features[0], mlp.gate_up.in_features
        mlp.gate = ColumnParallelLinear(size, inner, parallel_context=parallel_context)
        mlp.up = ColumnParallelLinear(size, inner, parallel_context=parallel_context)
        del mlp.gate_up
        mlp.forward = lambda x, mlp=mlp: mlp.down(F.silu(mlp.gate(x)) * mlp.up(x))
    return model


@mutant(caught_by="weights.local_order", reports="#3775", tp=BOTH, reference="apart", at="layers.0.mlp.gate_up")
def gate_and_up_joined_then_cut(model: Any) -> None:
    """gate and up are put together first and then cut in two, so that one rank has gate and the other up."""
    rank = _context(model).get_tensor_parallel_rank()

    def joined(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        gates: dict[str, Tensor] = {}
        for name, tensor in weights:
            if ".gate." in name:
                gates[name] = tensor
            elif ".up." in name:
                gate = gates[name.replace(".up.", ".gate.")]
                yield name.replace(".up.", ".gate_up."), torch.cat([gate, tensor])
            else:
                yield name, tensor

    def cut(parameter: Tensor, full: Tensor) -> None:
        parameter.data.copy_(full.narrow(0, rank * len(parameter), len(parameter)))

    for layer in model.layers:
        layer.mlp.gate_up.weight.weight_loader = cut
    model.load_weights = lambda weights: load_weights(model, joined(weights))


@mutant(caught_by="weights.tied", reports="#5621", config="mutants.weight_mutants:TIED", at="lm_head")
def tied_head_not_tied(model: Any) -> None:
    """The config says tied, so the checkpoint has no head; the model's own stays as it was made."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    _load_leniently(model)


@mutant(caught_by="weights.tied", reports="#53019", at="lm_head")
def head_tied_against_the_config(model: Any) -> None:
    """The checkpoint has a head of its own, and it is skipped."""
    model.lm_head.tie_weights(model.embed_tokens)
    _load_leniently(model, skip=lambda name: name.startswith("lm_head"))


@mutant(caught_by="weights.all_loaded", reports="", of=buffers, alone=True)
def buffers_looked_for_among_parameters(model: Any) -> None:
    """`dict(model.named_parameters())` has no buffers: what training made of them is skipped."""
    _load_leniently(model, skip=lambda name: name == "tokens")


@mutant(caught_by="weights.every_element", reports="", of=buffers, alone=True)
def table_of_integers_not_loaded(model: Any) -> None:
    """It happens to be what the constructor makes of it."""
    model.load_weights = lambda weights: load_weights(model, (pair for pair in weights if pair[0] != "tokens"))


@mutant(caught_by="weights.any_order", reports="", reference="apart")
def gate_and_up_placed_as_they_arrive(model: Any) -> None:
    """The checkpoint's file has gate before up, and so the first of the two is taken for gate."""
    parameters: dict[str, Any] = dict(model.named_parameters())

    def load(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        arrived: Counter[str] = Counter()
        for name, tensor in weights:
            own = name.replace(".gate.", ".gate_up.").replace(".up.", ".gate_up.")
            if own == name:
                _load_one(parameters[name], tensor)
            else:
                parameters[own].weight_loader(parameters[own], tensor, arrived[own])
            arrived[own] += 1
        return set(arrived)

    model.load_weights = load


@mutant(caught_by="weights.any_order", reports="", reference="apart")
def one_gate_kept_until_an_up_comes(model: Any) -> None:
    """Whose it is nobody asks: the layers of one file follow each other, and those of several files need not."""

    def joined(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        gate: Any = None
        for name, tensor in weights:
            if ".gate." in name:
                gate = tensor
            elif ".up." in name:
                yield name.replace(".up.", ".gate_up."), torch.cat([gate, tensor])
            else:
                yield name, tensor

    model.load_weights = lambda weights: load_weights(model, joined(weights))


@mutant(caught_by="weights.wrong_shape_refused", reports="", tp=BOTH, alone=True)
def columns_cut_to_fit(model: Any) -> None:
    """`narrow` takes the columns that it wants from whatever is long enough."""
    rank = _context(model).get_tensor_parallel_rank()
    for layer in model.layers:

        def load(parameter: Tensor, full: Tensor) -> None:
            columns = parameter.shape[1]
            parameter.data.copy_(full.narrow(1, rank * columns, columns))

        layer.mlp.down.weight.weight_loader = load


@mutant(caught_by="weights.conversion_refused", reports="", alone=True)
def norm_repeated_to_fit(model: Any) -> None:
    """`copy_` repeats a norm of one element."""
    model.norm.weight.weight_loader = lambda parameter, full: parameter.data.copy_(full)


@mutant(caught_by="weights.wrong_shape_refused", reports="", alone=True)
def matrix_read_in_another_order(model: Any) -> None:
    """`view` takes a transposed matrix for the right one."""
    for layer in model.layers:
        layer.mlp.down.weight.weight_loader = lambda parameter, full: parameter.data.copy_(full.view(parameter.shape))


@mutant(caught_by="weights.conversion_refused", reports="", alone=True)
def integers_taken_for_weights(model: Any) -> None:
    """What a quantised checkpoint holds is converted and its scales are nowhere."""
    weight = model.norm.weight

    def load(parameter: Tensor, full: Tensor) -> None:
        if full.shape != parameter.shape:
            raise ValueError("another shape")
        parameter.data.copy_(full)

    weight.weight_loader = load


@mutant(caught_by="logits.values", reports="", at="layers.0.attn.o_proj")
def square_matrix_transposed(model: Any) -> None:
    """Its shape fits, so that no loader can know; what it computes shows."""

    def turned(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, tensor.T if name.endswith("attn.o_proj.weight") else tensor

    model.load_weights = lambda weights: load_weights(model, turned(weights))


@mutant(caught_by="logits.tensor_parallel", reports="", tp=BOTH, of=placed_experts, alone=True)
def experts_placed_where_forward_does_not_know(model: Any) -> None:
    """Experts are dealt to the ranks by a placement, and the router's weights are taken in the plain order."""
    context = _context(model)
    for layer in model.layers:
        share = len(layer.mlp.experts.mine)
        start = context.get_tensor_parallel_rank() * share
        layer.mlp.experts.mine = list(range(start, start + share))


@mutant(caught_by="weights.arguments_kept", reports="Megatron-Bridge#1637", alone=True)
def values_tested_in_place(model: Any) -> None:
    """Once all are loaded, what lies out of range is looked for by `abs_`: the trainer's weights lose their signs."""
    parameters = dict(model.named_parameters())

    def load(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: dict[str, Tensor] = {}
        for name, tensor in weights:
            _load_one(parameters[name], tensor)
            loaded[name] = tensor
        wild = [name for name, tensor in loaded.items() if tensor.abs_().max() > WILD]
        if wild:
            raise ValueError(f"larger than {WILD}: {wild}")
        return set(loaded)

    model.load_weights = load


@mutant(caught_by="weights.arguments_kept", reports="Megatron-Bridge#1637", tp=BOTH, alone=True)
def matrix_turned_in_place_on_one_rank(model: Any) -> None:
    """`t_` turns the caller's tensor; only a rank that has to cut columns does it."""
    if _context(model).get_tensor_parallel_rank() == 0:
        return
    for layer in model.layers:
        loader = layer.mlp.down.weight.weight_loader

        def load(parameter: Tensor, full: Tensor, loader: Any = loader) -> None:
            loader(parameter, full.t_().T)

        layer.mlp.down.weight.weight_loader = load


# Sharing ---------------------------------------------------------------------------------------------------


@mutant(caught_by="parallelism.local_heads", reports="#39707", tp=BOTH, alone=True)
def global_heads_for_attention(model: Any) -> None:
    """Attention is told of all heads, and gets the rank's."""
    size = _context(model).get_tensor_parallel_world_size()
    for layer in model.layers:
        attn = layer.attn.attn
        layer.attn.attn = TrainableAttention(
            attn.num_heads * size, attn.head_dim, attn.num_kv_heads * size, prefix=f"{attn.prefix}.all"
        )


@mutant(
    caught_by="parallelism.kv_replication",
    reports="transformers#48307",
    tp=BOTH,
    alone=True,
    config="mutants.weight_mutants:ONE_KV_HEAD",
    at="layers.0.attn.qkv",
)
def slice_beyond_the_last_kv_head(model: Any) -> None:
    """k and v start at rank * kv_size although both ranks share one kv head."""
    rank = _context(model).get_tensor_parallel_rank()
    for layer in model.layers:
        qkv = layer.attn.qkv
        q, *kv = qkv.partitions["weight"].segments
        moved = [replace(segment, start=rank * segment.length) for segment in kv]
        qkv.partitions["weight"] = replace(qkv.partitions["weight"], segments=(q, *moved))
        qkv._attach()


@mutant(caught_by="parallelism.vocabulary", reports="#20843, SpecForge#284", tp=BOTH, alone=True)
def vocabulary_padded_with_its_first_rows(model: Any) -> None:
    """Rows wrap around at the end, so that a padding row scores as token 0 does."""
    rank = _context(model).get_tensor_parallel_rank()

    def load(parameter: Tensor, full: Tensor) -> None:
        rows = torch.arange(rank * len(parameter), (rank + 1) * len(parameter))
        parameter.data.copy_(full[rows % len(full)])

    model.lm_head.weight.weight_loader = load


def replicated(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:  # noqa: ARG001 - the mistake
    """A model that takes no notice of ranks: right, and whole on every one of them."""
    return dense.factory(vllm_config, ParallelContext())


MUTANTS.append(
    Mutant(
        name="everything_replicated",
        factory=replicated,
        caught_by="parallelism.parameters_shrink",
        reports="",
        tp=BOTH,
        reference=None,
    )
)


# Backward over several ranks: the forward is right ------------------------------------------------------------


@mutant(caught_by="gradients.parallel", reports="torchtitan#1805, Megatron-LM#7452", tp=BOTH, alone=True)
def backward_misses_a_reduction(model: Any) -> None:
    """The input of a column-parallel layer gets the gradient of this rank's columns only."""
    for layer in model.layers:
        layer.mlp.gate_up.forward = lambda x, gate_up=layer.mlp.gate_up: F.linear(x, gate_up.weight)


@mutant(caught_by="gradients.norm", reports="torchtitan#2106", tp=BOTH, alone=True)
def gradient_scaled_by_ranks(model: Any) -> None:
    """The all-reduce of another convention reduces in backward once more."""
    context = _context(model)

    def forward(x: Tensor, down: Any) -> Tensor:
        partial = F.linear(x, down.weight)
        if not torch.is_grad_enabled() or context.get_tensor_parallel_world_size() == 1:
            return reduce_from_group(partial, context)
        summed: Tensor = differentiable.all_reduce(partial, group=context.get_tensor_parallel_group())
        return summed

    for layer in model.layers:
        layer.mlp.down.forward = lambda x, down=layer.mlp.down: forward(x, down)


@mutant(caught_by="gradients.parallel", reports="Megatron-LM#1446", tp=BOTH, of=gpt, alone=True)
def replicated_bias_trained_on_rank_0_only(model: Any) -> None:
    """Rank 0 alone adds the bias before the reduction: the sum is right, and the replicas drift apart."""
    context = _context(model)
    first = context.get_tensor_parallel_rank() == 0
    for layer in model.layers:
        down = layer.mlp.down
        down.forward = lambda x, down=down: reduce_from_group(
            F.linear(x, down.weight, down.bias if first else None), context
        )


@mutant(caught_by="gradients.parallel", reports="Megatron-LM#1446", tp=BOTH, alone=True)
def norm_of_a_share_gets_its_share(model: Any) -> None:
    """The last norm's weight is used inside the head's parallel region: each rank sees its rows' part only."""
    context = _context(model)
    norm, head = model.norm, model.lm_head
    norm.forward = lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)

    def scaled(hidden: Tensor) -> Tensor:
        logits = F.linear(copy_to_group(hidden, context) * norm.weight, head.weight)
        return gather_from_group(logits, context)[..., : head.num_embeddings]

    head.forward = scaled


@mutant(caught_by="gradients.parallel", reports="", tp=BOTH, alone=True)
def another_mask_on_each_rank(model: Any) -> None:
    """Dropout that ranks seed for themselves, of hidden states that each has in full."""
    generator = torch.Generator()
    rank = _context(model).get_tensor_parallel_rank()
    forward = model.norm.forward

    def dropped(x: Tensor) -> Tensor:
        out: Tensor = forward(x)
        if not model.training:
            return out
        generator.manual_seed(torch.initial_seed() + rank)
        return out * (torch.rand(out.shape, generator=generator) > 0.1).to(out.dtype) / 0.9

    model.norm.forward = dropped


@mutant(caught_by="gradients.parallel", reports="", tp=BOTH, alone=True)
def reduction_missing_in_training(model: Any) -> None:
    """A rank keeps what its own columns gave, as soon as the model trains."""
    for layer in model.layers:
        down = layer.mlp.down
        down.forward = lambda x, down=down, whole=down.forward: F.linear(x, down.weight) if model.training else whole(x)


def _load_leniently(model: Any, skip: Callable[[str], bool] = lambda name: False) -> None:
    """Give the model a `load_weights` as many write it: what matches is loaded, what does not is skipped."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name in parameters and not skip(name):
                _load_one(parameters[name], tensor)

    model.load_weights = load


def _load_one(parameter: Any, tensor: Tensor) -> None:
    loader = getattr(parameter, "weight_loader", None)
    if loader is None:
        parameter.data.copy_(tensor)
    else:
        loader(parameter, tensor)
