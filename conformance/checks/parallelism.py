"""parallelism.*: ranks share the model between them, heads, vocabulary and memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from genmodel.conformance.access import every_audit, inspection, sizes, whole_model
from genmodel.conformance.catalogue import check
from genmodel.conformance.placement import Codes, counts, distinct
from genmodel.conformance.verdict import Level, Measurement, NotApplicable, row, violations
from genmodel.runners.evidence import CHANGED, AttentionInfo, Evidence, WeightAudit


@check(needs=("weights",), tensor_parallel=2)
def local_heads(evidence: Evidence) -> Iterator[Measurement]:
    """Attention gets the rank's own heads: all ranks together have as many as the model at TP=1.

    Usual causes:
        The head count of the config is passed on to attention under tensor parallelism, so that the KV
        cache is made for all heads and rows are reshaped wrongly.
    How to fix:
            self.qkv = QKVParallelLinear(hidden_size, num_heads, num_kv_heads, head_dim, parallel_context=context)
            self.attn = TrainableAttention(self.qkv.num_heads, head_dim, self.qkv.num_kv_heads, prefix=prefix)
    Reports:
        #39707 transformers#48307
    """
    whole = whole_model(evidence)
    layers = _layers(whole)
    if not layers:
        raise NotApplicable("the model has no layer with a KV cache")
    for ranks in every_audit(evidence, smallest=2):
        wrong = [
            complaint
            for module, layer in layers.items()
            if not _is_whole(module, ranks, whole)
            for complaint in _wrong_heads(layer, module, ranks)
        ]
        yield violations("attention layers with other heads than this rank's", wrong, _row(ranks))


@check(needs=("weights",), level=Level.RECOMMENDED, tensor_parallel=2)
def parameters_shrink(evidence: Evidence) -> Iterator[Measurement]:
    """Each rank holds its share of the matrices: at least half of what sharding can save is saved.

    Usual causes:
        The model is built of nn.Linear and nn.Embedding, which know nothing of ranks: it is right, and
        every rank holds and computes all of it.
    How to fix:
        Build on ColumnParallelLinear, RowParallelLinear, QKVParallelLinear, VocabParallelEmbedding and
        ParallelLMHead, and hand them the ParallelContext that the factory gets.
    Reports:
        #3775
    """
    whole = whole_model(evidence)
    full = _matrices(whole)
    if not full:
        raise NotApplicable("the model has no matrices")
    total = sum(tensor.numel() for tensor in full.values())
    for ranks in every_audit(evidence, smallest=2):
        largest = max(ranks, key=lambda audit: sum(t.numel() for t in _matrices(audit).values()))
        held = _matrices(largest)
        unshared = sorted(
            (name for name, tensor in held.items() if name in full and tensor.shape == full[name].shape),
            key=lambda name: -held[name].numel(),
        )
        yield Measurement(
            what="share of the elements of all matrices on one rank",
            where=_row(ranks),
            measured=sum(tensor.numel() for tensor in held.values()) / total,
            allowed=(1 + 1 / len(ranks)) / 2,
            detail=f"whole on rank {largest.rank}: {', '.join(unshared[:4]) or 'none'}"
            + (f" and {len(unshared) - 4} more" if len(unshared) > 4 else ""),
        )


@check(needs=("inspection", "weights"), tensor_parallel=2)
def kv_replication(evidence: Evidence) -> Iterator[Measurement]:
    """Where there are fewer kv heads than ranks, each is whole on several ranks, at the same place.

    Usual causes:
        The slice starts at rank * kv_size, beyond the last kv head, instead of at rank // replicas *
        kv_size; or half a head is given to each rank.
    How to fix:
            replicas = max(1, world_size // num_kv_heads)
            start = rank // replicas * kv_heads_here * head_dim

        QKVParallelLinear does this.
    Reports:
        transformers#48307
    """
    whole = whole_model(evidence)
    found = inspection(evidence)
    layers = {m: layer for m, layer in _layers(whole).items() if layer.num_kv_heads < max(sizes(evidence))}
    if not layers:
        raise NotApplicable("no layer has fewer kv heads than there are ranks")
    # k and v; vLLM's own layers may keep both as one latent.
    kinds = 1 if found.native else 2
    for ranks in every_audit(evidence, smallest=2):
        size = len(ranks)
        wrong = [
            complaint
            for module, layer in layers.items()
            if layer.num_kv_heads < size
            for complaint in _unlike_replicas(
                module, ranks, at_least=kinds * layer.head_dim * found.hidden_size, copies=size // layer.num_kv_heads
            )
        ]
        yield violations("kv heads that are not replicated", wrong, _row(ranks))


@check(needs=("inspection", "weights"), tensor_parallel=2)
def vocabulary(evidence: Evidence) -> Iterator[Measurement]:
    """Every element of the input and output embedding is on exactly one rank, or on all; padding is empty.

    Usual causes:
        A vocabulary that the ranks do not divide: rows at the end are cut off, or padding is filled with
        rows of other tokens, whose logits then win.
    How to fix:
        Pad to ceil(vocab_size / ranks) rows on each rank, fill with zeros, and cut the logits:
        VocabParallelEmbedding and ParallelLMHead do.
    Reports:
        #20843 SpecForge#284
    """
    found = inspection(evidence)
    whole = whole_model(evidence)
    tables = [
        name
        for name in dict.fromkeys((*found.embed.reads, *found.logits.reads))
        if name in whole.codes and max(whole.codes[name].shape, default=0) >= found.vocab_size
    ]
    if not tables:
        raise NotApplicable("no telling which parameters embed_input_ids and compute_logits read")
    for ranks in every_audit(evidence, smallest=2):
        wrong = [complaint for name in tables for complaint in _badly_spread(name, ranks, whole)]
        yield violations("vocabularies that are not spread evenly", wrong, _row(ranks))


def _row(ranks: tuple[WeightAudit, ...]) -> str:
    return row(ranks[0].tensor_parallel_size)


def _layers(audit: WeightAudit) -> dict[str, AttentionInfo]:
    """Attention layers by name; vLLM's own inside one of ours is left out."""
    names = {layer.module for layer in audit.attention}
    return {layer.module: layer for layer in audit.attention if layer.module.rpartition(".")[0] not in names}


def _matrices(audit: WeightAudit) -> dict[str, torch.Tensor]:
    """Parameters of two dimensions and more; buffers are tables that every rank may need."""
    return {n: tensor for n, tensor in distinct(audit.codes).items() if tensor.dim() > 1 and n not in audit.buffers}


def _beside(module: str, codes: Codes) -> dict[str, torch.Tensor]:
    """The parameters of the nearest module around an attention layer that has any: its projections."""
    while module:
        module = module.rpartition(".")[0]
        found = {name: tensor for name, tensor in codes.items() if name.startswith(f"{module}." if module else "")}
        if found:
            return found
    return {}


def _is_whole(module: str, ranks: Collection[WeightAudit], whole: WeightAudit) -> bool:
    """Whether every rank has all of an attention layer's weights, and so all of its heads."""
    full = {name: tensor.shape for name, tensor in _beside(module, whole.codes).items()}
    return bool(full) and all(
        {name: audit.codes[name].shape for name in full if name in audit.codes} == full for audit in ranks
    )


def _wrong_heads(layer: AttentionInfo, module: str, ranks: Collection[WeightAudit]) -> Iterator[str]:
    here = [(audit.rank, _layers(audit)[module]) for audit in ranks if module in _layers(audit)]
    total = sum(found.num_heads for _, found in here)
    if total != layer.num_heads:
        yield f"{module}: {' + '.join(str(f.num_heads) for _, f in here)} heads, {layer.num_heads} at TP=1"
    share = max(1, layer.num_kv_heads // len(ranks))
    for rank, found in here:
        if found.num_kv_heads != share:
            yield f"{module} on rank {rank}: {found.num_kv_heads} of {layer.num_kv_heads} kv heads instead of {share}"


def _unlike_replicas(module: str, ranks: Collection[WeightAudit], *, at_least: int, copies: int) -> Iterator[str]:
    """Ranks that do not share one kv head's projections with others, in the same places."""
    held = [(audit.rank, {n: t for n, t in _beside(module, audit.codes).items() if t.dim() == 2}) for audit in ranks]
    for rank, mine in held:
        partners = 0
        for other, theirs in held:
            common = sum(_same_places(mine[name], theirs[name]) for name in mine.keys() & theirs.keys())
            partners += other != rank and common >= at_least
        if partners < copies - 1:
            yield f"{module} on rank {rank} shares a kv head with {partners} other ranks instead of {copies - 1}"


def _same_places(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """How many elements both hold at the same place."""
    return int(((ours == theirs) & (ours > 0)).sum()) if ours.shape == theirs.shape else 0


def _badly_spread(name: str, ranks: Collection[WeightAudit], whole: WeightAudit) -> Iterator[str]:
    parts = [(audit.rank, audit.codes[name]) for audit in ranks if name in audit.codes]
    codes = whole.codes[name]
    for rank, part in parts:
        if bool((counts([part], part) >= 0).sum() < (part > 0).sum()):
            yield f"{name} on rank {rank} holds some elements twice"
        if bool((part == CHANGED).any()) and not bool((codes == CHANGED).any()):
            yield f"{name} on rank {rank} is padded with values other than zero"
    on = counts((part for _, part in parts), codes)
    on = on[on >= 0]
    if bool((on == 0).any()):
        yield f"{name}: {int((on == 0).sum()):,} elements are on no rank"
    if bool((on > 0).any()) and len(on[on > 0].unique()) > 1:
        yield f"{name}: some elements are on one rank, others on several"
    elif bool(((on > 1) & (on < len(ranks))).any()):
        yield f"{name} is on several ranks, and not on all"
