"""weights.*: every element of the checkpoint ends up where it belongs, and what does not fit is refused.

The evidence is a checkpoint in which every element is a number of its own, loaded by vLLM's workers into models full
of NaN. What these checks cannot tell: where one matrix ends and the next begins inside a tensor that the checkpoint
itself holds fused. [gate; up] cut as one column is a slice like any other; logits.tensor_parallel and
gradients.parallel see what it computes. Where the checkpoint has gate and up as tensors of their own,
weights.local_order sees it too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator

import torch

from genmodel.conformance.access import every_audit, inspection, whole_model
from genmodel.conformance.catalogue import check
from genmodel.conformance.placement import Checkpoint, Codes, Placement, counts, distinct, homes, place
from genmodel.conformance.verdict import Level, Measurement, NotApplicable, row, violations
from genmodel.runners.evidence import CHANGED, UNLOADED, Evidence, LoadProbes, Misfit, WeightAudit, kind


@check(needs=("inspection", "weights"))
def all_loaded(evidence: Evidence) -> Iterator[Measurement]:
    """Loading fills every parameter on every rank; nothing is left as it was made.

    A vocabulary's padding need not be filled: nothing looks it up, and its logits are cut off.

    Usual causes:
        `load_weights` looks names up and skips those it does not find; a parameter was renamed; only rank
        0 loads what is replicated; a parameter in the model that no checkpoint has. What is left is
        uninitialised memory, and often plausible numbers.
    How to fix:
        Fail on names that match nothing, and return the names that were loaded, which turns vLLM's own
        guard on. The default `load_weights` of genmodel does both. What is computed and not loaded is
        a buffer: `register_buffer(name, value, persistent=False)`.
    Reports:
        #10327 vllm-gguf-plugin#103
    """
    checkpoint = Checkpoint(evidence.coded_checkpoint)
    found = inspection(evidence)
    vocabulary = {*found.embed.reads, *found.logits.reads}
    for ranks in every_audit(evidence):
        complete = not checkpoint.absent(audit.codes for audit in ranks)
        left = [
            f"{name} on rank {audit.rank} ({_some_of(tensor == UNLOADED)})"
            for audit in ranks
            for name, tensor in distinct(audit.codes).items()
            if bool((tensor == UNLOADED).any())
            and not (complete and name in vocabulary and bool((tensor != UNLOADED).any()))
        ]
        yield violations("parameters that are not loaded", left, _row(ranks))


@check(needs=("weights",))
def every_element(evidence: Evidence) -> Iterator[Measurement]:
    """Every element of the checkpoint is on some rank, and every parameter holds elements that belong in it.

    Usual causes:
        Every rank loads shard 0, so that the other shards are nowhere; a head of its own is discarded
        because the model takes itself for tied; rows are cut off where a dimension does not divide; a
        name is mapped to the wrong layer on some ranks; persistent buffers, which a state dict has too, are
        looked for among the parameters.
    How to fix:
        Cut by the rank: `loaded.narrow(dim, rank * size, size)`, with rank and size from the
        ParallelContext that the factory gets. If the checkpoint has tensors that the model rightly
        ignores, say so with --genmodel-expect.
    Reports:
        vllm-gguf-plugin#103 #5621 #53019 #20843 SpecForge#284
    """
    checkpoint = Checkpoint(evidence.coded_checkpoint)
    whole = whole_model(evidence)
    followed = checkpoint.followed(whole.codes)
    changed = [name for name, tensor in distinct(whole.codes).items() if bool((tensor == CHANGED).any())]
    if not followed:
        raise NotApplicable("load_weights changes the values of all tensors, so that none can be followed")
    for ranks in every_audit(evidence):
        absent = checkpoint.absent(audit.codes for audit in ranks)
        lost = {name: count for name, count in absent.items() if name in followed}
        yield Measurement(
            what="elements of the checkpoint on no rank",
            where=_row(ranks),
            measured=sum(lost.values()),
            allowed=0,
            detail=_listed(
                f"{name}: {_of(count, math.prod(checkpoint.tensors[name].shape))}" for name, count in lost.items()
            ),
        )
        yield violations("parameters with elements of others", list(_misplaced(ranks, whole)), _row(ranks))
        yield violations(
            "parameters with values that are in no checkpoint", list(_altered(ranks, whole, changed)), _row(ranks)
        )
    yield violations("integer tensors that nothing in the model changes with", _integers(whole), row(1))
    if changed:
        yield Measurement(
            what="parameters whose values load_weights changes, so that they cannot be followed",
            where=row(1),
            measured=len(changed),
            allowed=len(distinct(whole.codes)),
            detail=_listed(changed),
        )


@check(needs=("weights",), tensor_parallel=2)
def local_order(evidence: Evidence) -> Iterator[Measurement]:
    """A rank's part of a parameter is a slice of the whole: the same order, and a share of each matrix fused in it.

    The order is that of rows and columns inside a matrix, and of unlike matrices fused in one parameter. Whole
    matrices of one kind, such as experts, may be dealt out to ranks in any order: whether forward knows that
    order codes cannot tell, and logits.tensor_parallel and gradients.parallel do.

    Usual causes:
        gate and up, or q, k and v, are concatenated first and then cut into equal blocks, so that one
        rank gets gate and the other up; rows are dealt out in turn where another layer takes blocks.
    How to fix:
        Shard each matrix of a fused parameter on its own: ColumnParallelLinear(in, [gate, up]) and
        QKVParallelLinear do. If the checkpoint holds the fused matrix as one tensor, codes cannot tell
        what is fused in it: look at logits.tensor_parallel too.
    Reports:
        #3775 #42803
    """
    checkpoint = Checkpoint(evidence.coded_checkpoint)
    whole = whole_model(evidence)
    for ranks in every_audit(evidence, smallest=2):
        placed: dict[tuple[int, str], set[Placement]] = defaultdict(set)
        for audit, name, part, home in _parts(ranks, whole):
            placed[audit.rank, name.rpartition(".")[0]].update(checkpoint.placements(part, whole.codes[home]))
        scrambled = [
            f"{name} on rank {audit.rank}"
            for audit, name, part, home in _parts(ranks, whole)
            if checkpoint.out_of_order(part, whole.codes[home], placed[audit.rank, name.rpartition(".")[0]])
        ]
        yield violations("parameters in another order than at TP=1", scrambled, _row(ranks))
        yield violations(
            "parameters without a share of all that is fused in them",
            list(_one_sided(checkpoint, ranks, whole)),
            _row(ranks),
        )


@check(needs=("weights",), tensor_parallel=2)
def replicated(evidence: Evidence) -> Iterator[Measurement]:
    """A parameter that is whole on several ranks is the same on all of them.

    Usual causes:
        Rank 0 loads it and the others keep what they were made with; a norm that is as wide as one
        rank's heads is loaded from the front of the full one.
    How to fix:
        Load replicated parameters from the same checkpoint entry on every rank.
    Reports:
        Megatron-LM#1446 #16311 #35932
    """
    whole = whole_model(evidence)
    for ranks in every_audit(evidence, smallest=2):
        copies: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for audit, _, part, home in _parts(ranks, whole):
            if part.shape == whole.codes[home].shape:
                copies.setdefault(home, []).append((audit.rank, part))
        different = [
            f"{home}: rank {rank} against rank {held[0][0]}"
            for home, held in copies.items()
            for rank, part in held[1:]
            if not torch.equal(part, held[0][1])
        ]
        yield violations("replicated parameters that differ", different, _row(ranks))


@check(needs=("weights",))
def any_order(evidence: Evidence) -> Iterator[Measurement]:
    """The same tensors in another order, as other files or a trainer hand them over, give the same model.

    Usual causes:
        The parts of a fused tensor are placed, or put together, in the order in which they arrive; a layer is
        finished when the first tensor of the next one comes; loading counts layers instead of reading names.
    How to fix:
        Place each tensor by its name alone: `parameter.weight_loader(parameter, tensor, shard_id)` for the
        parts of a fused one. What has to be put together first, keep by name until all of it is there.
    Reports:
        #3775 #42803
    """
    audits = [audit for found in evidence.weights.values() if isinstance(found, tuple) for audit in found]
    first = [audit.reloads[0].refused for audit in audits if audit.reloads]
    if trouble := next(filter(None, first), None):
        raise NotApplicable(f"the model cannot be loaded twice: {trouble}")
    if audits and not first:
        raise NotApplicable("nothing was tried")
    for ranks in every_audit(evidence):
        wrong = [
            f"{reload.order} on rank {audit.rank}: {reload.refused or _listed(reload.different)}"
            for audit in ranks
            for reload in audit.reloads
            if reload.refused is not None or reload.different
        ]
        yield violations("orders that are refused, or give another model", wrong, _row(ranks))


@check(needs=("weights",))
def arguments_kept(evidence: Evidence) -> Iterator[Measurement]:
    """`load_weights` leaves the tensors that it is given as they were: values, shapes and dtypes.

    Usual causes:
        An operation in place on the way to a parameter, such as `tensor.mul_(scale)`, `tensor.t_()` or
        `tensor.abs_().max()` in a test of the values. In a refit the tensors are the trainer's own weights: it goes on
        to train what was made of them.
    How to fix:
        Make a new tensor, or change the parameter once it is loaded:

            param.data.copy_(tensor * scale)  # not tensor.mul_(scale)
    Reports:
        Megatron-Bridge#1637
    """
    for ranks in every_audit(evidence):
        changed = sorted({name for audit in ranks for name in audit.changed_arguments})
        yield violations("tensors changed in place", changed, row(ranks[0].tensor_parallel_size))


@check(needs=("inspection", "weights"))
def wrong_shape_refused(evidence: Evidence) -> Iterator[Measurement]:
    """A checkpoint tensor of another shape is refused, not cut to fit, filled in part or read in another order.

    What a table has beyond the vocabulary may be left out, and so may whole matrices beyond those that a parameter
    stacks, such as experts. A transposed square matrix has the right shape, so that no loader can know: what it
    computes is for logits.* to judge.

    Usual causes:
        `loaded.narrow(0, rank * size, size)` fits any tensor that is long enough, `param[: len(loaded)] = loaded`
        any that is short enough; `loaded.view(param.shape)` reads a transposed matrix in another order.
    How to fix:
            if loaded.shape != full_shape:
                raise ValueError(f"{name} is {full_shape}, not {loaded.shape}")

        genmodel's layers and default load_weights do this. vLLM's own layers do not, and are not asked for it.
    Reports:
        #20843 SpecForge#284 vllm-gguf-plugin#103
    """
    whole = whole_model(evidence)
    checkpoint = Checkpoint(evidence.coded_checkpoint)
    found = inspection(evidence)
    tables = {
        tensor
        for name in {*found.embed.reads, *found.logits.reads} & whole.codes.keys()
        for tensor in checkpoint.parts(whole.codes[name])
    }

    def may_be_cut(misfit: Misfit) -> bool:
        if misfit.dimension is None:
            return False
        shape = checkpoint.tensors[misfit.tensor].shape
        beyond = misfit.tensor in tables and shape[misfit.dimension] >= found.vocab_size
        return beyond or misfit.dimension < len(shape) - 2

    yield from _taken(evidence, [m for m in _tried(evidence) if not m.converts and not may_be_cut(m)])


@check(needs=("inspection", "weights"), level=Level.RECOMMENDED)
def conversion_refused(evidence: Evidence) -> Iterator[Measurement]:
    """A checkpoint tensor that `copy_` would convert is refused: integers, or one element where there are several.

    Usual causes:
        `param.data.copy_(loaded)` takes whatever can be made to fit: a quantised checkpoint, whose integers mean
        nothing without their scales, loads as if it were a plain one, and one number fills a whole norm.
    How to fix:
            if loaded.is_floating_point() != param.is_floating_point():
                raise ValueError(f"{name} is {param.dtype}, not {loaded.dtype}")

        genmodel's layers and default load_weights do this.
    Reports:
        #10327
    """
    if inspection(evidence).native:
        raise NotApplicable("vLLM's own loaders convert integers")
    yield from _taken(evidence, [m for m in _tried(evidence) if m.converts])


@check(needs=("weights",), level=Level.RECOMMENDED)
def unknown_refused(evidence: Evidence) -> Iterator[Measurement]:
    """A checkpoint tensor whose name the model does not have is refused, not skipped.

    Usual causes:
        `if name not in params: continue` in load_weights: a renamed layer then never loads, and nobody
        hears of it.
    How to fix:
            if name not in params:
                raise ValueError(f"the model has no {name}")

        Skip by name what is known to be in checkpoints and not in the model.
    Reports:
        #10327
    """
    found = _probes(evidence)
    taken = () if found.unknown_refused is not None else (found.unknown,)
    yield violations("unknown tensors that were taken in silence", taken, row(1))


@check(needs=("weights",))
def missing_refused(evidence: Evidence) -> Iterator[Measurement]:
    """A checkpoint that lacks a tensor is refused, unless no parameter is left uninitialised for want of it.

    Usual causes:
        `load_weights` returns None, which turns vLLM's guard against missing weights off, or returns
        every name whether it was loaded or not.
    How to fix:
        Return the set of names that were loaded, or leave load_weights to genmodel. vLLM's guard does not
        look at its own linear layers and embeddings, and counts a fused parameter as loaded if a part of it
        was; so neither is asked for here.
    Reports:
        #10327
    """
    omissions = [omission for omission in _probes(evidence).omissions if not omission.exempt]
    if not omissions:
        raise NotApplicable("all weights are in vLLM's own layers, which its guard against missing weights skips")
    unnoticed = [
        omission.tensor if omission.tensor in omission.left else f"{omission.tensor} (for {omission.left[0]})"
        for omission in omissions
        if omission.refused is None and omission.left
    ]
    yield violations("kinds of tensors that are left uninitialised if missing", unnoticed, row(1))


@check(needs=("inspection", "weights"))
def tied(evidence: Evidence) -> Iterator[Measurement]:
    """Input and output embeddings are one where config.json says tie_word_embeddings, and two where it does not.

    Usual causes:
        Tying is forgotten, or undone by `.to()` or by a second assignment; the model ties whatever the
        config says, and discards a checkpoint's own lm_head.
    How to fix:
            if config.tie_word_embeddings:
                self.lm_head.weight = self.embed_tokens.weight

        If the checkpoint has a head of its own, config.json must say "tie_word_embeddings": false.
    Reports:
        #5621 #53019
    """
    found = inspection(evidence)
    if found.ties_embeddings is None:
        raise NotApplicable("config.json does not say tie_word_embeddings")
    whole = whole_model(evidence)
    inputs = _vocabulary(found.embed.reads, whole.codes, found.vocab_size)
    outputs = _vocabulary(found.logits.reads, whole.codes, found.vocab_size)
    if not inputs or not outputs:
        raise NotApplicable("no telling which parameters embed_input_ids and compute_logits read")
    if not found.ties_embeddings and not _has_own_head(evidence, whole, inputs):
        raise NotApplicable("config.json says untied, but the checkpoint has nothing for a head of its own")
    embedding = inputs[0]
    heads = [name for name in outputs if name != embedding] or [embedding]
    for ranks in every_audit(evidence):
        yield violations(
            "heads that are not tied" if found.ties_embeddings else "heads that hold the input embedding",
            [
                f"{head} and {embedding} on rank {audit.rank}"
                for audit in ranks
                for head in heads
                if {embedding, head} <= audit.codes.keys()
                and _alike(audit.codes[embedding], audit.codes[head], whole=found.ties_embeddings)
                is not found.ties_embeddings
            ],
            _row(ranks),
        )


def _row(ranks: tuple[WeightAudit, ...]) -> str:
    return row(ranks[0].tensor_parallel_size)


def _parts(ranks: Collection[WeightAudit], whole: WeightAudit) -> Iterator[tuple[WeightAudit, str, torch.Tensor, str]]:
    """(rank, name, what it holds, name of the parameter at TP=1 that this is a part of)."""
    for audit in ranks:
        home = homes(audit.codes, whole.codes)
        for name, part in distinct(audit.codes).items():
            if name in home:
                yield audit, name, part, home[name]


def _misplaced(ranks: Collection[WeightAudit], whole: WeightAudit) -> Iterator[str]:
    """Parameters that hold elements which at TP=1 are in another one."""
    for audit, name, part, home in _parts(ranks, whole):
        if foreign := place(part, whole.codes[home]).foreign:
            yield f"{name} on rank {audit.rank} ({_of(foreign, part.numel())})"


def _altered(ranks: Collection[WeightAudit], whole: WeightAudit, changed: Collection[str]) -> Iterator[str]:
    """Parameters whose values are the checkpoint's at TP=1 and are not here."""
    for audit, name, part, home in _parts(ranks, whole):
        if home not in changed and bool((part == CHANGED).any()):
            yield f"{name} on rank {audit.rank} ({_some_of(part == CHANGED)})"


def _one_sided(checkpoint: Checkpoint, ranks: Collection[WeightAudit], whole: WeightAudit) -> Iterator[str]:
    """Parameters that join tensors of the checkpoint, on ranks that have nothing of one kind of these.

    Tensors of one kind, and those stacked along a dimension of their own, such as experts, may well be dealt out whole.
    """
    size = len(ranks)
    for audit, name, part, home in _parts(ranks, whole):
        joined = {
            kind(tensor): tensor
            for tensor in checkpoint.parts(whole.codes[home])
            if len(shape := checkpoint.tensors[tensor].shape) == part.dim() and shape and shape[0] >= size
        }
        if len(joined) > 1:
            held = {kind(tensor) for tensor in checkpoint.parts(part)}
            if lacking := sorted(joined[other] for other in joined.keys() - held):
                yield f"{name} on rank {audit.rank} has nothing of {', '.join(lacking)}"


def _probes(evidence: Evidence) -> LoadProbes:
    """What loading made of checkpoints that do not fit, seen at TP=1."""
    found = whole_model(evidence).probes
    if found is None or found.unrepeatable:
        reason = "nothing was tried" if found is None else f"the model cannot be loaded twice: {found.unrepeatable}"
        raise NotApplicable(reason)
    return found


def _tried(evidence: Evidence) -> tuple[Misfit, ...]:
    """What loading made of checkpoints with a tensor that does not fit."""
    found = _probes(evidence)
    if found.misfits:
        return found.misfits
    own = found.omissions and all(omission.exempt for omission in found.omissions)
    raise NotApplicable(
        "all weights are in vLLM's own layers, which load what they are given" if own else "nothing was tried"
    )


def _taken(evidence: Evidence, tried: Collection[Misfit]) -> Iterator[Measurement]:
    taken: dict[str, list[str]] = defaultdict(list)
    for misfit in tried:
        if misfit.refused is None:
            taken[misfit.tensor].append(misfit.change)
    yield violations(
        "kinds of tensors that are taken although they do not fit",
        [f"{name} {', '.join(changes)}" for name, changes in taken.items()],
        row(1),
    )
    if untried := _probes(evidence).untried:
        yield Measurement(
            what="kinds of tensors that were not tried, for there are too many",
            where=row(1),
            measured=untried,
            allowed=len(evidence.coded_checkpoint),
        )


def _integers(whole: WeightAudit) -> tuple[str, ...]:
    return () if whole.probes is None else whole.probes.integers


def _vocabulary(names: Collection[str], codes: Codes, vocab_size: int) -> list[str]:
    """Those parameters that are matrices with a row, or a column, for each token."""
    return [n for n in names if n in codes and codes[n].dim() == 2 and max(codes[n].shape) >= vocab_size]


def _has_own_head(evidence: Evidence, whole: WeightAudit, inputs: Collection[str]) -> bool:
    """Whether the checkpoint has another matrix of the size of the one that the input embedding holds."""
    checkpoint = Checkpoint(evidence.coded_checkpoint)
    embedded = {name for parameter in inputs for name in checkpoint.parts(whole.codes[parameter])}
    sizes = {math.prod(checkpoint.tensors[name].shape) for name in embedded}
    first = {checkpoint.tensors[name].first_code for name in embedded}
    return any(
        len(tensor.shape) == 2 and math.prod(tensor.shape) in sizes and tensor.first_code not in first
        for tensor in checkpoint.tensors.values()
    )


def _alike(embedding: torch.Tensor, head: torch.Tensor, *, whole: bool) -> bool:
    """Whether both hold the same elements; if not `whole`, whether they share any."""
    ours, theirs = counts([head], embedding), counts([embedding], head)
    return bool((ours != 0).all()) and bool((theirs != 0).all()) if whole else bool((ours > 0).any())


def _some_of(where: torch.Tensor) -> str:
    return _of(int(where.sum()), where.numel())


def _of(count: int, total: int) -> str:
    return "all of it" if count == total else f"{count:,} of {total:,} elements"


def _listed(names: Collection[str] | Iterator[str], shown: int = 4) -> str:
    found = list(names)
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return "; ".join(found[:shown]) + more
