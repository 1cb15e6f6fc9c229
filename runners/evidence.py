"""What comes back from running a model: plain, picklable, savable data. Checks read nothing else.

`genmodel.runners.archive` writes and reads it by these annotations. A field that is added has a default, so that what
was saved before can still be read; for any other change its VERSION goes up.

Shapes: P prompt tokens, G generated tokens, K scored candidates per position, V vocabulary, T tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch  # unpickling brings it in where it is needed

FailureKind = Literal["raised", "died", "timeout", "slow", "abandoned", "unusable", "proof"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a scenario gave no evidence.

    `kind` tells whose fault it is: "raised" (the model or vLLM raised), "died" (a signal or exit),
    "timeout" (it would never have ended), "slow" (the machine's: it ran out of time while it got on),
    "abandoned" (another rank failed first), "unusable" (the target or the options; exit
    code 4) or "proof" (the harness did not get the path the scenario is named for: an error, never a
    verdict on the model).
    """

    kind: FailureKind
    scenario: str
    message: str
    """One line."""
    rank: int | None = None
    phase: str = ""
    """What the host was doing, such as "loading weights"."""
    details: str = ""
    """Several lines: a traceback trimmed to the model's own frames, or the log's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how it is continued; `temperature` 0 is greedy."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The K best-scored token ids of N consecutive positions, best first; K is V for small vocabularies.

    Row i scores the token at position `first + i + 1`, that is, it is computed at position `first + i`.
    """

    first: int
    ids: torch.Tensor
    """[N, K] int64."""
    values: torch.Tensor
    """[N, K] float32, raw logits as `compute_logits` returned them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What one engine made of one request."""

    request: Request
    generated: tuple[int, ...]
    prompt_scores: Scores | None
    """Positions 0 .. P-2: one row per prompt token but the first; None for one-token prompts."""
    step_scores: Scores
    """Positions P-1 .. P+G-2: one row per generated token; row 0 is the end of prefill, the rest decode."""
    cached_tokens: int = 0
    """Prompt tokens vLLM took from its prefix cache."""
    steps: tuple[int, ...] = ()
    """Tokens computed for this request in each scheduler step it took part in; empty if nobody could watch."""
    joined: int = 0
    """Scheduler steps that other requests had already run when this one was first scheduled."""

    @property
    def chunk_boundary(self) -> int | None:
        """The first position of the prompt's second chunk; None if the prompt was computed in one step."""
        if not self.steps or self.cached_tokens + self.steps[0] >= len(self.request.prompt):
            return None
        return self.cached_tokens + self.steps[0]

    @property
    def resumed_at(self) -> int | None:
        """The first position scored after a preemption, whose cache had to be recomputed; None if there was none.

        Once a prompt is computed every step computes one token, but for those that make up for lost cache.
        """
        computed, prompt = self.cached_tokens, len(self.request.prompt)
        for step in self.steps:
            if computed >= prompt and step > 1:
                return computed
            computed += step
        return None

    @property
    def sequence(self) -> tuple[int, ...]:
        """Prompt and generated tokens but the last, which nothing was computed from; the reference's input."""
        return self.request.prompt + self.generated[:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What an engine reports about the path it really took."""

    world_size: int
    tensor_parallel_size: int
    rank: int
    pid: int
    worker_pids: tuple[int, ...]
    """Processes that hold the model: this one for in-process engines."""
    model_class: str
    """Class of the model the workers really built."""
    attention_backend: str
    dtype: str
    executor: str
    eager: bool
    """False where vLLM compiles what it can (`enforce_eager=False`)."""
    start_method: str
    """"in-process" or the multiprocessing start method of the workers."""
    batch_sizes: tuple[int, ...]
    """Most requests running together in each batch of requests handed to `generate`."""
    block_size: int
    compiled_models: int = 0
    """Modules that vLLM compiles (those of classes with its @support_torch_compile), on the rank with the fewest."""
    compiled_graphs: int = 0
    """Graphs that vLLM has compiled for them, or loaded from its cache, likewise."""
    captured_graphs: int = 0
    """CUDA graphs that vLLM has captured, likewise."""
    random_state: int | None = None
    """The seed of PyTorch's random number generators when the first request was handed over."""
    embedded_tokens: int = 0
    """Prompt tokens that reached the model as embeddings, of requests whose token ids the engine never had."""
    stages: tuple[int, ...] = ()
    """Pipeline stage of each of the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Evidence of one generation scenario on one rank."""

    scenario: str
    tensor_parallel_size: int
    rank: int
    continuations: tuple[Continuation, ...]
    weights: str = "initial"
    """Which weights the model held: "initial", or "refit" after they were changed in the running engine."""
    proof: Proof
    modules: dict[str, str] = field(default_factory=dict)
    """As `Precision.modules`, in the engine; only of in-process engines in half precision."""
    inside: dict[str, str] = field(default_factory=dict)
    """As `Precision.inside`, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRun:
    """The reference's logits for every token sequence the engines produced (teacher forced).

    `logits[sequence]` is [T, V] float32, rounded from the higher-precision run. `noise_max` and
    `noise_mean` are [T] float32: the max and mean over V of |tested dtype - higher precision|, the noise
    floor at each position. `turn_max` and `turn_mean` are [T] float32 as well, for sequences in which the model
    makes a choice that rounding could turn, such as a router's between two experts: how far that moves the logits.
    """

    description: str
    """What served as the reference, in words for the report."""
    independent: bool
    """False if the factory's own pure-PyTorch run had to serve."""
    dtype: str
    higher_dtype: str
    logits: dict[tuple[int, ...], torch.Tensor]
    noise_max: dict[tuple[int, ...], torch.Tensor]
    noise_mean: dict[tuple[int, ...], torch.Tensor]
    turn_max: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    turn_mean: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """A parameter as registered in a build."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInfo:
    """One KV-cached attention layer; head counts are the rank's own."""

    module: str
    prefix: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    refused: str = ""
    """Why vLLM cannot file a KV cache under this prefix; empty if it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one method gave when called on `tokens` flattened tokens."""

    call: str
    """As a person would write it, such as "forward(input_ids[7], positions[7])"."""
    shape: tuple[int, ...] | None
    dtype: str | None
    error: str | None = None
    """One line if the call raised or returned no tensor."""
    reads: tuple[str, ...] = ()
    """Names of the parameters it read, of embed_input_ids and compute_logits only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What the target is and what it builds, found without any engine."""

    kind: str
    """"class", "function", "lambda", "callable object" or "vLLM-style class"."""
    signature: str
    model_class: str
    native: bool
    """Whether it builds vLLM's own layers, so that its pure-PyTorch run is an evaluation of those."""
    problems: tuple[str, ...]
    """What is missing of vLLM's interface, one sentence each."""
    vllm_accepts: bool
    """vLLM's own is_text_generation_model on the class it will build."""
    vllm_says: str
    """What vLLM logged about it."""
    parameters: dict[str, ParameterInfo]
    rebuilt_parameters: dict[str, ParameterInfo]
    """Of a second build of the same target and config."""
    unregistered: tuple[str, ...]
    """Tensors and modules found in plain lists, tuples and dicts, where PyTorch does not see them."""
    attention: tuple[AttentionInfo, ...]
    embed: Probe
    forward: Probe
    logits: Probe
    probe_tokens: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    """Longest sequence, in tokens."""
    supports_pipeline: bool
    """Whether the class declares pipeline parallelism (vLLM's SupportsPP)."""
    compiles: bool = False
    """Whether vLLM compiles anything of it: some class in it has vLLM's @support_torch_compile."""
    captures: bool = False
    """Whether vLLM replays any model as CUDA graphs unless it is told to run eagerly: it does on CUDA, not on CPU."""
    ignores_config: bool
    """True if the factory never read its config, so that the geometry was inferred from the model."""
    ties_embeddings: bool | None = None
    """`tie_word_embeddings` in config.json; None if it says nothing."""
    takes_embeddings: bool = False
    """Whether forward has an argument `inputs_embeds`."""
    embeds: Probe | None = None
    """Of forward(inputs_embeds=embed_input_ids(ids)); None if it was not called."""
    embeds_difference: float | None = None
    """Largest |hidden states - those of forward(ids)|, in float32; None if one of the two gave none of that shape."""
    changed_arguments: tuple[str, ...] = ()
    """Tensors that a method was handed and changed in place, such as "positions by forward"."""
    rebuilt_difference: float | None = None
    """Largest |logits - logits of a second build| with the same weights in both, built at another state of the random
    number generators; None if the builds cannot be compared."""
    rebuilt_buffers: tuple[str, ...] = ()
    """Buffers that differ between the two and are in no checkpoint."""
    rebuilt_shared: tuple[str, ...] = ()
    """Parameters of one build that the other has too: one tensor, not two of equal values."""
    notes: tuple[str, ...] = ()
    no_prefix_caching: str = ""
    """Why vLLM turns that off for this model, unasked; empty if it does not."""
    no_chunked_prefill: str = ""
    """The same of chunked prefill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGradient:
    """Gradient of the mean next-token loss with respect to one parameter, in float64."""

    norm: float | None
    """None if backward left no gradient."""
    finite: bool
    analytic: float
    """Directional derivative along a random unit direction, from backward."""
    numeric: float
    """The same by central differences."""
    noise: float
    """How far rounding alone can move `numeric`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In which dtypes the target computes outside any engine, and how large its values are."""

    dtype: str
    """What it was built for, and what its modules' dtypes are to be compared in."""
    modules: dict[str, str]
    """The widest dtype that the values a module gave take to hold, in order of execution; "" is the model itself."""
    inside: dict[str, str] = field(default_factory=dict)
    """The same of what a module computes on the way from the embedded tokens, submodules apart; only of modules that
    call functions of torch whose results show in what they compute."""
    largest: dict[str, float]
    """By module: the largest finite |value| that it was given or gave on the workload's prompts, in float32."""
    declared: str | None
    """The dtype that the model's config names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Two sequences in one packed forward against each alone; [T, hidden] differences, float64."""

    difference: float
    """Largest |packed - alone| over both sequences' hidden states."""
    leak: float
    """Largest |d hidden of one sequence / d embedding of the other|."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivative:
    """Directional derivative of a loss along one direction through several parameters, in float64."""

    analytic: float
    numeric: float
    noise: float
    """As in ParameterGradient."""
    parameters: int
    """How many take part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMode:
    """Derivatives of one and the same pass in training mode, with its dropout masks held fixed, in float64."""

    reason: str = ""
    """Why there are none; else empty."""
    refused: bool = False
    """Whether that is because the model does not take such inputs."""
    derivatives: tuple[Derivative, ...] = ()
    """Along directions that every trainable parameter takes part in."""
    lengths: tuple[int, ...] = ()
    """Tokens of its sequences."""
    loss: float = 0.0
    recording_difference: float = 0.0
    """|loss while autograd records - loss under no_grad|."""


FEW = 8
"""Elements below which a gradient has no direction to speak of: what rounding makes of one number is anything."""

Layout = Literal["alone", "packed", "batch"]
Given = Literal["input_ids", "inputs_embeds", "constant inputs_embeds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstGradient:
    """The gradient of the parameter that is furthest from what it should be, in norms."""

    parameter: str
    error: float
    """Of the difference."""
    norm: float
    """Of what it should be."""
    largest: float
    """Of the largest gradient of any parameter."""
    noise: float = 0.0
    """Of what rounding each operation, and each addition of long sums, changes; 0 in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the model, dropout off, against evaluation of each sequence alone in float64."""

    layout: Layout
    """Each sequence alone, all laid end to end, or [batch, tokens]."""
    given: Given
    """Constants are embeddings that need no gradient; their gradients are not compared."""
    training: bool
    recording: bool
    """Whether autograd records."""
    reason: str = ""
    """Why the model cannot be run so; else empty."""
    difference: float = 0.0
    """|outputs - what they should be| / |what they should be|, of hidden states or of logits."""
    noise: float = 0.0
    """What rounding each operation, and each addition of long sums, makes of it; 0 in float64."""
    gradient: WorstGradient | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """All of them in one dtype."""

    ways: tuple[Way, ...] = ()
    reason: str = ""
    """Why there are none; else empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedGradient:
    """Gradient of one parameter in low precision against that in float64, as norms."""

    norm: float
    """Of the float64 gradient."""
    error: float | None
    """Of the difference; None if backward left no gradient in low precision, or zeros only."""
    noise: float
    """Of what rounding each operation of the float64 model to bfloat16 changes: root mean square of a few draws."""
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LowPrecision:
    """Gradients in bfloat16 or under autocast, of weights that bfloat16 has, with the choices made in float64."""

    reason: str = ""
    """Why there are none; else empty."""
    parameters: dict[str, RoundedGradient] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Evidence of training the model standalone, as its own PyTorch code, at TP=1 in float64."""

    loss: float
    parameters: dict[str, ParameterGradient]
    """Every parameter that requires a gradient."""
    frozen: tuple[str, ...]
    """Names of parameters with requires_grad=False."""
    attention_inputs: dict[str, tuple[float, float, float]]
    """Norms of the gradients reaching q, k and v, by attention module; zeros mean none arrived."""
    future_leak: float | None
    """Largest |d hidden[t] / d embedding[s]| over all s > t; None if no embedding could be tapped."""
    past_reach: float | None
    """Largest |d hidden[t] / d embedding[s]| over all s < t: proof that the tap works."""
    packing: Packing | None
    packing_reason: str
    """Why there is no packing evidence."""
    hidden_scale: float
    """Largest |hidden| of the evaluation run, for relative statements."""
    declares_dropout: bool
    train_eval_difference: float
    """Largest |hidden(train) - hidden(eval)|, or difference of logits; so are the next two."""
    train_train_difference: float
    """The same between two training-mode runs under different seeds."""
    eval_eval_difference: float
    """The same between two evaluation-mode runs under different seeds."""
    losses: tuple[float, ...]
    """Loss before each optimiser step on one batch, and after the last."""
    lengths: tuple[int, ...] = (17, 9)
    """Tokens of the training sequences."""
    unjudged_attention_inputs: dict[str, str] = field(default_factory=dict)
    """Why no gradient has to arrive, by name such as "k of layers.0.attn"."""
    undropped_difference: float | None = None
    """Largest |hidden(train) - hidden(eval)| with torch's dropout turned off; None if training stays random."""
    modes: dict[str, TrainingMode] = field(default_factory=dict)
    """By name: "training" of single sequences, "batch" of [batch, tokens]."""
    low_precision: dict[str, LowPrecision] = field(default_factory=dict)
    """By name: "bfloat16" and "autocast"."""
    ways: Ways = field(default_factory=Ways)
    """In float64, which has no noise to speak of."""
    float32_ways: Ways = field(default_factory=Ways)
    """In float32, the engine's dtype, against float64."""


MOST_DIGITS = 2
"""Loads that the codes of any checkpoint take: each tells 2^23 numbers apart, so two do for 2^46 elements."""

PADDING = 0
CHANGED = -1
UNLOADED = -2
"""What stands in `codes` where no checkpoint element does: a zero, another value, a poison nothing was loaded over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor:
    """One checkpoint tensor in which every element is a number of its own: `first_code` + its flat index.

    Codes begin at 1 and are unique over the whole checkpoint, but for matrices that were equal in the
    original one (a head that repeats the embedding): these share their codes. After loading, each local
    element tells where it came from. There is no limit to their number: those that float32 cannot tell apart are
    loaded digit by digit.
    """

    shape: tuple[int, ...]
    first_code: int


def kind(name: str) -> str:
    """What tensors have in common whose names differ in a number only, such as a layer's or an expert's."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


COMPUTED_TABLE = re.compile(r"\b(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")
"""Tables that older checkpoints carry along, and that models compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Omission:
    """What loading made of a checkpoint without one of its tensors."""

    tensor: str
    refused: str | None
    """What was raised, in one line; None if nothing was."""
    left: tuple[str, ...]
    """Parameters that nothing was loaded into."""
    exempt: bool
    """Whether the tensor belongs to a layer of vLLM's own that vLLM's guard against missing weights skips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """What loading made of a checkpoint in which one tensor has another shape or is of integers."""

    tensor: str
    change: str
    """In words, such as "one longer along dimension 0"."""
    refused: str | None
    """What was raised, in one line; None if nothing was."""
    dimension: int | None = None
    """Along which dimension it is longer; None for other changes."""
    converts: bool = False
    """Whether `copy_` makes it fit: integers become floating-point numbers, one element is repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """What one rank made of the same checkpoint, loaded once more with its tensors in some order."""

    order: str
    """"as before", "reversed" or "shuffled"."""
    refused: str | None
    """What was raised, in one line; None if nothing was."""
    different: tuple[str, ...] = ()
    """Parameters and buffers that hold other elements than after the first load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProbes:
    """How loading takes checkpoints that do not fit the model."""

    unrepeatable: str
    """What a second load of the right checkpoint raised, so that nothing else could be tried; else empty."""
    unknown: str = ""
    """The name of a tensor that the model does not have."""
    unknown_refused: str | None = None
    """What loading it raised, in one line; None if it was taken silently."""
    omissions: tuple[Omission, ...] = ()
    """One per kind of tensor: names that differ in a number only, such as a layer's, are one kind."""
    misfits: tuple[Misfit, ...] = ()
    """Several per kind of tensor, but for what layers of vLLM's own hold: those load what they are given."""
    integers: tuple[str, ...] = ()
    """Kinds of integer tensors of the checkpoint that nothing in the model changes with."""
    untried: int = 0
    """Kinds of tensors that no such checkpoint was tried for: there are too many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAudit:
    """What one rank of vLLM's workers holds after loading the coded checkpoint into a poisoned model."""

    tensor_parallel_size: int
    rank: int
    world_size: int
    """As vLLM counts it: proof of how the model was really sharded."""
    codes: dict[str, torch.Tensor]
    """int32 (int64 beyond its range), of the local shape, by parameter name, and by name of persistent buffers that
    the checkpoint has or that loading changed."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of parameter names that share memory."""
    attention: tuple[AttentionInfo, ...]
    """The KV-cached attention layers of this rank."""
    probes: LoadProbes | None
    """At tensor-parallel size 1 only."""
    reloads: tuple[Reload, ...] = ()
    """The first in the order of the first load; no others if that was refused."""
    buffers: tuple[str, ...] = ()
    """Those of the names in `codes` that are buffers."""
    changed_arguments: tuple[str, ...] = ()
    """Checkpoint tensors that were handed to `load_weights` and are no longer what they were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGradients:
    """Gradients of one rank of a standalone process group, in float64, and where its elements belong.

    At size 1 there is no group, and `codes` and `gradients` are those of the full model.
    """

    tensor_parallel_size: int
    rank: int
    loss: float
    codes: dict[str, torch.Tensor]
    """Of the local shape: see WeightAudit."""
    gradients: dict[str, torch.Tensor | None]
    """float64, of the local shape, of every trainable parameter; None where backward left none."""
    trained: torch.Tensor
    """Hidden states in training mode, of one seed on every rank, [tokens, hidden] float64; or this rank's share."""
    undropped: torch.Tensor | None
    """The same without dropout; None for a model that draws random numbers of its own in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One tensor on its way into or out of one module, by token.

    `module` is "" for the model itself and "compute_logits" for that method.
    """

    module: str
    kind: Literal["input", "output"]
    part: str
    """Which of several tensors: a position or a keyword, such as "0", "2", "cos" or "1.0"."""
    call: int
    """0 unless a forward pass calls the module several times."""
    caller: str | None
    """The module whose own code made the call; None for the model itself."""
    rows: torch.Tensor
    """[N] int64, which rows of `ModuleRecord.rows`."""
    values: torch.Tensor
    """[N, n] float32."""
    columns: torch.Tensor | None = None
    """[n] int64, which of the full tensor's columns this rank holds, where the module declares it; -1 is padding."""
    noise: torch.Tensor | None = None
    """[N] float32, of a reference: its largest error in the tested dtype at each row."""
    name: str = ""
    """The parameter of the module's forward that an input is passed as; empty where there is none of that name."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """The same for the same tensor on all ranks and in the reference."""
        return self.module, self.kind, self.part, self.call


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSequence:
    """The tokens that one request's rows were computed from."""

    request: str
    weights: str
    """As `Trace.weights`."""
    prompt: int
    """Length of the prompt."""
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRecord:
    """What every module of one rank, or of the reference, was given and gave."""

    rank: int
    """Of all of the engine's: the tensor-parallel ranks of a pipeline's first stage come before those of its second."""
    classes: dict[str, str]
    """Class name of every module of the model."""
    sequences: tuple[RecordedSequence, ...]
    rows: torch.Tensor
    """[R, 4] int64: index into `sequences`, position, forward pass, and the first position this pass computed of it."""
    points: tuple[Point, ...]
    """In order of execution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRun:
    """A scenario run once more with every module recorded, next to the reference on the same tokens."""

    scenario: str
    tensor_parallel_size: int
    dtype: str
    ranks: tuple[ModuleRecord, ...]
    reference: ModuleRecord
    """In higher precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """What `--genmodel` named, as reports call it, and how it was run."""

    name: str
    spec: str
    tensor_parallel_sizes: tuple[int, ...]
    dtype: str
    top_k: int
    seed: int
    weights: str
    """Where the weights come from, in words."""
    config: str
    """Where the config comes from, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One command that one host carried out."""

    what: str
    rank: int
    begin: float
    """Seconds since the session began."""
    phases: dict[str, float]
    """Seconds of each part, in order."""


@dataclass(slots=True, kw_only=True)
class Evidence:
    """Everything known about one target; `traces` is keyed (scenario, tensor-parallel size), one trace per rank."""

    target: TargetInfo
    requests: tuple[Request, ...] = ()
    """The workload every engine was given."""
    inspection: Inspection | Failure | None = None
    gradients: Gradients | Failure | None = None
    precision: Precision | Failure | None = None
    reference: ReferenceRun | Failure | None = None
    references: dict[tuple[str, str], ReferenceRun | Failure] = field(default_factory=dict)
    """The same for other weights or dtypes, keyed (`Trace.weights`, `Proof.dtype`)."""
    coded_checkpoint: dict[str, CodedTensor] = field(default_factory=dict)
    uncoded: str = ""
    """Why there is no coded checkpoint, and so no evidence of weights and parallel gradients."""
    weights: dict[int, tuple[WeightAudit, ...] | Failure] = field(default_factory=dict)
    """By tensor-parallel size, 1 always among them; one audit per rank."""
    parallel_gradients: dict[int, tuple[RankGradients, ...] | Failure] = field(default_factory=dict)
    """By tensor-parallel size, 1 always among them; one per rank."""
    traces: dict[tuple[str, int], tuple[Trace, ...] | Failure] = field(default_factory=dict)
    inapplicable: dict[tuple[str, int], str] = field(default_factory=dict)
    """Why a model cannot be run as a scenario asks for, by the keys that `traces` would have."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by phase: import, prepare, engine start, generate, reference, gradients, tear-down."""
    timeline: tuple[Span, ...] = ()
    """What the hosts did, and when."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions: python, torch, vllm, transformers, genmodel, platform, cpu/gpu."""
