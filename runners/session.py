"""One session of hosts that turns targets into evidence."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import cloudpickle

from genmodel.modeling import lookup
from genmodel.runners import machine
from genmodel.runners.evidence import (
    MOST_DIGITS,
    Evidence,
    Failure,
    FailureKind,
    Inspection,
    ModuleRecord,
    ModuleRun,
    Span,
    TargetInfo,
    Trace,
    WeightAudit,
)
from genmodel.runners.pool import Job, Pool, Result
from genmodel.runners.protocol import Command, Spec
from genmodel.runners.ray_pool import NoCluster, RayJob, RayPool
from genmodel.runners.recorded import recorded_positions
from genmodel.runners.scenarios import (
    DEPLOYMENTS,
    ENGINE_SCENARIOS,
    SCENARIOS,
    Asked,
    Deployment,
    Plan,
    Scenario,
    engines,
    plan,
)

DEADLINE = 120.0
"""Seconds any one phase of a scenario may take; the slowest, starting a default engine, takes about 30 on two cores."""
SECONDS_PER_PARAMETER = 5e-7
"""What a model adds to that: the double-precision reference computes at about 1e10 parameters x tokens a second."""
TOO_MANY_TIMEOUTS = 2
"""After so many scenarios of one tensor-parallel size ran out of time, the others of that size are not begun."""

_OF_MODULE = re.compile(r"[\w.]+:[\w.]+")
"""module:attr, rather than a file or an architecture's name."""

HOST_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine cores in the hosts' own processes
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # TP=2 on one NUMA node is refused otherwise
    "VLLM_HOST_IP": "127.0.0.1",
    "TRITON_F32_DEFAULT": "ieee",  # its kernels, vLLM's float32 attention among them, else multiply in TF32
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class UnusableTarget(Exception):
    """The target or its options cannot be used; the message is one line that says what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetOptions:
    """What an author asks for, compared by identity; fields are the `--genmodel-*` options of the same name."""

    spec: str
    config: str | None = None
    """A JSON file, "module:attr" (a dict, a Hugging Face config, or a function returning either), or "tiny"."""
    reference: str | None = None
    """ "module:attr" of an independent factory, or a class "transformers:NAME".

    None means the factory itself outside vLLM, and for one of vLLM's own architectures transformers' class.
    """
    names: str | Mapping[str, Any] | None = None
    """A TOML file, "module:attr" or a dict: the model's parameter names with the reference's, see `naming`."""
    weights: Path | None = None
    """A directory with safetensors; None means seeded adversarial weights."""
    tensor_parallel_sizes: tuple[int, ...] = (1, 2)
    dtype: str = "float32"
    top_k: int = 10
    seed: int = 0
    pool: str = "local"
    """Where the hosts run: "local" or "ray", the same for all targets of a session."""
    timeout: float | None = None
    """Seconds that any one phase of a scenario may take, such as starting an engine or one generation.

    None means DEADLINE, and SECONDS_PER_PARAMETER more, as often as this machine is slower than the measured one.
    """
    target: object = None
    """The factory itself, for callers in Python that have no "module:attr"; None means `spec` names it."""


class Session:
    """Host processes started once and shared by every target; a context manager.

    Args:
        options: the targets; the largest tensor-parallel size among them is the number of hosts.
        progress: called with one line whenever something slow begins.
        share: the part of the machine's cores and devices that is this session's.


    Raises:
        UnusableTarget: (from any method) for a user's mistake, such as a missing vLLM, and for a full disk.
    """

    def __init__(
        self,
        options: Collection[TargetOptions],
        progress: Callable[[str], None] = lambda line: None,
        share: machine.Share = machine.Share(),  # noqa: B008 - a constant
    ) -> None:
        self._share = share
        self._many = len(options) > 1
        self._kind = next((o.pool for o in options), "local")
        self._size = max((max(o.tensor_parallel_sizes) for o in options), default=1)
        self._progress = progress
        self._slowness = 1.0
        """Of the machine: how often its deadlines go into those of a fast one."""
        self._pool: Pool | RayPool | None = None
        self._targets: dict[TargetOptions, _Target] = {}
        self._count = 0
        self._begun = time.perf_counter()

    def start(self) -> None:
        """Start importing in the hosts and return at once; does nothing if they run.

        Raises:
            UnusableTarget: if a tensor-parallel size is larger than the machine has devices for.
        """
        if self._pool is not None:
            return
        self._slowness = machine.slowness()
        with _room_needed():
            self._pool = self._made_pool()
            self._pool.start()

    def _made_pool(self) -> Pool | RayPool:
        try:
            if self._kind == "ray":
                return RayPool(self._size, {**HOST_ENVIRONMENT, "OMP_NUM_THREADS": "1"})
            machine.require()
            return Pool(self._size, {**HOST_ENVIRONMENT, **machine.environment(self._size, self._share)})
        except (machine.TooSmall, NoCluster) as error:
            raise UnusableTarget(str(error)) from None

    def mistake(self, options: TargetOptions) -> str | None:
        """One line about a name that cannot be meant, where that can be told at once: nothing is imported for it."""
        if options.pool != "local" or options.target is not None:
            return None
        named = {"": options.spec, "config": options.config, "reference": options.reference, "names": options.names}
        for option, name in named.items():
            if isinstance(name, str) and _OF_MODULE.fullmatch(name) and (found := lookup.mistake(name)) is not None:
                return f"--genmodel-{option}: {found}" if option else found
        return None if ":" in options.spec else lookup.unknown_architecture(options.spec)

    def resolve(self, options: TargetOptions) -> TargetInfo:
        """Import the target in a host.

        Raises:
            UnusableTarget: if that fails for a reason that is not in the model.
        """
        return self._target(options).evidence.target

    def collect(self, options: TargetOptions, scenarios: Collection[str] = SCENARIOS) -> Evidence:
        """Run what is named (and what that needs) and return the evidence; cached per target."""
        target = self._target(options)
        with _room_needed():
            target.collect(set(scenarios))
        return target.evidence

    def diagnose(
        self, options: TargetOptions, scenario: str, size: int, focus: tuple[str, int] | None = None
    ) -> ModuleRun | Failure:
        """Run a scenario once more, recording every module on every rank and in the reference.

        What comes back is tens of megabytes, and is not kept here.

        Args:
            options: the target.
            scenario: one of ENGINE_SCENARIOS.
            size: tensor-parallel size.
            focus: a request's name and a position known to be wrong, to be recorded even where not all of it can be.
        """
        with _room_needed():
            return self._target(options).diagnose(scenario, size, focus)

    def close(self) -> None:
        """End the hosts; leaves no process behind."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _target(self, options: TargetOptions) -> _Target:
        self.start()
        assert self._pool is not None
        if options not in self._targets:
            self._count += 1
            with _room_needed():
                self._targets[options] = _Target(
                    self._pool,
                    options,
                    self._count,
                    lambda line: self._say(options.spec, line),
                    self._begun,
                    self._slowness,
                )
        return self._targets[options]

    def _say(self, name: str, line: str) -> None:
        about = f"{name}: " if self._many else ""
        self._progress(f"[{time.perf_counter() - self._begun:5.1f} s] {about}{line}")


class _Target:
    """One target in a session: its checkpoint, and the evidence so far."""

    def __init__(
        self,
        pool: Pool | RayPool,
        options: TargetOptions,
        number: int,
        say: Callable[[str], None],
        begun: float,
        slowness: float,
    ) -> None:
        self._slowness = slowness
        self._deadline = options.timeout or DEADLINE * slowness
        self._timeouts: Counter[int] = Counter()
        """Engine scenarios that ran out of time, by tensor-parallel size."""
        self._commands = itertools.count()
        self._backends: dict[str, str] = {}
        """The attention backend of the first engine that had one, by dtype: CUDA's fastest knows no float32."""
        self._slow = False
        """Whether the machine is to blame for one of these."""
        self._pool = pool
        self._options = options
        self._say = say
        self._done: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._begun = begun
        self._timeline: list[Span] = []
        directory = pool.directory / f"target{number}"
        pool.directory.mkdir(0o700, exist_ok=True)  # a model can have removed it
        directory.mkdir()
        own = "Genmodel_" + re.sub(r"\W+", "_", options.spec)
        self._spec = Spec(
            arch=f"{own}_{number}" if options.target is not None or ":" in options.spec else options.spec,
            spec=options.spec,
            pickled=None if options.target is None else cloudpickle.dumps(options.target),
            directory=str(directory),
            dtype=options.dtype,
            seed=options.seed,
            reference=options.reference,
            names=options.names,
            address=pool.address,
        )
        say("importing torch, vLLM and the target")
        self._weights = None if options.weights is None else str(options.weights.resolve())
        self._config, reference, about, environment = self._ask(
            "introduce", "import", usable=True, process=_FIRST, config=options.config, weights=self._weights
        )
        self._spec = replace(self._spec, reference=reference)
        self.evidence = Evidence(
            target=TargetInfo(
                name=options.spec,
                spec=options.spec,
                tensor_parallel_sizes=options.tensor_parallel_sizes,
                dtype=options.dtype,
                top_k=options.top_k,
                seed=options.seed,
                weights=f"seeded adversarial weights (seed {options.seed})"
                if options.weights is None
                else str(options.weights),
                config=about,
            ),
            seconds=self._seconds,
            environment=environment,
        )
        self._spent("import", pool.import_seconds)

    def collect(self, scenarios: set[str]) -> None:
        """Bring the evidence of these scenarios about, each at most once."""
        wanted = scenarios - self._done
        self._done |= wanted
        if not wanted:
            return
        if self.evidence.inspection is None:
            self._inspect()
        inspection = self.evidence.inspection
        if isinstance(inspection, Failure):
            self._blame(inspection, wanted)
            return
        assert inspection is not None
        if self._options.timeout is None:
            self._deadline = (DEADLINE + SECONDS_PER_PARAMETER * _parameters(inspection)) * self._slowness
        drafted = plan(inspection, self._options.seed)
        self.evidence.requests = drafted.requests
        self._run(inspection, drafted, wanted)
        if "reference" in self._done and wanted & {"reference", *DEPLOYMENTS, *ENGINE_SCENARIOS}:
            self._refer(drafted)
        self.evidence.timeline = tuple(self._timeline)

    def diagnose(self, scenario: str, size: int, focus: tuple[str, int] | None) -> ModuleRun | Failure:
        """Every module of one scenario, on every rank and in the reference."""
        inspection = self.evidence.inspection
        if inspection is None or isinstance(inspection, Failure):
            return inspection or Failure(kind="proof", scenario=scenario, message="the model was not inspected")
        self._say(f"diagnosis: {scenario} at TP={size} once more, recording every module")
        drafted = plan(inspection, self._options.seed)
        positions = recorded_positions(inspection, drafted, scenario, focus)
        recorded = self._record(scenario, size, drafted, positions)
        if isinstance(recorded, Failure):
            return recorded
        dtype, ranks = recorded
        # Ranks that disagree may have generated different tokens.
        made = {(s.weights, s.tokens): s for record in ranks for s in record.sequences}
        sequences = list(made.values())
        kept = [positions.get(s.tokens[: s.prompt], frozenset()) for s in sequences]
        reference = self._ask("reference_modules", "reference", sequences=sequences, positions=kept, dtype=dtype)
        if isinstance(reference, Failure):
            return reference
        return ModuleRun(scenario=scenario, tensor_parallel_size=size, dtype=dtype, ranks=ranks, reference=reference)

    def _record(
        self, scenario: str, size: int, drafted: Plan, positions: Mapping[tuple[int, ...], frozenset[int]]
    ) -> tuple[str, tuple[ModuleRecord, ...]] | Failure:
        """A scenario once more: its dtype, and what every rank recorded."""
        asked: dict[str, Any] = {"plan": drafted, "recorded": scenario, "positions": positions}
        if deployment := DEPLOYMENTS.get(scenario):
            found = self._ask("record_deployed", scenario, options=_deployed_options(deployment, size), **asked)
            return found if isinstance(found, Failure) else (found[0], tuple(found[1]))
        command = self._command(
            "record_modules",
            scenario,
            tensor_parallel_size=size,
            options=dict(ENGINE_SCENARIOS[scenario].options(drafted)),
            port=self._pool.free_ports(1)[0],
            **asked,
        )
        results = self._wait(self._pool.begin(command, range(size)), f"diagnosis of TP={size}")
        if (failure := _first_failure(results)) is not None:
            return failure
        dtypes, ranks = zip(*(results[rank].value for rank in sorted(results)), strict=True)
        return dtypes[0], ranks

    def _inspect(self) -> None:
        self._say("building and inspecting the model, making its checkpoint")
        about = self.evidence.target.config
        self.evidence.inspection = self._ask(
            "prepare",
            "inspection",
            process=_FIRST,
            config=self._config,
            config_from=about,
            weights=self._weights,
        )

    def _blame(self, failure: Failure, scenarios: set[str]) -> None:
        """Every scenario of a model that does not build fails for that reason."""
        sizes = self._options.tensor_parallel_sizes
        for name in scenarios - {"inspection"}:
            why = replace(failure, scenario=name)
            if name in ("gradients", "precision", "reference"):
                setattr(self.evidence, name, why)
            elif name in ("weights", "parallel_gradients"):
                getattr(self.evidence, name).update(dict.fromkeys({1, *sizes}, why))
            else:
                self.evidence.traces.update({(key, size): why for key in _pass_names(name) for size in sizes})

    def _run(self, inspection: Inspection, drafted: Plan, wanted: set[str]) -> None:
        """Everything but the reference, in an order that keeps all ranks busy."""
        names = self._applicable(inspection, wanted)
        scenarios = [name for name in ENGINE_SCENARIOS if name in names]
        sizes = self._options.tensor_parallel_sizes
        to_deploy = [
            (deployment, size)
            for name, deployment in DEPLOYMENTS.items()
            for size in sorted(sizes, reverse=True)
            if name in names and (name, size) not in self.evidence.inapplicable
        ]
        # The last rank is idle until the first engine that needs all of them.
        first = self._deploy(drafted, *to_deploy[0], self._pool.size - 1) if to_deploy and self._pool.size > 1 else None
        if scenarios and 1 in sizes:
            self._generate(inspection, drafted, 1, scenarios)
        self._run_alone(inspection, drafted, wanted)
        self._compare_ranks(1, inspection, wanted)
        for deployment, size in to_deploy:
            job = first or self._deploy(drafted, deployment, size, 0)
            first = None
            (result,) = self._wait(job, f"{deployment.name} at TP={size}").values()
            name = deployment.name
            self._keep(inspection, name, size, result.failure or [result.value[name]])
        for size in sizes:
            if scenarios and size > 1:
                self._generate(inspection, drafted, size, scenarios)
            if size > 1:
                self._compare_ranks(size, inspection, wanted)

    def _applicable(self, inspection: Inspection, wanted: set[str]) -> set[str]:
        """Those of the scenarios that a model like this can be run in; why not is evidence."""
        known: dict[str, Scenario | Deployment] = {**ENGINE_SCENARIOS, **DEPLOYMENTS}
        reasons = {
            name: reason
            for name, scenario in known.items()
            if name in wanted and (reason := scenario.inapplicable(inspection))
        }
        for name, reason in reasons.items():
            keys = [(key, size) for key in _pass_names(name) for size in self._options.tensor_parallel_sizes]
            self.evidence.inapplicable.update(dict.fromkeys(keys, reason))
        for size in self._options.tensor_parallel_sizes:
            for name in wanted & DEPLOYMENTS.keys() - reasons.keys():
                if (ranks := size * DEPLOYMENTS[name].stages) > self._pool.deployable:
                    elsewhere = f"a default engine of {ranks} ranks needs a node with {ranks} devices"
                    self.evidence.inapplicable[name, size] = elsewhere
        return wanted - reasons.keys()

    def _run_alone(self, inspection: Inspection, drafted: Plan, wanted: set[str]) -> None:
        """What the model does outside any engine, but as a reference."""
        if "gradients" in wanted and not inspection.native:
            self._say("standalone training: gradients in float64")
            self.evidence.gradients = self._ask("gradients_of", "gradients")
        if "precision" in wanted and not inspection.native:
            self._say("standalone in bfloat16: the dtype that each module computes in")
            prompts = [request.prompt for request in drafted.requests]
            declared = self._config.get("dtype") or self._config.get("torch_dtype")
            self.evidence.precision = self._ask("precision_of", "precision", prompts=prompts, declared=declared)

    def _compare_ranks(self, size: int, inspection: Inspection, wanted: set[str]) -> None:
        """What needs the coded checkpoint; at TP=1 also where that was not asked for, to compare ranks with."""
        audited = "weights" in wanted
        trained = "parallel_gradients" in wanted and not inspection.native
        if not (audited or trained):
            return
        if not self.evidence.coded_checkpoint and not self.evidence.uncoded:
            found = self._ask("code_checkpoint", "weights")
            if isinstance(found, Failure):
                self._blame(found, wanted & {"weights", "parallel_gradients"})
                return
            self.evidence.coded_checkpoint, self.evidence.uncoded = found
        codes = self.evidence.coded_checkpoint
        if audited and codes:
            self._say(f"vLLM at TP={size}: loading a checkpoint in which every element has its number")
            ports = self._pool.free_ports(MOST_DIGITS)
            audits = self._on_ranks("audit_weights", "weights", size, codes=codes, probe=size == 1, ports=ports)
            self.evidence.weights[size] = _proven(audits, size)
        if trained and codes:
            self._say(f"standalone training at TP={size}: gradients of every rank")
            ranks = self._on_ranks(
                "parallel_gradients_of", "parallel_gradients", size, codes=codes, port=self._pool.free_ports(1)[0]
            )
            self.evidence.parallel_gradients[size] = ranks

    def _on_ranks(self, name: str, scenario: str, size: int, **arguments: Any) -> Any:
        """Every rank's answer, or the one Failure."""
        command = self._command(name, scenario, tensor_parallel_size=size, **arguments)
        results = self._wait(self._pool.begin(command, range(size)), f"{scenario} at TP={size}")
        return _first_failure(results) or tuple(results[rank].value for rank in sorted(results))

    def _generate(self, inspection: Inspection, drafted: Plan, size: int, names: list[str]) -> None:
        """Run scenarios in as few engines as they need, each in a fresh process of every rank."""
        self._say(f"vLLM at TP={size}: {', '.join(names)}")
        for together in engines(names, drafted):
            self._run_engine(inspection, drafted, size, together)

    def _run_engine(self, inspection: Inspection, drafted: Plan, size: int, names: list[str]) -> None:
        """Run the scenarios of one engine; when one fails, those after it go on in another."""
        if self._timeouts[size] >= TOO_MANY_TIMEOUTS:
            message = f"not run, after {self._timeouts[size]} other scenarios at TP={size} ran out of time"
            kind: FailureKind = "slow" if self._slow else "timeout"
            for name in names:
                self._keep(inspection, name, size, Failure(kind=kind, scenario=name, message=message))
            return
        command = self._command(
            "generate",
            names[0],
            plan=drafted,
            tensor_parallel_size=size,
            scenarios=names,
            options=dict(ENGINE_SCENARIOS[names[0]].options(drafted)),
            port=self._pool.free_ports(1)[0],
        )
        results = self._wait(self._pool.begin(command, range(size)), f"TP={size}")
        done = [name for name in names if all(name in result.value for result in results.values())]
        for name in done:
            self._keep(inspection, name, size, [results[rank].value[name] for rank in sorted(results)])
        failure = _first_failure(results)
        if failure is None or len(done) == len(names):
            return
        failed, *others = names[len(done) :]
        self._keep(inspection, failed, size, failure)
        self._timeouts[size] += failure.kind in _OUT_OF_TIME
        self._slow |= failure.kind == "slow"
        if others:
            self._run_engine(inspection, drafted, size, others)

    def _deploy(self, drafted: Plan, deployment: Deployment, size: int, rank: int) -> Job | RayJob:
        self._say(f"vLLM as deployed: {deployment.about.format(size=size)}, default executor and options")
        options = _deployed_options(deployment, size)
        command = self._command("deploy", deployment.name, plan=drafted, kept_as=deployment.name, options=options)
        return self._pool.begin(command, [rank])

    def _keep(self, inspection: Inspection, name: str, size: int, found: list[list[Trace]] | Failure) -> None:
        """Keep every rank's traces of a scenario, by pass, or the one reason why there are none."""
        if not isinstance(found, Failure):
            scenario = ENGINE_SCENARIOS.get(name) or DEPLOYMENTS[name]
            dtype = _dtype_of(name, self._options.dtype)
            asked = Asked(
                inspection=inspection,
                dtype=dtype,
                tensor_parallel_size=size,
                backend=self._backends.get(dtype, ""),
            )
            lacking = next((reason for traces in found if (reason := scenario.unproven(traces, asked))), "")
            if not lacking:
                self._backends[dtype] = asked.backend or found[0][0].proof.attention_backend
                for traces in zip(*found, strict=True):
                    self.evidence.traces[traces[0].scenario, size] = traces
                return
            said = f"{name} at TP={size} did not take its path: {lacking}"
            found = Failure(kind="proof", scenario=name, message=said)
        for key in _pass_names(name):
            self.evidence.traces[key, size] = replace(found, scenario=name)

    def _refer(self, drafted: Plan) -> None:
        """Run the reference on what the engines generated: once for every pair of weights and dtype."""
        wanted: dict[tuple[str, str], set[tuple[int, ...]]] = {("initial", self._options.dtype): set()}
        for found in self.evidence.traces.values():
            for trace in () if isinstance(found, Failure) else found:
                sequences = wanted.setdefault((trace.weights, trace.proof.dtype), set())
                sequences.update(c.sequence for c in trace.continuations)
        for (weights, dtype), sequences in wanted.items():
            chosen = sorted(sequences) or sorted({request.prompt for request in drafted.requests})
            about = "" if weights == "initial" else f" with {weights} weights"
            self._say(f"reference in {dtype} and in higher precision{about} over {len(chosen)} sequences")
            found = self._ask("reference", "reference", sequences=chosen, weights=weights, dtype=dtype)
            self.evidence.references[weights, dtype] = found
        self.evidence.reference = self.evidence.references["initial", self._options.dtype]

    def _command(self, name: str, scenario: str, process: str = "", **arguments: Any) -> Command:
        """A command for a process of its own, or for one that commands share by its name."""
        return Command(
            name=name,
            scenario=scenario,
            process=f"{self._spec.directory} {process or next(self._commands)}",
            arguments={"spec": self._spec, **arguments},
        )

    def _ask(self, name: str, scenario: str, *, usable: bool = False, process: str = "", **arguments: Any) -> Any:
        """Rank 0's answer or Failure; if `usable`, a Failure is the user's mistake."""
        command = self._command(name, scenario, process, **arguments)
        result = self._wait(self._pool.begin(command, [0]), scenario)[0]
        failure = result.failure
        if failure is None:
            return result.value
        if failure.kind == "unusable" or usable:
            raise UnusableTarget(_explain(failure))
        return failure

    def _wait(self, job: Job | RayJob, what: str) -> dict[int, Result]:
        results = job.wait(self._deadline)
        for rank, result in results.items():
            for phase, seconds in result.seconds.items():
                self._spent(f"{what}: {phase}", seconds)
            begin = job.started[rank] - self._begun
            self._timeline.append(Span(what=what, rank=rank, begin=begin, phases=dict(result.seconds)))
        return results

    def _spent(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = max(seconds, self._seconds.get(phase, 0.0))


_OUT_OF_TIME = ("timeout", "slow")
_FIRST = "inspection"
"""The process in which a target is introduced and inspected."""


def _deployed_options(deployment: Deployment, size: int) -> dict[str, Any]:
    return {"tensor_parallel_size": size, "pipeline_parallel_size": deployment.stages, **deployment.options}


def _dtype_of(name: str, dtype: str) -> str:
    """In which dtype a scenario's engine is asked to run where the user asks for `dtype`."""
    return "bfloat16" if name == "bfloat16" else dtype


@contextlib.contextmanager
def _room_needed() -> Iterator[None]:
    """What the pool's own files can meet, as the one line it takes."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ConnectionError) or error.errno not in _NO_PLACE:
            raise
        where = error.filename or "a temporary directory"
        raise UnusableTarget(
            f"cannot write to {where}: {error.strerror}; TMPDIR names a directory for temporary files"
        ) from None


_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)


def _parameters(inspection: Inspection) -> int:
    return sum(math.prod(parameter.shape) for parameter in inspection.parameters.values())


def _proven(audits: tuple[WeightAudit, ...] | Failure, size: int) -> tuple[WeightAudit, ...] | Failure:
    """The audits, if the workers were as many as asked for."""
    if isinstance(audits, Failure) or all(audit.world_size == size for audit in audits):
        return audits
    return Failure(kind="proof", scenario="weights", message=f"asked for {size} ranks, had {audits[0].world_size}")


def _pass_names(scenario: str) -> list[str]:
    """The keys a scenario's traces are kept under."""
    known = ENGINE_SCENARIOS.get(scenario)
    return [scenario] if known is None else [through.name for through in known.passes]


def _first_failure(results: Mapping[int, Result]) -> Failure | None:
    """The failure to report: a rank that failed by itself rather than one ended because of it."""
    failures = [r.failure for r in results.values() if r.failure is not None]
    return next((f for f in failures if f.kind != "abandoned"), failures[0] if failures else None)


def _explain(failure: Failure) -> str:
    if "torchvision::nms" in f"{failure.message} {failure.details}":
        return (
            "vLLM cannot be imported because torchvision was built for another torch: "
            "pip uninstall -y torchvision torchaudio torchcodec (vLLM does not need them for text models)"
        )
    return failure.message
