"""deployment.*: what users deploy works, not only what the harness runs."""

from __future__ import annotations

from collections.abc import Iterator

from genmodel.conformance import agreement
from genmodel.conformance.access import every_size, rank_zero, reference
from genmodel.conformance.alignment import Phase, with_reference
from genmodel.conformance.catalogue import check
from genmodel.conformance.verdict import Measurement
from genmodel.runners.evidence import Evidence


@check(needs=("reference", "compiled"))
def compiled(evidence: Evidence) -> Iterator[Measurement]:
    """An engine that compiles what it can (enforce_eager=False, vLLM's default) gives the reference's answers.

    Usual causes:
        A branch on values or on the number of tokens that tracing froze; a shape that was taken for a
        constant; an operation whose compiled version rounds differently, such as a norm in half
        precision.
    How to fix:
        Keep Python branches on tensor values out of forward; mark dynamic dimensions for
        `@support_torch_compile`.
    Reports:
        #36637
    """
    yield from _agrees(evidence, "compiled")


@check(needs=("reference", "pipeline"))
def pipeline(evidence: Evidence) -> Iterator[Measurement]:
    """Split over two pipeline stages, a model that declares SupportsPP gives the reference's answers.

    Each stage has as many tensor-parallel ranks as asked for.

    Usual causes:
        `intermediate_tensors` are ignored or incomplete (the residual is missing, or None); the embedding or
        the last norm runs on the wrong stage; layers are numbered by stage instead of by model.
    How to fix:
        Follow vLLM's `make_layers` and `make_empty_intermediate_tensors`, or do not declare SupportsPP. What a
        stage sends must be tensors, with the names and widths of `make_empty_intermediate_tensors`.
    Reports:
        vllm-ascend#3091 #12038
    """
    yield from _agrees(evidence, "pipeline")


@check(needs=("reference", "deployed"))
def multiprocess(evidence: Evidence) -> Iterator[Measurement]:
    """A default LLM(), with its spawned workers, gives the reference's answers.

    Usual causes:
        If logits.values passes and this fails, the workers build or load something else: another class
        under the same name, a closure whose captured values differ after pickling, an environment
        variable only the driver has.
    How to fix:
        Register by name, `register_model("MyArch", "my_pkg:factory")`, and take all settings from the
        config.
    Reports:
        #5657 #10238 #16228 #18740
    """
    yield from _agrees(evidence, "deployed")


@check(needs=("reference", "deployed_eager"))
def eager(evidence: Evidence) -> Iterator[Measurement]:
    """The same LLM() with enforce_eager=True, which computes each layer as it is written, gives them too.

    Usual causes:
        If deployment.multiprocess passes and this fails, a kernel that vLLM takes only where it does not
        compile is wrong here: eager engines use vLLM's custom operators, compiled ones PyTorch's.
    How to fix:
        Find the operator: `compilation_config={"custom_ops": ["none"]}` turns all of them off, "-name" one.
    Reports:
        #36637
    """
    yield from _agrees(evidence, "deployed_eager")


def _agrees(evidence: Evidence, scenario: str) -> Iterator[Measurement]:
    """Every position of a scenario at every size against the reference, in values and in order."""
    for size in every_size(evidence, scenario):
        trace = rank_zero(evidence, scenario, size)
        for phase in Phase:
            aligned = with_reference(reference(evidence), trace, phase)
            yield from agreement.top_k(aligned, evidence.target.top_k)
            yield from agreement.max_difference(aligned)
            yield from agreement.greedy_rank(aligned)
