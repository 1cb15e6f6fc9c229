"""interface.*: what vLLM asks of a model before it computes anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from genmodel.conformance.access import every_size, inspection, rank_zero
from genmodel.conformance.catalogue import check
from genmodel.conformance.verdict import Measurement, NotApplicable, row, violations
from genmodel.runners.evidence import Evidence, Probe
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
    """Every attention layer has a prefix, and no two share one.

    Usual causes:
        The prefix is left out or not extended by the layer's number. vLLM files KV caches under it: two
        layers with one prefix read each other's cache.
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


@check(needs=("inspection",))
def rebuild(evidence: Evidence) -> Iterator[Measurement]:
    """Two builds of the same target and config give the same parameters: names, shapes, dtypes.

    Usual causes:
        Names or sizes come from a counter, a random choice or a mutable global. Ranks build in separate
        processes, so theirs would differ too.
    How to fix:
        Derive every name and shape from the config alone; a closure must not change what it captures.
    Reports:
        #10327
    """
    found = inspection(evidence)
    once, twice = found.parameters, found.rebuilt_parameters
    different = sorted(name for name in once.keys() | twice.keys() if once.get(name) != twice.get(name))
    yield violations("parameters that differ between two builds", different)


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
