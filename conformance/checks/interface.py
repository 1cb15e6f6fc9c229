"""interface.*: what vLLM asks of a model before it computes anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch

from genmodel.conformance import agreement
from genmodel.conformance.access import every_size, inspection, rank_zero, reference_of
from genmodel.conformance.alignment import Phase, with_reference
from genmodel.conformance.catalogue import check
from genmodel.conformance.verdict import REFERENCE, Measurement, NotApplicable, row, violations
from genmodel.runners.evidence import Evidence, Probe, Scores, Trace
from genmodel.runners.scenarios import FRESH_START_METHODS


@check(needs=("inspection",))
def builds(evidence: Evidence) -> Iterator[Measurement]:
    """The target resolves and builds a model that has parameters.

    Usual causes:
        The factory raises, reads a config attribute that this config lacks, or returns something else
        than an nn.Module. The model is built inside `forward`, so that it has no parameters when
        weights are loaded.
    How to fix:
        Build every layer in `__init__` and return the module:

            def factory(vllm_config, parallel_context):
                return MyModel(vllm_config.model_config.hf_config, parallel_context)

        Give a config that has what the factory reads with --genmodel-config=file.json.
    Reports:
        #10327
    """
    yield violations("models without parameters", () if (found := inspection(evidence)).parameters else (found.kind,))


@check(needs=("inspection",))
def signature(evidence: Evidence) -> Iterator[Measurement]:
    """The model has the methods vLLM calls, and they accept what vLLM passes.

    Usual causes:
        A method is missing or was renamed; forward names its arguments differently from vLLM.
    How to fix:
        vLLM calls these by keyword; a model need only name those it uses:

            def embed_input_ids(self, input_ids): ...  # or get_input_embeddings
            def forward(self, input_ids, positions, inputs_embeds=None): ...
            def compute_logits(self, hidden_states): ...
    Reports:
        #27583 #30469 #12038 vllm-ascend#3091
    """
    yield violations("missing parts of vLLM's interface", inspection(evidence).problems)


@check(needs=("inspection",))
def embed_input_ids(evidence: Evidence) -> Iterator[Measurement]:
    """embed_input_ids, or get_input_embeddings as it used to be called, returns [tokens, hidden].

    Usual causes:
        The method returns the embedding module instead of calling it, or adds a batch dimension.
    How to fix:
            def embed_input_ids(self, input_ids):       # [tokens]
                return self.embed_tokens(input_ids)     # [tokens, hidden]
    Reports:
        #27583 #30469
    """
    found = inspection(evidence)
    yield _shape(found.embed, (found.probe_tokens, found.hidden_size))


@check(needs=("inspection",))
def forward(evidence: Evidence) -> Iterator[Measurement]:
    """forward takes vLLM's keywords on flattened tokens and returns [tokens, hidden].

    Usual causes:
        forward expects [batch, length], returns logits or a tuple, or lacks `positions`.
    How to fix:
        All requests arrive concatenated along one dimension, without padding; `positions` tells where
        each token is:

            def forward(self, input_ids, positions):
                x = self.embed_input_ids(input_ids)  # [tokens, hidden]
                ...
                return self.norm(x)  # [tokens, hidden], not logits
    Reports:
        #12038 vllm-ascend#3091
    """
    found = inspection(evidence)
    yield _shape(found.forward, (found.probe_tokens, found.hidden_size))


@check(needs=("inspection",))
def compute_logits(evidence: Evidence) -> Iterator[Measurement]:
    """compute_logits turns [tokens, hidden] into [tokens, vocab].

    Usual causes:
        The padding of a sharded vocabulary is left in, only the local shard is returned, or only the
        last token is scored.
    How to fix:
        Gather the shards and cut the padding off: `logits = gather(x @ w.T)[..., :vocab_size]`.
    Reports:
        #20843 SpecForge#284
    """
    found = inspection(evidence)
    yield _shape(found.logits, (found.probe_tokens, found.vocab_size))


@check(needs=("inspection",))
def vllm_accepts(evidence: Evidence) -> Iterator[Measurement]:
    """vLLM's own is_text_generation_model agrees that this is one.

    Usual causes:
        compute_logits is missing, or forward is defined on an instance rather than on the class.
    How to fix:
        Let genmodel make the class (`as_model_class(factory)`), or define the three methods in the
        class body.
    Reports:
        #30469
    """
    found = inspection(evidence)
    objections = (
        () if found.vllm_accepts else (found.vllm_says or f"vLLM gives no reason for refusing {found.model_class}",)
    )
    yield violations("objections of vLLM", objections)


@check(needs=("inspection",))
def arguments_kept(evidence: Evidence) -> Iterator[Measurement]:
    """Methods leave what they are handed as it was: token ids, positions, embeddings, hidden states.

    Usual causes:
        An operation in place on an argument, such as `positions += offset`, `inputs_embeds *= scale` or
        `hidden_states.div_(temperature)`. The tensors are the caller's buffers: vLLM's next step, its
        prompt scores or the trainer's next loss read what is left in them. A pipeline stage may change the
        `intermediate_tensors` that it is given, and vLLM's fused norms do: before every step vLLM fills its buffers
        anew with what the stage before sent, and hands them over under keys in a dict of that step.
    How to fix:
        Make a new tensor:

            x = inputs_embeds * self.scale  # not inputs_embeds *= self.scale
    Reports:
        #12038
    """
    found = inspection(evidence)
    if not found.changed_arguments and found.embed.error and found.forward.error:
        raise NotApplicable("neither embed_input_ids nor forward could be called")
    yield violations("arguments changed in place", found.changed_arguments)


@check(needs=("inspection",))
def inputs_embeds(evidence: Evidence) -> Iterator[Measurement]:
    """forward gives the same for embeddings as for the token ids they were made of, to the last bit.

    Usual causes:
        `inputs_embeds` is ignored; embeddings are scaled or normalised, or positions added to them, for
        token ids alone; `input_ids`, which are None then, are read all the same.
    How to fix:
        Embed in one place, and do all the rest whichever was given:

            def forward(self, input_ids, positions, inputs_embeds=None):
                if inputs_embeds is None:
                    inputs_embeds = self.embed_input_ids(input_ids)
                ...
    Reports:
        #27583
    """
    found = inspection(evidence)
    if not found.takes_embeddings:
        raise NotApplicable("the model's forward has no argument inputs_embeds")
    if found.embeds is None:
        raise NotApplicable("embed_input_ids gave no embeddings to hand over")
    if found.forward.error is not None:
        raise NotApplicable("there is nothing to compare with: forward fails for token ids too")
    yield _shape(found.embeds, (found.probe_tokens, found.hidden_size))
    if found.embeds_difference is not None:
        yield Measurement(
            what="max |hidden states of embeddings - of token ids|",
            where=REFERENCE,
            measured=found.embeds_difference,
            allowed=0,
        )


@check(needs=("inspection",))
def parameters_registered(evidence: Evidence) -> Iterator[Measurement]:
    """Every tensor and module is registered; none hides in a plain list, tuple or dict.

    Usual causes:
        Layers kept in a Python list: they get no weights from the checkpoint, do not move to the GPU
        and do not train.
    How to fix:
            self.layers = nn.ModuleList(layers)              # not self.layers = layers
            self.register_buffer("inv_freq", inv_freq)       # for tensors that are not trained
    Reports:
        #10327
    """
    yield violations("tensors and modules PyTorch does not see", inspection(evidence).unregistered)


@check(needs=("inspection",))
def attention_prefixes(evidence: Evidence) -> Iterator[Measurement]:
    """Every attention layer has a prefix with the layer's number in it, and no two share one.

    Usual causes:
        The prefix is left out or not extended by the layer's number, or by two numbers. vLLM files KV
        caches under it, in the order of the one integer between its dots: two layers with one prefix
        read each other's cache.
    How to fix:
            TrainableAttention(..., prefix=f"{prefix}.layers.{i}.self_attn.attn")
    Reports:
        vllm-ascend#4603 #3924
    """
    layers = inspection(evidence).attention
    if not layers:
        raise NotApplicable("the model has no layer with a KV cache")
    counts = Counter(layer.prefix for layer in layers)
    yield violations("attention layers without a prefix", [layer.module for layer in layers if not layer.prefix])
    yield violations(
        "prefixes used more than once", [prefix for prefix, count in counts.items() if prefix and count > 1]
    )
    yield violations(
        "prefixes that vLLM refuses",
        [f"{layer.module}: {layer.refused}" for layer in layers if layer.prefix and layer.refused],
    )


@check(needs=("inspection",))
def rebuild(evidence: Evidence) -> Iterator[Measurement]:
    """Two builds of the same target and config give parameters of the same names, shapes and dtypes, and share none.

    Usual causes:
        Names or sizes come from a counter, a random choice or a mutable global. Ranks build in separate
        processes, so theirs would differ too.
        The factory keeps what it builds (a global, `functools.cache`) and returns it again. A trainer and an
        engine in one process then have the same weights: the engine loads over what the trainer learns.
    How to fix:
        Derive every name and shape from the config alone; a closure must not change what it captures.
        Make all layers anew in each call of the factory.
    Reports:
        #10327
    """
    found = inspection(evidence)
    once, twice = found.parameters, found.rebuilt_parameters
    different = sorted(name for name in once.keys() | twice.keys() if once.get(name) != twice.get(name))
    yield violations("parameters that differ between two builds", different)
    yield violations("parameters that two builds share", found.rebuilt_shared)


@check(needs=("inspection",))
def random_state(evidence: Evidence) -> Iterator[Measurement]:
    """With the same weights a model computes the same, whatever state random number generators had when it was built.

    Usual causes:
        A buffer drawn at random in `__init__` that is in no checkpoint (`persistent=False`, or a plain
        attribute); a parameter that loading does not reach. Every process, and every rank of a trainer,
        would draw another.
    How to fix:
        Derive it from the config, with a generator of its own and a fixed seed, or save it:

            self.register_buffer("projection", drawn)  # is in checkpoints
    Reports:
        #5657
    """
    found = inspection(evidence)
    if found.rebuilt_difference is None:
        raise NotApplicable(
            "there are no logits of two builds to compare: the model gives none outside an engine, or its builds have "
            "not the same tensors"
        )
    yield Measurement(
        what="max |logits of one build - of another| with the same weights",
        where=REFERENCE,
        measured=found.rebuilt_difference,
        allowed=0,
        detail=f"buffers that differ: {', '.join(found.rebuilt_buffers)}" if found.rebuilt_buffers else "",
    )


@check(needs=("repeated",))
def repeatable(evidence: Evidence) -> Iterator[Measurement]:
    """An engine asked the same twice answers the same, whatever state the random number generators have.

    Usual causes:
        `F.dropout(x, p)` without `training=self.training`, which acts in evaluation mode too; noise that
        is added in forward; something that is counted or averaged on `self` from call to call.
    How to fix:
            x = F.dropout(x, self.p, training=self.training)  # or an nn.Dropout, which knows
    Reports:
        #43631
    """
    for size in every_size(evidence, "repeated.first", "repeated.second"):
        first, second = (rank_zero(evidence, f"repeated.{which}", size) for which in ("first", "second"))
        yield _repetition(first, second, size)


@check(needs=("inspection", "reference", "embeds"))
def prompt_embeddings(evidence: Evidence) -> Iterator[Measurement]:
    """An engine that is given prompts as embeddings of their tokens answers as the reference does for the tokens.

    Usual causes:
        Those of interface.inputs_embeds. If that passes and this fails, the model takes something from
        `input_ids` besides the embedding, or embeds otherwise on a rank of several.
    How to fix:
        Let `embed_input_ids` do all that depends on token ids, and forward only what comes after it.
    Reports:
        #27583
    """
    if not inspection(evidence).takes_embeddings:
        raise NotApplicable("the model's forward has no argument inputs_embeds")
    for size in every_size(evidence, "embeds"):
        trace = rank_zero(evidence, "embeds", size)
        for phase in (Phase.FIRST, Phase.DECODE):
            aligned = with_reference(reference_of(evidence, trace), trace, phase)
            yield from agreement.max_difference(aligned)
            yield from agreement.top_k(aligned, evidence.target.top_k)


@check(needs=("inspection", "deployed"))
def reaches_workers(evidence: Evidence) -> Iterator[Measurement]:
    """The target reaches the processes vLLM spawns: each worker builds this model.

    Usual causes:
        The model is registered in the driver only, in code under `if __name__ == "__main__"`. A spawned
        worker starts from nothing and does not know the architecture.
    How to fix:
        Register with `genmodel.register_model("MyArch", target)`, which reaches every process vLLM
        starts, or from a `vllm.general_plugins` entry point of an installed package.
    Reports:
        #5657 #10238 #16228 #18740
    """
    expected = inspection(evidence).model_class
    for size in every_size(evidence, "deployed"):
        proof = rank_zero(evidence, "deployed", size).proof
        workers = set(proof.worker_pids) - {proof.pid}
        where = row(size)
        yield Measurement(
            what="workers missing",
            where=where,
            measured=max(0, size - len(workers)),
            allowed=0,
            detail=f"{len(workers)} of {size} are processes of their own",
        )
        fresh = proof.start_method in FRESH_START_METHODS
        yield violations("start methods that share memory", () if fresh else (proof.start_method,), where)
        other = () if proof.model_class == expected else (f"{proof.model_class} instead of {expected}",)
        yield violations("other models built by the workers", other, where)


ULPS = 16
"""Roundings of the largest score that two runs of one engine may differ by, where kernels add in no fixed order."""


def _repetition(first: Trace, second: Trace, size: int) -> Measurement:
    """How far scores of the same positions are apart; infinitely where other tokens are among the best."""
    largest, apart, where = 0.0, 0.0, ""
    for one, two in zip(first.continuations, second.continuations, strict=True):
        pairs = zip(one.generated, two.generated, strict=True)
        same = next((i + 1 for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(one.generated))
        found = [_apart(_rows(one.step_scores, same), _rows(two.step_scores, same))]
        if one.prompt_scores is not None and two.prompt_scores is not None:
            found.append(_apart(one.prompt_scores, two.prompt_scores))
        largest = max(largest, float(one.step_scores.values.abs().max()))
        if not max(found) <= apart:  # NaN too
            apart, where = max(found), f"request {one.request.name}"
    eps = float(torch.finfo(getattr(torch, first.proof.dtype)).eps)
    return Measurement(
        what="max |logit of one run - of another|",
        where=row(size),
        measured=apart,
        allowed=ULPS * eps * largest,
        detail=where,
    )


def _rows(scores: Scores, count: int) -> Scores:
    return Scores(first=scores.first, ids=scores.ids[:count], values=scores.values[:count])


def _apart(ours: Scores, theirs: Scores) -> float:
    """Largest difference between the scores of the best tokens; the last ones kept may be others by a tie."""
    best = min(32, (ours.ids.shape[1] + 1) // 2)
    same = ours.ids[:, :best, None] == theirs.ids[:, None, :]
    place = same.to(torch.uint8).argmax(-1)
    difference = (ours.values[:, :best] - theirs.values.gather(1, place)).abs()
    return float(difference.masked_fill(~same.any(-1), math.inf).max())


def _shape(probe: Probe, expected: tuple[int, int]) -> Measurement:
    """One violation unless the call returned a tensor of the expected shape."""
    wrong: tuple[str, ...] = ()
    if probe.error is not None:
        wrong = (f"{probe.call} failed: {probe.error}",)
    elif probe.shape != expected:
        wrong = (f"{probe.call} returned {_as_list(probe.shape)}",)
    return violations(f"results that are not {_as_list(expected)}", wrong)


def _as_list(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else str(list(shape))
