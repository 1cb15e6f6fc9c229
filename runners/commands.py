"""What a host can be told to do; each function takes the host's state and returns plain data."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from genmodel import __version__
from genmodel.modeling import _vllm, lookup
from genmodel.modeling.registration import register_model, resolve
from genmodel.modeling.wrapper import InterfaceError, is_vllm_style, placeholder
from genmodel.runners import (
    checkpoint,
    choices,
    coding,
    engine,
    fates,
    gradients,
    hugging_face,
    inspection,
    modules,
    naming,
    parallel_gradients,
    precision,
    standalone,
    teacher_forcing,
    weights_audit,
)
from genmodel.runners.evidence import (
    CodedTensor,
    Gradients,
    Inspection,
    ModuleRecord,
    Precision,
    RankGradients,
    RecordedSequence,
    ReferenceRun,
    Trace,
    WeightAudit,
)
from genmodel.runners.protocol import Spec, Unusable
from genmodel.runners.scenarios import ENGINE_SCENARIOS, IN_PROCESS_OPTIONS, Plan, reads_cache

_vllm.keep_imports_frozen()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class State:
    """What a host keeps between commands."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.phase: Any = None
        self.weights = "initial"
        """Which weights the running engine's model holds."""
        self.recorder: modules.EngineRecorder | None = None
        """Attached to engines that start while there is one."""
        self._targets: dict[str, Any] = {}
        self._engine: Any = None

    def target(self, spec: Spec) -> Any:
        """The target, resolved and registered with vLLM in this process once."""
        if spec.arch not in self._targets:
            if spec.architecture is not None:
                found = _architecture(spec.architecture)
            else:
                found = cloudpickle.loads(spec.pickled) if spec.pickled is not None else _resolve(spec.spec)
            self._targets[spec.arch] = found
        return self._targets[spec.arch]

    def register(self, spec: Spec) -> None:
        """Make vLLM know the target, here and in what this process spawns."""
        _vllm.register_config()
        if spec.architecture is not None:
            return  # every vLLM process knows its own
        register_model(spec.arch, spec.spec if spec.pickled is None else self.target(spec))

    def start_engine(self, spec: Spec, **options: Any) -> Any:
        """Start an engine that `stop_engine` will end."""
        self.register(spec)
        with self.phase("starting the engine"):
            # Engines of other options build the model at another state of the random number generators.
            state = zlib.crc32(f"{spec.seed} {sorted(options.items())}".encode())
            self._engine = _vllm.start_engine(spec.directory, **{"dtype": spec.dtype, "seed": state, **options})
        self.weights = "initial"
        if self.recorder is not None:
            self.recorder.attach(_vllm.runner_of(self._engine))
        return self._engine

    def refit(self, spec: Spec, weights: str) -> None:
        """Change the weights of the running engine as an RL trainer does, and drop what was cached under the old."""
        _vllm.reload_weights(self._engine, str(_weights_of(spec, weights)))
        self.weights = weights

    def stop_engine(self) -> None:
        """End the engine, if one runs."""
        running, self._engine = self._engine, None
        if running is not None:
            with self.phase("ending the engine"):
                _vllm.stop_engine(running)
            fates.forget()


def _resolve(spec: str) -> Any:
    try:
        return resolve(spec)
    except InterfaceError as error:
        raise Unusable(str(error)) from None


def _architecture(name: str) -> Any:
    """vLLM's own model of that name."""
    try:
        return _vllm.architecture(name)
    except KeyError:
        raise Unusable(lookup.no_architecture(name, _vllm.architectures())) from None
    except Exception as error:  # noqa: BLE001 - importing a model may fail in any way
        raise Unusable(f"vLLM's {name} cannot be imported here: {type(error).__name__}: {error}") from None


def _reference_class(spec: Spec, config: dict[str, Any] | None = None) -> Any:
    """What the reference's factory or class is; `config` is the one of the checkpoint unless given."""
    assert spec.reference is not None
    if not hugging_face.names_class(spec.reference):
        return _resolve(spec.reference)
    return hugging_face.resolve(spec.reference, spec.architecture, config)


def introduce(
    state: State, spec: Spec, config: str | None, weights: str | None
) -> tuple[dict[str, Any], str | None, str, dict[str, str]]:
    """Import target and reference and read the config.

    Returns:
        The config, the reference by the name of its class, where the config is from, and versions of everything.
    """
    state.target(spec)
    if spec.names is not None:
        try:
            naming.load(spec.names)
        except naming.Unmapped as error:
            raise Unusable(f"--genmodel-names: {error}") from None
    chosen = spec.reference
    if chosen is None and spec.architecture is not None:
        chosen = hugging_face.twin(spec.architecture)
        if chosen is None:
            raise hugging_face.no_twin(spec.architecture)
    own = None if weights is None else Path(weights) / "config.json"
    source = str(own) if config is None and own is not None and own.is_file() else config
    tiny = source == hugging_face.TINY or (source is None and spec.architecture is not None)
    found = None if tiny else _load_config(source)
    if found is not None:
        _require_known_type(found, source or "")
    independent = None if chosen is None else _reference_class(replace(spec, reference=chosen), found)
    about = config or ("genmodel's tiny default" if weights is None else "beside the weights")
    if tiny and hugging_face.is_class(independent):
        found = hugging_face.tiny_config(independent)
        about = f"tiny, from {hugging_face.config_class(independent).__name__}"
    elif tiny and spec.architecture is not None:
        raise Unusable(
            f"--genmodel-config={hugging_face.TINY}: a small {spec.architecture} is made from the configuration class "
            "of its reference, and this one has none; give a config with --genmodel-config=FILE.json"
        )
    if hugging_face.names_class(chosen):
        chosen = hugging_face.spelt(independent)
    return found or dict(checkpoint.TINY_CONFIG), chosen, about, _environment()


def _environment() -> dict[str, str]:
    """Everything that can change a number."""
    import transformers

    return {
        "genmodel": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "vllm": _vllm.version(),
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": str(len(os.sched_getaffinity(0))),
    }


def prepare(state: State, spec: Spec, config: dict[str, Any], config_from: str, weights: str | None) -> Inspection:
    """Write the checkpoint and inspect the target; the first command of every target, on rank 0.

    `config_from` says in words where the config is from.
    """
    directory = Path(spec.directory)
    with state.phase("inspecting the target"):
        checkpoint.write_config(directory, config, spec.arch, spec.dtype)
        try:
            state.register(spec)
        except InterfaceError:
            if not is_vllm_style(state.target(spec)):
                raise
            # Engines fail for it; the inspection says the same and what else there is.
            _vllm.register(spec.arch, placeholder(state.target(spec), spec.arch))
        try:
            found, geometry = inspection.inspect_target(
                state.target(spec),
                spec.directory,
                spec.arch,
                reads_config=spec.architecture is not None,
                is_reference=spec.reference is None,
            )
        except _vllm.Refused as error:
            raise Unusable(f"vLLM refuses the config ({config_from}): {error}") from None
        if geometry:
            checkpoint.write_config(directory, {**config, **geometry}, spec.arch, spec.dtype)
        if "auto_map" in config:
            note = (
                f"auto_map is not followed: the config is the installed one of model_type {config.get('model_type')!r}"
            )
            found = replace(found, notes=(*found.notes, note))
    with state.phase("making the weights"):
        made, buffers = _make_weights(state, spec) if weights is None or spec.names is not None else ({}, {})
        made = _under_own_names(state, spec, made) | _buffers_of_both(state, spec, buffers)
        if weights is not None:
            source = Path(weights)
            try:
                checkpoint.read_weights(source)
            except ValueError as error:
                raise Unusable(f"--genmodel-weights: {error}") from None
            for path in checkpoint.weight_files(source):
                (directory / path.name).symlink_to(path.resolve())
        else:
            # In the tested dtype, so that the higher-precision reference has the very same weights.
            dtype = DTYPES[spec.dtype]
            checkpoint.save_weights(directory, {name: checkpoint.rounded(t, dtype) for name, t in made.items()})
        checkpoint.save_refit_weights(directory, spec.seed)
    return found


def _make_weights(state: State, spec: Spec) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Adversarial weights and buffers under the reference's names, for what the reference lacks is not there."""
    origin = state.target(spec) if spec.reference is None else _reference_class(spec)
    if hugging_face.is_class(origin):
        return hugging_face.adversarial_checkpoint(origin, Path(spec.directory), spec.seed), {}
    try:
        with standalone.build(origin, _vllm.model_config(spec.directory, "float32"), torch.float32) as built:
            _published_names_only(built.model)
            shapes = standalone.checkpoint_shapes(built.model)
            made = checkpoint.adversarial_weights(built.model, shapes, spec.seed)
            return made, checkpoint.adversarial_buffers(built.model, spec.seed)
    except Unusable:
        raise
    except Exception as error:
        if spec.reference is None:
            raise
        raise Unusable(
            f"--genmodel-reference={spec.reference} does not build: {type(error).__name__}: {error}"
        ) from None


def _published_names_only(model: torch.nn.Module) -> None:
    """Refuse a model whose own names no checkpoint can have: vLLM's experts lie in one tensor and load one by one."""
    experts = next((name for name, module in model.named_modules() if _vllm.is_experts(module)), None)
    if experts is not None:
        raise Unusable(
            f"weights cannot be made for {experts}, which vLLM loads from the names of published checkpoints only: "
            "name a reference that has those names, --genmodel-reference=transformers:NAME, or a checkpoint, "
            "--genmodel-weights=DIRECTORY"
        )


def _buffers_of_both(state: State, spec: Spec, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the reference's persistent buffers that the target has too; others are either side's own business."""
    if spec.reference is None or not theirs:
        return theirs
    if (Path(spec.directory) / naming.FILE).exists():
        return {}
    with standalone.build(state.target(spec), _vllm.model_config(spec.directory, "float32"), torch.float32) as built:
        own = checkpoint.persistent_buffers(built.model)
        return {name: buffer for name, buffer in theirs.items() if name in own and own[name].shape == buffer.shape}


def _under_own_names(state: State, spec: Spec, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reference's checkpoint under the target's own parameter names, by the name map if there is one."""
    if spec.reference is None or not theirs:
        return theirs
    with standalone.build(state.target(spec), _vllm.model_config(spec.directory, "float32"), torch.float32) as built:
        own = standalone.checkpoint_shapes(built.model)
        translates = callable(getattr(built.model, "load_weights", None))
    mostly_alike = 2 * len(own.keys() & theirs.keys()) > len(theirs)
    if spec.names is None and (translates or mostly_alike):
        return theirs  # what is left over is for the model's loading to refuse
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    try:
        translation = naming.translate({} if spec.names is None else naming.load(spec.names), own, shapes)
    except naming.Unmapped as error:
        hint = "--genmodel-names is needed" if spec.names is None else "--genmodel-names"
        raise Unusable(f"{hint}: {error}") from None
    naming.save(Path(spec.directory), translation, shapes)
    return naming.to_own(translation, theirs)


def gradients_of(state: State, spec: Spec) -> Gradients:
    """Train the target standalone, in float64."""
    target = state.target(spec)
    state.register(spec)
    with state.phase("measuring gradients"):
        config = _vllm.model_config(spec.directory, "float32")
        weights = checkpoint.read_weights(Path(spec.directory))
        with standalone.build(target, config, torch.float64) as built:
            standalone.load(built, weights)
            return gradients.measure(built, spec.seed)


def precision_of(state: State, spec: Spec, prompts: Sequence[tuple[int, ...]], declared: Any) -> Precision:
    """In which dtypes the target computes outside any engine, and how large its values become."""
    target = state.target(spec)
    state.register(spec)
    with state.phase("measuring precision"):
        said = None if declared is None else str(declared).removeprefix("torch.")
        return precision.measure(target, spec.directory, prompts, said)


def code_checkpoint(state: State, spec: Spec) -> tuple[dict[str, CodedTensor], str]:
    """Number every element of the checkpoint: (codes, ""), or why that cannot be done: ({}, reason)."""
    with state.phase("coding the checkpoint"):
        try:
            return coding.coded(Path(spec.directory)), ""
        except coding.Uncodable as error:
            return {}, str(error)


def audit_weights(
    state: State,
    spec: Spec,
    codes: Mapping[str, CodedTensor],
    tensor_parallel_size: int,
    probe: bool,
    ports: Sequence[int],
) -> WeightAudit:
    """What this rank of vLLM's workers loads of the coded checkpoint."""
    state.register(spec)
    with state.phase("loading the coded checkpoint"):
        return weights_audit.audit(
            spec.directory,
            codes,
            tensor_parallel_size=tensor_parallel_size,
            rank=state.rank,
            probe=probe,
            meet=lambda digit: _take_rank(state, spec, tensor_parallel_size, ports[digit]),
        )


def parallel_gradients_of(
    state: State, spec: Spec, codes: Mapping[str, CodedTensor], tensor_parallel_size: int, port: int
) -> RankGradients:
    """Train the target standalone as one rank of a group, in float64."""
    target = state.target(spec)
    state.register(spec)
    with state.phase("measuring gradients"):
        return parallel_gradients.measure(
            target,
            spec.directory,
            codes,
            tensor_parallel_size=tensor_parallel_size,
            rank=state.rank,
            rendezvous=f"tcp://{spec.address}:{port}",
            seed=spec.seed,
        )


def _take_rank(state: State, spec: Spec, tensor_parallel_size: int, port: int) -> None:
    """Let vLLM in this process be this rank of so many, as an external launcher would."""
    rank = str(state.rank if tensor_parallel_size > 1 else 0)
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=os.environ.get("GENMODEL_LOCAL_RANK", rank),
        WORLD_SIZE=str(tensor_parallel_size),
        MASTER_ADDR=spec.address,
        MASTER_PORT=str(port),
    )


def generate(
    state: State,
    spec: Spec,
    plan: Plan,
    tensor_parallel_size: int,
    scenarios: Sequence[str],
    options: Mapping[str, Any],
    port: int,
) -> Iterator[tuple[str, list[Trace]]]:
    """Run scenarios through one in-process engine, or through this rank of it; yields (scenario, a trace per pass).

    `options` are the scenarios' own, on top of IN_PROCESS_OPTIONS. Every engine has a rendezvous port of its own: on
    a shared one, a rank that is ahead can meet the addresses of the engine before.
    """
    launcher = {"distributed_executor_backend": "external_launcher"} if tensor_parallel_size > 1 else {}
    chosen = [ENGINE_SCENARIOS[name] for name in scenarios]
    common = {
        "max_model_len": plan.max_model_len,
        "kv_cache_memory_bytes": plan.kv_cache_bytes,
        # Not where no scenario reads it: state-space models take another path with it, which vLLM lacks on CPU.
        "enable_prefix_caching": any(map(reads_cache, chosen)),
    }
    _take_rank(state, spec, tensor_parallel_size, port)
    llm = state.start_engine(
        spec, tensor_parallel_size=tensor_parallel_size, **{**IN_PROCESS_OPTIONS, **common, **launcher, **options}
    )
    for scenario in chosen:
        llm.reset_prefix_cache()  # of the scenario before
        traces: list[Trace] = []
        for through in scenario.passes:
            with state.phase(f"generating ({through.name})"):
                if through.weights:
                    state.refit(spec, through.weights)
                traces.append(engine.trace(llm, through, plan, rank=state.rank, weights=state.weights))
        yield scenario.name, traces
    state.stop_engine()


def deploy(state: State, spec: Spec, plan: Plan, kept_as: str, options: Mapping[str, Any]) -> dict[str, list[Trace]]:
    """What users deploy: `LLM(model, tensor_parallel_size=N)` with the default executor and fresh worker processes.

    `options` are the engine's, such as {"tensor_parallel_size": 2}.
    """
    with _deployed(state, spec, plan, options) as llm:
        return {kept_as: [_generate_deployed(state, llm, plan, kept_as)]}


@contextlib.contextmanager
def _deployed(state: State, spec: Spec, plan: Plan, options: Mapping[str, Any]) -> Iterator[Any]:
    """A default engine."""
    changes: dict[str, str | None] = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    with engine.environment({**changes, **engine.DEPLOYED_ENVIRONMENT}):
        llm = state.start_engine(spec, kv_cache_memory_bytes=plan.deployed_kv_cache_bytes, **options)
        if options.get("pipeline_parallel_size", 1) > 1:
            llm.collective_rpc(_vllm.watch_stage)
        yield llm
        state.stop_engine()


def _generate_deployed(state: State, llm: Any, plan: Plan, kept_as: str) -> Trace:
    through = replace(ENGINE_SCENARIOS["plain"].passes[0], name=kept_as)
    with state.phase(f"generating ({kept_as})"):
        return engine.trace(llm, through, plan, rank=0, in_process=False)


def reference(state: State, spec: Spec, sequences: Sequence[tuple[int, ...]], weights: str, dtype: str) -> ReferenceRun:
    """Teacher-force the reference on token sequences, in the tested dtype and in a higher precision."""
    independent = spec.reference is not None
    target = _reference_class(spec) if spec.reference is not None else state.target(spec)
    state.register(spec)
    rounded = _reference_weights(spec, weights, DTYPES[dtype])
    higher = _higher(dtype)

    @contextlib.contextmanager
    def built_in(computed: str) -> Iterator[standalone.Standalone]:
        config = _vllm.model_config(spec.directory, "float32")
        with standalone.build(target, config, DTYPES[computed]) as built, torch.no_grad():
            standalone.load(built, rounded)
            yield built

    with state.phase("running the reference"):
        with built_in(higher) as built:
            exact = teacher_forcing.run(built, sequences)
            moved = teacher_forcing.with_moved_weights(built, exact, DTYPES[dtype])
        with built_in(dtype) as built:
            tested = teacher_forcing.run(built, sequences, like=exact)
            free = teacher_forcing.run(built, sequences) if any(exact.made) else tested
        noise = teacher_forcing.noise_floors(tested, exact, moved)
        ties = choices.near_ties(tested.made, exact.made, [run.made for run in moved])
        turns: teacher_forcing.LargestAndMean = {}
        if any(ties):
            with built_in(higher) as built:
                turns = teacher_forcing.turns(built, exact, ties, noise, free)
    own = "its vLLM layers evaluated by plain PyTorch" if built.native else "run as plain PyTorch outside vLLM"
    return ReferenceRun(
        description=_describe_reference(spec)
        if spec.reference is not None
        else f"NOT INDEPENDENT: the target itself, {own}; a mistake in the model's own mathematics is on both sides",
        independent=independent,
        dtype=dtype,
        higher_dtype=higher,
        logits={s: logits.float() for s, logits in exact.logits.items()},
        noise_max={s: both[0].float() for s, both in noise.items()},
        noise_mean={s: both[1].float() for s, both in noise.items()},
        turn_max={s: both[0].float() for s, both in turns.items()},
        turn_mean={s: both[1].float() for s, both in turns.items()},
    )


def _describe_reference(spec: Spec) -> str:
    """How reports call an independent reference."""
    about = f" ({hugging_face.about()})" if hugging_face.names_class(spec.reference) else ""
    return f"independent: {spec.reference}{about}"


_RECORDABLE: dict[str, str | None] = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""The recorder reads the batches of the first of vLLM's two model runners."""


def record_modules(
    state: State,
    spec: Spec,
    plan: Plan,
    tensor_parallel_size: int,
    recorded: str,
    options: Mapping[str, Any],
    port: int,
    positions: Mapping[tuple[int, ...], frozenset[int]],
) -> tuple[str, ModuleRecord]:
    """Run a scenario once more on this rank and keep what every module did: (dtype, record)."""
    recorder = state.recorder = modules.EngineRecorder(positions)
    try:
        with engine.environment(_RECORDABLE):
            made = dict(generate(state, spec, plan, tensor_parallel_size, [recorded], options, port))
    finally:
        state.recorder = None
    return made[recorded][0].proof.dtype, recorder.record(made[recorded], state.rank)


def record_deployed(
    state: State,
    spec: Spec,
    plan: Plan,
    recorded: str,
    options: Mapping[str, Any],
    positions: Mapping[tuple[int, ...], frozenset[int]],
) -> tuple[str, list[ModuleRecord]]:
    """The same of every worker of a default engine, an eager one: what is compiled calls no hooks."""
    with (
        engine.environment(_RECORDABLE),
        _deployed(state, spec, plan, {**options, "enforce_eager": True}) as llm,
    ):
        engine.ask_workers(llm, modules.record_worker, positions)
        found = _generate_deployed(state, llm, plan, recorded)
        records: list[ModuleRecord] = engine.ask_workers(llm, modules.worker_record, [found])
    return found.proof.dtype, records


def reference_modules(
    state: State, spec: Spec, sequences: Sequence[RecordedSequence], positions: Sequence[frozenset[int]], dtype: str
) -> ModuleRecord:
    """The same of the reference, teacher-forced on `sequences` in both precisions, at `positions` of each."""
    target = _reference_class(spec) if spec.reference is not None else state.target(spec)
    state.register(spec)
    records: list[ModuleRecord] = []
    with state.phase("recording the reference"):
        for computed in (dtype, _higher(dtype)):
            parts = [
                _record_reference(spec, target, weights, sequences, positions, (dtype, computed))
                for weights in dict.fromkeys(sequence.weights for sequence in sequences)
            ]
            records.append(modules.one_after_another(parts))
    tested, higher = records
    found = replace(higher, points=modules.with_noise(tested.points, higher.points))
    return hugging_face.comparable(found) if hugging_face.is_class(target) else found


def _record_reference(
    spec: Spec,
    target: Any,
    weights: str,
    sequences: Sequence[RecordedSequence],
    positions: Sequence[frozenset[int]],
    dtypes: tuple[str, str],
) -> ModuleRecord:
    """The sequences of one set of weights, which are rounded to the first dtype, computed in the second."""
    tested, computed = (DTYPES[name] for name in dtypes)
    rounded = _reference_weights(spec, weights, tested)
    config = _vllm.model_config(spec.directory, "float32")
    with standalone.build(target, config, computed) as built, torch.no_grad():
        standalone.load(built, rounded)
        recorder = modules.Recorder(built.model)
        for number, (sequence, kept) in enumerate(zip(sequences, positions, strict=True)):
            if sequence.weights == weights:
                modules.begin_sequence(recorder, number, len(sequence.tokens), kept)
                built.logits(torch.tensor(sequence.tokens))
    return ModuleRecord(
        rank=0, classes=recorder.classes, sequences=tuple(sequences), rows=recorder.rows, points=recorder.points()
    )


def _reference_weights(spec: Spec, weights: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The "initial" or "refit" checkpoint, rounded, under the reference's names."""
    found = checkpoint.read_weights(_weights_of(spec, weights))
    rounded = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in found.items()}
    return naming.for_reference(Path(spec.directory), rounded)


def _higher(dtype: str) -> str:
    return "float64" if dtype == "float32" else "float32"


def _weights_of(spec: Spec, weights: str) -> Path:
    """The directory of "initial" or "refit" weights."""
    return Path(spec.directory) if weights == "initial" else Path(spec.directory) / weights


def _load_config(source: str | None) -> dict[str, Any]:
    """The configuration `--genmodel-config` names; genmodel's own tiny one for None."""
    if source is None:
        return dict(checkpoint.TINY_CONFIG)
    if not source.endswith(".json"):
        return _config_object(source)
    path = Path(source)
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise Unusable(f"--genmodel-config={source} is not a file")
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise Unusable(f"--genmodel-config={source}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"--genmodel-config={source} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Unusable(f"--genmodel-config={source} holds a {type(found).__name__}, not an object with named settings")
    return found


def _require_known_type(config: Mapping[str, Any], source: str) -> None:
    """Configs are read by transformers and vLLM, here and in every process that vLLM starts."""
    kind = config.get("model_type")
    if kind is None or _vllm.knows_model_type(kind):
        return
    remote = " (its auto_map asks for code of its own, which is not run)" if "auto_map" in config else ""
    raise Unusable(
        f"--genmodel-config={source}: neither transformers nor vLLM knows model_type {kind!r}{remote}: import what "
        "registers it from the target's module, or leave model_type out, and every setting is an attribute of hf_config"
    )


def _config_object(source: str) -> dict[str, Any]:
    module_name, colon, attribute = source.partition(":")
    if not colon:
        raise Unusable(f"--genmodel-config={source} is neither a .json file, my_pkg.my_module:attribute nor tiny")
    try:
        found: Any = resolve(f"{module_name}:{attribute}", callable_only=False)
    except InterfaceError as error:
        raise Unusable(f"--genmodel-config: {error}") from None
    if callable(found) and not hasattr(found, "to_dict"):
        found = found()
    if hasattr(found, "to_dict"):
        found = found.to_dict()
    if not isinstance(found, dict):
        raise Unusable(f"--genmodel-config={source} is a {type(found).__name__}, not a dict or a Hugging Face config")
    return found
