"""Synthetic evidence of a coded checkpoint: a model of one layer that ranks share rightly, and ways to get it wrong.

Two heads, one kv head, gate and up fused in one parameter and apart in the checkpoint, a vocabulary that two ranks do
not divide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genmodel.runners.evidence import (
    CHANGED,
    UNLOADED,
    AttentionInfo,
    CodedTensor,
    Evidence,
    LoadProbes,
    Misfit,
    Omission,
    RankGradients,
    Reload,
    WeightAudit,
)

VOCABULARY, HIDDEN, INNER, HEAD = 203, 64, 48, 32
SIZES = (1, 2)
LONGER = "one longer along dimension 0"

SHAPES = {
    "embed.weight": (VOCABULARY, HIDDEN),
    "head.weight": (VOCABULARY, HIDDEN),
    "layers.0.attn.o_proj.weight": (HIDDEN, 2 * HEAD),
    "layers.0.attn.qkv.weight": (4 * HEAD, HIDDEN),
    "layers.0.mlp.down.weight": (HIDDEN, INNER),
    "layers.0.mlp.gate.weight": (INNER, HIDDEN),
    "layers.0.mlp.up.weight": (INNER, HIDDEN),
    "norm.weight": (HIDDEN,),
}

Codes = dict[str, Tensor]


def coded_checkpoint() -> dict[str, CodedTensor]:
    codes, first = {}, 1
    for name, shape in SHAPES.items():
        codes[name] = CodedTensor(shape=shape, first_code=first)
        first += math.prod(shape)
    return codes


def whole_codes() -> Codes:
    """What the model holds at TP=1."""
    tensors = {
        name: torch.arange(t.first_code, t.first_code + math.prod(t.shape), dtype=torch.int32).reshape(t.shape)
        for name, t in coded_checkpoint().items()
    }
    gate, up = tensors.pop("layers.0.mlp.gate.weight"), tensors.pop("layers.0.mlp.up.weight")
    return {**tensors, "layers.0.mlp.gate_up.weight": torch.cat([gate, up])}


def rank_codes(rank: int, size: int) -> Codes:
    """What a rank holds: rows of the vocabulary, of q, of gate and of up; columns of down and o_proj."""
    whole = whole_codes()
    if size == 1:
        return whole
    q, kv = whole["layers.0.attn.qkv.weight"].split([2 * HEAD, 2 * HEAD])
    gate, up = whole["layers.0.mlp.gate_up.weight"].chunk(2)
    return {
        "embed.weight": _padded(whole["embed.weight"], size)[rank],
        "head.weight": _padded(whole["head.weight"], size)[rank],
        "layers.0.attn.o_proj.weight": whole["layers.0.attn.o_proj.weight"].chunk(size, 1)[rank],
        "layers.0.attn.qkv.weight": torch.cat([q.chunk(size)[rank], kv]),
        "layers.0.mlp.down.weight": whole["layers.0.mlp.down.weight"].chunk(size, 1)[rank],
        "layers.0.mlp.gate_up.weight": torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]]),
        "norm.weight": whole["norm.weight"],
    }


def _padded(table: Tensor, size: int) -> list[Tensor]:
    missing = -len(table) % size
    return list(torch.cat([table, table.new_zeros(missing, table.shape[1])]).chunk(size))


def audits() -> dict[int, tuple[WeightAudit, ...]]:
    return {size: tuple(_audit(rank, size) for rank in range(size)) for size in SIZES}


def _audit(rank: int, size: int) -> WeightAudit:
    attention = AttentionInfo(
        module="layers.0.attn.attn", prefix="layers.0.attn", num_heads=2 // size, num_kv_heads=1, head_dim=HEAD
    )
    probes = LoadProbes(
        unrepeatable="",
        unknown="layers.0.genmodel_unknown.weight",
        unknown_refused="ValueError: no such name",
        omissions=(
            Omission(tensor="norm.weight", refused="ValueError: norm.weight is missing", left=(), exempt=False),
            Omission(tensor="head.weight", refused=None, left=(), exempt=False),
            Omission(tensor="embed.weight", refused=None, left=("embed.weight",), exempt=True),
        ),
        misfits=(
            Misfit(tensor="norm.weight", change="one shorter along dimension 0", refused="ValueError: 63"),
            Misfit(tensor="norm.weight", change="of integers", refused="ValueError: integers", converts=True),
            Misfit(tensor="embed.weight", change=LONGER, refused=None, dimension=0),
        ),
    )
    return WeightAudit(
        tensor_parallel_size=size,
        rank=rank,
        world_size=size,
        codes=rank_codes(rank, size),
        tied=(),
        attention=(attention,),
        probes=probes if size == 1 else None,
        reloads=tuple(Reload(order=order, refused=None) for order in ("as before", "reversed", "shuffled")),
    )


def parallel_gradients() -> dict[int, tuple[RankGradients, ...]]:
    generator = torch.Generator().manual_seed(0)
    total = sum(math.prod(shape) for shape in SHAPES.values())
    exact = torch.randn(total + 1, generator=generator, dtype=torch.float64)
    exact[0] = 0  # padding
    states = torch.randn(2, 17, 8, generator=generator, dtype=torch.float64)
    found = {}
    for size in SIZES:
        ranks = []
        for rank in range(size):
            codes = rank_codes(rank, size)
            gradients: dict[str, Tensor | None] = {
                name: exact[c.long()] + (c > 0) * 1e-14 * torch.randn(c.shape, generator=generator, dtype=torch.float64)
                for name, c in codes.items()
            }
            ranks.append(
                RankGradients(
                    tensor_parallel_size=size,
                    rank=rank,
                    loss=5.3,
                    codes=codes,
                    gradients=gradients,
                    trained=states[0],
                    undropped=states[1],
                )
            )
        found[size] = tuple(ranks)
    return found


def change_codes(
    evidence: Evidence,
    name: str,
    change: Callable[[Tensor], Tensor],
    *,
    sizes: tuple[int, ...] = SIZES,
    ranks: tuple[int, ...] = (0, 1),
) -> Evidence:
    """What some ranks hold of one parameter changed; `change` gets a copy."""

    def changed(audit: WeightAudit) -> WeightAudit:
        return replace(audit, codes={**audit.codes, name: change(audit.codes[name].clone())})

    return change_audits(evidence, changed, sizes=sizes, ranks=ranks)


def change_audits(
    evidence: Evidence,
    change: Callable[[WeightAudit], WeightAudit],
    *,
    sizes: tuple[int, ...] = SIZES,
    ranks: tuple[int, ...] = (0, 1),
) -> Evidence:
    weights: dict[int, Any] = dict(evidence.weights)
    for size in sizes:
        weights[size] = tuple(change(audit) if audit.rank in ranks else audit for audit in weights[size])
    return replace(evidence, weights=weights)


def change_probes(evidence: Evidence, **fields: Any) -> Evidence:
    def changed(audit: WeightAudit) -> WeightAudit:
        assert audit.probes is not None
        return replace(audit, probes=replace(audit.probes, **fields))

    return change_audits(evidence, changed, sizes=(1,))


def change_misfit(evidence: Evidence, number: int, **fields: Any) -> Evidence:
    """One of the tensors that do not fit is another, or was taken."""

    def changed(audit: WeightAudit) -> WeightAudit:
        assert audit.probes is not None
        misfits = list(audit.probes.misfits)
        misfits[number] = replace(misfits[number], **fields)
        return replace(audit, probes=replace(audit.probes, misfits=tuple(misfits)))

    return change_audits(evidence, changed, sizes=(1,))


def change_reload(evidence: Evidence, number: int, **fields: Any) -> Evidence:
    """What rank 1 made of the same checkpoint in another order."""

    def changed(audit: WeightAudit) -> WeightAudit:
        reloads = list(audit.reloads)
        reloads[number] = replace(reloads[number], **fields)
        return replace(audit, reloads=tuple(reloads))

    return change_audits(evidence, changed, sizes=(2,), ranks=(1,))


def change_heads(evidence: Evidence, **fields: int) -> Evidence:
    def changed(audit: WeightAudit) -> WeightAudit:
        return replace(audit, attention=tuple(replace(layer, **fields) for layer in audit.attention))

    return change_audits(evidence, changed, sizes=(2,))


def change_gradient(
    evidence: Evidence, name: str, change: Callable[[Tensor], Tensor | None], ranks: tuple[int, ...] = (0, 1)
) -> Evidence:
    """The gradient of one parameter at TP=2 changed."""

    def changed(rank: RankGradients) -> RankGradients:
        gradient = rank.gradients[name]
        assert gradient is not None
        return replace(rank, gradients={**rank.gradients, name: change(gradient.clone())})

    return change_ranks(evidence, changed, ranks)


def change_ranks(
    evidence: Evidence, change: Callable[[RankGradients], RankGradients], ranks: tuple[int, ...] = (0, 1)
) -> Evidence:
    found: dict[int, Any] = dict(evidence.parallel_gradients)
    found[2] = tuple(change(rank) if rank.rank in ranks else rank for rank in found[2])
    return replace(evidence, parallel_gradients=found)


def _undropped(factor: float) -> Callable[[RankGradients], RankGradients]:
    def change(rank: RankGradients) -> RankGradients:
        assert rank.undropped is not None
        return replace(rank, undropped=factor * rank.undropped)

    return change


def everything(value: int) -> Callable[[Tensor], Tensor]:
    return lambda codes: torch.full_like(codes, value)


def rows(start: int, stop: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(codes: Tensor) -> Tensor:
        codes[start:stop] = value
        return codes

    return change


def always(rank: int) -> Callable[[WeightAudit], WeightAudit]:
    """Every rank holds this one's shards."""
    return lambda audit: replace(audit, codes=rank_codes(rank, audit.tensor_parallel_size))


def _gate_up_as_one_column(audit: WeightAudit) -> WeightAudit:
    blocks = whole_codes()["layers.0.mlp.gate_up.weight"].chunk(audit.tensor_parallel_size)
    return replace(audit, codes={**audit.codes, "layers.0.mlp.gate_up.weight": blocks[audit.rank]})


def _everything_whole(audit: WeightAudit) -> WeightAudit:
    return replace(audit, codes=whole_codes())


def _layers_swapped(audit: WeightAudit) -> WeightAudit:
    codes = audit.codes
    return replace(audit, codes={**codes, "embed.weight": codes["head.weight"], "head.weight": codes["embed.weight"]})


def _interleaved(codes: Tensor) -> Tensor:
    return codes[torch.arange(len(codes)).view(2, -1).T.flatten()]


def _without_kv(codes: Tensor) -> Tensor:
    """The slice beyond the last kv head, which padding fills."""
    codes[HEAD:] = 0
    return codes


def _embedding_changed(audit: WeightAudit) -> WeightAudit:
    return replace(audit, changed_arguments=("embed.weight",))


def _head_is_embedding(audit: WeightAudit) -> WeightAudit:
    return replace(audit, codes={**audit.codes, "head.weight": audit.codes["embed.weight"]})


def _padded_with_other_rows(codes: Tensor) -> Tensor:
    codes[-1] = codes[0]
    return codes


def _tie_in_config(evidence: Evidence) -> Evidence:
    inspection: Any = evidence.inspection
    return replace(evidence, inspection=replace(inspection, ties_embeddings=True))


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: factor * gradient


QKV, GATE_UP, DOWN = "layers.0.attn.qkv.weight", "layers.0.mlp.gate_up.weight", "layers.0.mlp.down.weight"

FAILING: Mapping[str, Mapping[str, Callable[[Evidence], Evidence]]] = {
    "weights.all_loaded": {
        "one parameter": lambda e: change_codes(e, "norm.weight", everything(UNLOADED)),
        "on one rank": lambda e: change_codes(e, "norm.weight", everything(UNLOADED), sizes=(2,), ranks=(1,)),
        "half of one": lambda e: change_codes(e, DOWN, rows(0, 32, UNLOADED)),
        "vocabulary cut off": lambda e: change_codes(
            e, "embed.weight", rows(90, 102, UNLOADED), sizes=(2,), ranks=(1,)
        ),
    },
    "weights.every_element": {
        "shard 0 on every rank": lambda e: change_audits(e, always(0), sizes=(2,)),
        "head discarded": lambda e: change_audits(e, _head_is_embedding),
        "row cut off": lambda e: change_codes(e, "head.weight", rows(100, 101, 0), sizes=(2,), ranks=(1,)),
        "swapped on one rank": lambda e: change_audits(e, _layers_swapped, sizes=(2,), ranks=(1,)),
        "altered on one rank": lambda e: change_codes(e, "norm.weight", rows(3, 4, CHANGED), sizes=(2,), ranks=(1,)),
        "a table of integers ignored": lambda e: change_probes(e, integers=("tokens",)),
    },
    "weights.any_order": {
        "another model": lambda e: change_reload(e, 1, different=(GATE_UP,)),
        "refused": lambda e: change_reload(e, 2, refused="KeyError: 'gate'"),
        "another model the second time": lambda e: change_reload(e, 0, different=("norm.weight",)),
    },
    "weights.arguments_kept": {
        "everywhere": lambda e: change_audits(e, _embedding_changed),
        "on one rank": lambda e: change_audits(e, _embedding_changed, sizes=(2,), ranks=(1,)),
    },
    "weights.wrong_shape_refused": {
        "cut to fit": lambda e: change_misfit(e, 0, refused=None),
        "a vocabulary's columns": lambda e: change_misfit(e, 2, change="one longer along dimension 1", dimension=1),
        "not a vocabulary": lambda e: change_misfit(e, 2, tensor="norm.weight"),
    },
    "weights.conversion_refused": {"converted": lambda e: change_misfit(e, 1, refused=None)},
    "weights.local_order": {
        "gate and up as one column": lambda e: change_audits(e, _gate_up_as_one_column, sizes=(2,)),
        "rows interleaved": lambda e: change_codes(e, GATE_UP, _interleaved, sizes=(2,)),
        "columns reversed": lambda e: change_codes(e, DOWN, lambda c: c.flip(1), sizes=(2,)),
        "flattened the other way": lambda e: change_codes(e, DOWN, lambda c: c.T.reshape(c.shape), sizes=(2,)),
    },
    "weights.replicated": {
        "rank 0 only": lambda e: change_codes(e, "norm.weight", everything(UNLOADED), sizes=(2,), ranks=(1,)),
        "one element": lambda e: change_codes(e, "norm.weight", rows(0, 1, 7), sizes=(2,), ranks=(1,)),
    },
    "weights.unknown_refused": {"taken": lambda e: change_probes(e, unknown_refused=None)},
    "weights.missing_refused": {
        "left as made": lambda e: change_probes(
            e, omissions=(Omission(tensor="norm.weight", refused=None, left=("norm.weight",), exempt=False),)
        )
    },
    "weights.tied": {
        "although untied": lambda e: change_audits(e, _head_is_embedding),
        "not, although tied": _tie_in_config,
        "on one rank only": lambda e: change_audits(e, _head_is_embedding, sizes=(2,), ranks=(1,)),
    },
    "parallelism.local_heads": {
        "all heads": lambda e: change_heads(e, num_heads=2),
        "too many kv heads": lambda e: change_heads(e, num_kv_heads=2),
    },
    "parallelism.parameters_shrink": {"whole": lambda e: change_audits(e, _everything_whole, sizes=(2,))},
    "parallelism.kv_replication": {
        "beyond the last head": lambda e: change_codes(e, QKV, _without_kv, sizes=(2,), ranks=(1,)),
        "at another place": lambda e: change_codes(e, QKV, lambda c: c.roll(HEAD, 0), sizes=(2,), ranks=(1,)),
    },
    "parallelism.vocabulary": {
        "other rows as padding": lambda e: change_codes(
            e, "head.weight", _padded_with_other_rows, sizes=(2,), ranks=(1,)
        ),
        "values as padding": lambda e: change_codes(e, "head.weight", rows(101, 102, CHANGED), sizes=(2,), ranks=(1,)),
        "cut off": lambda e: change_codes(e, "embed.weight", lambda c: c[:100], sizes=(2,), ranks=(1,)),
        "shard 0 on every rank": lambda e: change_audits(e, always(0), sizes=(2,)),
    },
    "gradients.parallel": {
        "scaled by ranks": lambda e: change_gradient(e, DOWN, _scaled(2.0)),
        "a reduction missing": lambda e: change_gradient(e, "norm.weight", lambda g: g - 0.5 * g.flip(0)),
        "replicas differ": lambda e: change_gradient(e, "norm.weight", _scaled(1.01), ranks=(1,)),
        "none on one rank": lambda e: change_gradient(e, "norm.weight", lambda _: None, ranks=(1,)),
        "NaN": lambda e: change_gradient(e, GATE_UP, _scaled(float("nan"))),
        "another loss": lambda e: change_ranks(e, lambda r: replace(r, loss=5.31), ranks=(1,)),
        "padding gets some": lambda e: change_gradient(e, "head.weight", lambda g: g + 1.0, ranks=(1,)),
        "a mask of its own": lambda e: change_ranks(e, lambda r: replace(r, trained=r.trained.roll(1)), ranks=(1,)),
        "NaN in training": lambda e: change_ranks(e, lambda r: replace(r, trained=r.trained / 0), ranks=(1,)),
        "another function": lambda e: change_ranks(e, _undropped(1.01)),
    },
    "gradients.norm": {
        "scaled by ranks": lambda e: change_gradient(e, DOWN, _scaled(2.0)),
        "none": lambda e: change_gradient(e, "norm.weight", lambda _: None),
        "NaN": lambda e: change_gradient(e, GATE_UP, _scaled(float("nan"))),
    },
}
"""By check: evidence that must fail it, each made from clean evidence and named for what is wrong."""
