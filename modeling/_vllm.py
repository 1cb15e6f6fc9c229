"""The only module that touches vLLM's moving parts: import paths, renamed methods, version switches.

Nothing here imports vLLM until it is called, and the questions that plain training code asks
(`engine_config`, `is_attention`) never import it at all: a process that has not imported vLLM
cannot be running it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import platform
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from vllm.config import VllmConfig

Change = Callable[[Iterator[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]
Load = Callable[[Change], None]

_standalone: ContextVar[bool] = ContextVar("genmodel_standalone", default=False)


@contextlib.contextmanager
def standalone() -> Iterator[None]:
    """Build and run models as plain PyTorch here, even where vLLM has a current config.

    The pure-PyTorch reference of a vLLM-native model needs vLLM's config context for vLLM's own
    layers, while layers of ours in the same model must stay differentiable.
    """
    token = _standalone.set(True)
    try:
        yield
    finally:
        _standalone.reset(token)


def engine_config() -> VllmConfig | None:
    """vLLM's config if vLLM is building a model in this very context, else None."""
    if _standalone.get() or "vllm.config" not in sys.modules:
        return None
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def version() -> str:
    """The installed vLLM's version; imports it."""
    import vllm

    return vllm.__version__


MOVED = {
    "vllm.attention.backends": "vllm.v1.attention.backend",
    "vllm.attention.layer": "vllm.model_executor.layers.attention",
    "vllm.attention": "vllm.model_executor.layers.attention",
    "vllm.model_executor.sampling_metadata": "vllm.v1.sample.metadata",
    "vllm.model_executor.layers.sampler": "vllm.v1.sample.sampler",
    "vllm.worker": "vllm.v1.worker",
}
"""Modules of older vLLMs that models import, and where what they held is now."""


def whereabouts(module: str) -> str:
    """What to say of a module that cannot be found: not installed, or gone from the installed package, and where to."""
    package = module.partition(".")[0]
    if package == module or importlib.util.find_spec(package) is None:
        return "which is not installed"
    moved = next((new for old, new in MOVED.items() if module == old or module.startswith(f"{old}.")), None)
    known = importlib.metadata.packages_distributions().get(package)
    owner = f"the installed {known[0]} {importlib.metadata.version(known[0])}" if known else package
    has_not = f"which {owner} does not have"
    return has_not if moved is None else f"{has_not}: it moved to {moved}"


def attention_layer(
    config: VllmConfig,
    *,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: Sequence[float] | None,
    prefix: str,
) -> nn.Module:
    """vLLM's own attention with the paged KV cache; head counts are this rank's.

    Called as `layer(q, k, v)` on [tokens, heads * head_dim].
    """
    import copy

    from vllm.model_executor.layers.attention import Attention

    # vLLM gives a layer without a window the config's one; here None means none, as it does in training.
    cache_config = copy.copy(config.cache_config)
    cache_config.sliding_window = None
    layer = Attention(
        num_heads,
        head_dim,
        scale,
        num_kv_heads=num_kv_heads,
        alibi_slopes=None if alibi_slopes is None else list(alibi_slopes),
        cache_config=cache_config,
        quant_config=config.quant_config,
        logits_soft_cap=soft_cap,
        per_layer_sliding_window=sliding_window,
        prefix=prefix,
    )
    sizes = layer.attn_backend.get_supported_head_sizes()
    if sizes and head_dim not in sizes:
        raise ValueError(
            f"head_dim {head_dim} is not one that vLLM's {layer.attn_backend.get_name()} kernels take: "
            f"use one of {', '.join(map(str, sizes))}"
        )
    return layer


def is_attention(module: nn.Module) -> bool:
    """Whether `module` is one of vLLM's KV-cached attention layers."""
    base = sys.modules.get("vllm.model_executor.layers.attention_layer_base")
    return base is not None and isinstance(module, base.AttentionLayerBase)


def is_experts(module: nn.Module) -> bool:
    """Whether this is vLLM's layer of routed experts, under any of the names that its class has had."""
    home = "vllm.model_executor.layers.fused_moe"
    bases = type(module).__mro__
    return any(base.__name__ in ("MoERunner", "FusedMoE") and base.__module__.startswith(home) for base in bases)


def call_experts_directly(layer: Any) -> None:
    """Not by its name and as a custom operation, which is registered for one kind of device."""

    def call(hidden: Any, logits: Any, shared: Any, input_ids: Any, *_: Any) -> Any:
        return layer._forward_impl(hidden, logits, shared, input_ids)

    layer._forward_entry = call


def refuses_layer_name(name: str, model_type: str) -> str:
    """Why vLLM cannot tell which layer's KV cache to file under `name`; empty if it can."""
    from vllm.model_executor.models.utils import extract_layer_index

    attention_modules = 2 if model_type == "longcat_flash" else 1  # as vLLM's model runners count them
    try:
        extract_layer_index(name, attention_modules)
    except (AssertionError, IndexError, ValueError) as error:
        return str(error) or f"layer name {name} has no integer"
    return ""


@contextlib.contextmanager
def attention_arguments_kept() -> Iterator[None]:
    """Let every vLLM `Attention` that is built in here keep what it was built with, for `attention_arguments`."""
    from vllm.model_executor.layers.attention import Attention

    build: Any = Attention.__init__
    signature = inspect.signature(build)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    defaults["chunk_lookback"] = -1  # one of those that go to the implementation; none

    def keeping(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given |= given.pop("extra_impl_args", {})
        vars(self)["_genmodel_arguments"] = {
            name: value
            for name, value in given.items()
            if name != "self" and value is not None and value is not False and value is not defaults.get(name)
        }

    Attention.__init__ = keeping  # type: ignore[method-assign]
    try:
        yield
    finally:
        Attention.__init__ = build  # type: ignore[method-assign]


def attention_arguments(layer: nn.Module) -> dict[str, Any] | None:
    """What a layer was built with that is neither None nor the default; None if it is not vLLM's `Attention`."""
    found: dict[str, Any] | None = vars(layer).get("_genmodel_arguments")
    return found


def attention_kind(layer: nn.Module) -> Literal["plain", "chunked", "encoder"]:
    """Which of vLLM's subclasses of `Attention` that have a backend of their own a layer is of, or none of them."""
    known: dict[str, Literal["chunked", "encoder"]] = {
        "ChunkedLocalAttention": "chunked",
        "EncoderOnlyAttention": "encoder",
    }
    # By name, for the modules they are in have moved.
    own = type(layer)
    return known.get(own.__name__, "plain") if own.__module__.startswith("vllm.") else "plain"


def changed_of_attention(layer: nn.Module) -> set[str]:
    """Public names of vLLM's `Attention` that a subclass of it has of its own."""
    from vllm.model_executor.layers.attention import Attention

    order = type(layer).__mro__
    own = {name for base in order[: order.index(Attention)] for name in vars(base)}
    return {name for name in own if not name.startswith("_") and hasattr(Attention, name)}


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum over vLLM's tensor-parallel group by its own communicator (CUDA-graph safe, no gradient)."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(x)


def all_gather(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Concatenate over vLLM's tensor-parallel group along `dim` by its own communicator (no gradient)."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(x, dim)


def parallel_group(kind: str) -> tuple[int, int, ProcessGroup | None]:
    """(rank in group, group size, device process group) of vLLM's "tp", "pp" or "dp" group.

    (0, 1, None) where vLLM has not initialised its groups in this process.
    """
    state: Any = sys.modules.get("vllm.distributed.parallel_state")
    coordinator = getattr(state, f"_{kind.upper()}", None) if state is not None else None
    if coordinator is None:
        return 0, 1, None
    return coordinator.rank_in_group, coordinator.world_size, coordinator.device_group


def register(arch: str, model_class: type[nn.Module]) -> None:
    """Make vLLM in this process build `model_class` for `architectures: [arch]`."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(arch, model_class)


def architectures() -> list[str]:
    """Every architecture this vLLM has a model for, sorted."""
    from vllm import ModelRegistry

    return sorted(ModelRegistry.get_supported_archs())


def text_generation_architectures() -> dict[str, str]:
    """Which of them generate text from text, each with "vllm" or, where Hugging Face's code runs, "transformers"."""
    from vllm.model_executor.models import registry

    known: Any = registry
    found = dict.fromkeys(known._TEXT_GENERATION_MODELS, "vllm")
    for name, (_, model_class) in known._TRANSFORMERS_SUPPORTED_MODELS.items():
        if "MultiModal" not in model_class:
            found[name] = "transformers"
    return found


def architecture(name: str) -> type[nn.Module]:
    """vLLM's own class of an architecture.

    Raises:
        KeyError: if there is none of that name.
        Exception: whatever importing the model raises.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    known: Any = ModelRegistry.models
    found: type[nn.Module] = known[name].load_model_cls()
    # To see what a model can do, vLLM would import it once more in a process of its own.
    known[name] = vars(registry)["_RegisteredModel"].from_model_cls(found)
    return found


def register_config() -> None:
    """Teach transformers, whose AutoConfig vLLM reads config.json with, `model_type: genmodel`."""
    from transformers import AutoConfig

    from genmodel.modeling.hf_config import GenModelConfig

    AutoConfig.register(GenModelConfig.model_type, GenModelConfig, exist_ok=True)


def knows_model_type(name: object) -> bool:
    """Whether vLLM can read a config.json of this `model_type`."""
    from transformers import CONFIG_MAPPING
    from vllm.transformers_utils import config

    register_config()
    return name in CONFIG_MAPPING or name in vars(config).get("_CONFIG_REGISTRY", ())


class Refused(ValueError):
    """vLLM refuses a config or options; the message is its own reason."""


@contextlib.contextmanager
def _own_reason() -> Iterator[None]:
    """Let vLLM say why, instead of "1 validation error for ModelConfig"."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        reasons = "; ".join(found["msg"].removeprefix("Value error, ") for found in error.errors())
        raise Refused(" ".join(reasons.split())) from None


def model_config(model_dir: str, dtype: str) -> VllmConfig:
    """The VllmConfig vLLM would build a model of this directory from at TP=1, without any engine.

    Raises:
        Refused: if vLLM, or transformers, does not take config.json.
    """
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {"dtype": dtype, "compilation_config": {"custom_ops": ["none"]}}
    made = EngineArgs(model=model_dir, skip_tokenizer_init=True, enforce_eager=True, **arguments)
    try:
        with _own_reason():
            return made.create_engine_config()
    except Exception as error:
        raise Refused(" ".join(str(error).split()) or type(error).__name__) from error


def turned_off(model_dir: str) -> tuple[str, str]:
    """Why vLLM's engines of this model go without prefix caching, and without chunked prefill; empty where they do not.

    The model's kind and the platform decide that, such as latent attention on most CPUs.

    Raises:
        Refused: if vLLM, or transformers, does not take config.json.
    """
    from vllm import logger

    said_once: Any = getattr(logger, "_print_info_once", None)
    if hasattr(said_once, "cache_clear"):
        said_once.cache_clear()  # else vLLM gives the reason for the first config of a process only
    with _heard("vllm", logging.DEBUG) as lines:
        config = model_config(model_dir, "float32")
    cached, chunked = config.cache_config.enable_prefix_caching, config.scheduler_config.enable_chunked_prefill
    return (
        "" if cached else _why_off("prefix caching", lines),
        "" if chunked else _why_off("chunked prefill", lines),
    )


def _why_off(what: str, lines: list[str]) -> str:
    """A sentence, with vLLM's own reason if it gave one."""
    said = next((line for line in lines if what in line and ("disab" in line or "not support" in line)), "")
    return f"vLLM turns {what} off for this model" + (f": {said.rstrip('.')}" if said else "")


def keep_imports_frozen() -> None:
    """Keep the garbage collector off what imports made, for this process's whole life.

    vLLM freezes the heap when an engine starts, its own objects included, thaws all of it when one
    ends, and collects fully both times: over a second for each engine, nearly all of it spent on
    modules that are never freed.
    """
    import gc

    from vllm.v1.engine import core

    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None
    vars(core)["freeze_gc_heap"] = lambda: None


def import_engine() -> None:
    """Do once, for all processes that are forked from this one, what is the same for every engine.

    That is imports, the sampler's compilation, and on CPU without Triton the walk over all attributes of all
    modules by which vLLM puts its C++ kernels in the place of Triton's, 0.2 s for each engine of each rank.
    """
    import gc
    import importlib

    from vllm.platforms import current_platform

    device = "cpu" if current_platform.is_cpu() else "gpu"
    for name in (
        "vllm.entrypoints.llm",
        "vllm.v1.executor.multiproc_executor",
        "vllm.model_executor.model_loader.default_loader",
        f"vllm.v1.worker.{device}_worker",
        f"vllm.v1.worker.{device}_model_runner",
        "torch.distributed.tensor.parallel",
    ):
        with contextlib.suppress(ImportError):  # another version's name: then it is imported when it is needed
            importlib.import_module(name)
    _count_ranks_eagerly()
    its_class = type(current_platform)
    if hasattr(its_class, "register_triton_kernel_overrides"):
        its_class.register_triton_kernel_overrides()
        its_class.register_triton_kernel_overrides = classmethod(lambda cls: None)  # type: ignore[method-assign, assignment]
    gc.collect()
    gc.freeze()


def is_text_generation_model(model_class: type[nn.Module]) -> tuple[bool, str]:
    """vLLM's own verdict on the class, and what it logged while forming it."""
    from vllm.model_executor.models.interfaces_base import is_text_generation_model as verdict

    with _heard("vllm.model_executor.models.interfaces_base", logging.WARNING) as lines:
        accepted = bool(verdict(model_class))
    return accepted, "; ".join(lines)


@contextlib.contextmanager
def _heard(name: str, level: int) -> Iterator[list[str]]:
    """What a logger, or one below it, is told meanwhile, whatever is shown of that."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(name), Collect(level)
    shown = logger.level
    logger.addHandler(handler)
    if not logger.isEnabledFor(level):
        logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.setLevel(shown)
        logger.removeHandler(handler)


def compiles(model: nn.Module) -> bool:
    """Whether vLLM compiles this model, or a module in it: its class has vLLM's @support_torch_compile."""
    wrapper: Any = sys.modules.get("vllm.compilation.wrapper")
    if wrapper is None:
        return False
    # The decorator adds this class to the bases, under the name that this version has for it.
    names = ("TorchCompileWithNoGuardsWrapper", "TorchCompileWrapperWithCustomDispatcher")
    bases = tuple(found for name in names if (found := getattr(wrapper, name, None)) is not None)
    return any(isinstance(module, bases) for module in model.modules())


def captures_graphs() -> bool:
    """Whether engines here replay models as CUDA graphs unless they are told to run eagerly, compiled or not."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda_alike()


def supports_pipeline(model_class: type[nn.Module]) -> bool:
    """Whether the class declares pipeline parallelism to vLLM, completely."""
    from vllm.model_executor.models import supports_pp

    return bool(supports_pp(model_class))


@contextlib.contextmanager
def native_world(config: VllmConfig) -> Iterator[None]:
    """Let vLLM's own layers be built and evaluated outside an engine, by default in a gloo world of one."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # vLLM's layers call torch.accelerator, which a CPU build of torch refuses.
        from vllm.v1.worker import cpu_model_runner

        cpu_model_runner._set_torch_accelerator_to_noop()
    with contextlib.ExitStack() as stack:
        if parallel_group("tp")[2] is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="genmodel-"))
            stack.enter_context(world(config, 0, 1, f"file://{directory}/rendezvous"))
        stack.enter_context(standalone())
        stack.enter_context(_float64_has_a_backend())
        stack.enter_context(set_current_vllm_config(config))
        stack.enter_context(set_forward_context(None, config))
        yield


@contextlib.contextmanager
def _float64_has_a_backend() -> Iterator[None]:
    """Let an attention layer of float64 be built for CUDA: none of vLLM's kernels knows it, and here none is run."""
    from vllm.v1.attention import selector

    made: Any = selector.AttentionSelectorConfig

    def asked(*, dtype: torch.dtype, **others: Any) -> Any:
        return made(dtype=torch.float32 if dtype == torch.float64 else dtype, **others)

    vars(selector)["AttentionSelectorConfig"] = asked
    try:
        yield
    finally:
        vars(selector)["AttentionSelectorConfig"] = made


@contextlib.contextmanager
def world(config: VllmConfig, rank: int, size: int, rendezvous: str) -> Iterator[None]:
    """Process groups of `size` tensor-parallel ranks over gloo, vLLM's own among them, without any engine.

    Args:
        config: told of the size.
        rank: this process's.
        size: tensor-parallel size and number of processes.
        rendezvous: a URL that all of them know, such as "file:///a/path/that/does/not/exist/yet".
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state as state

    config.parallel_config.tensor_parallel_size = size
    _share_memory_privately()
    try:
        with set_current_vllm_config(config):
            state.init_distributed_environment(size, rank, rendezvous, rank, "gloo")
            state.initialize_model_parallel(size, 1)
        yield
    finally:
        leave_world()


def use_plain_linear(model: nn.Module) -> None:
    """Let vLLM's linear layers on CPU, which pack their weights for oneDNN at load, use torch's `linear`."""

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(x, weight, bias)

    for module in model.modules():
        if hasattr(module, "quant_method"):
            module.cpu_linear = linear  # type: ignore[assignment]


def start_engine(model_dir: str, **options: Any) -> Any:
    """An `LLM` for a model directory without a tokenizer, scoring in raw logits over any number of tokens.

    Args:
        model_dir: directory with config.json and safetensors.
        **options: engine arguments, passed on.
    """
    from vllm import LLM

    if options.get("distributed_executor_backend") == "external_launcher":
        _share_memory_privately()
    with _own_reason():
        return LLM(
            model=model_dir,
            skip_tokenizer_init=True,
            logprobs_mode="raw_logits",
            max_logprobs=-1,
            disable_log_stats=False,
            **{**_beside_others(), **options},
        )


def _beside_others() -> dict[str, Any]:
    """Options that let an engine start on a GPU that another process has memory of.

    Else vLLM wants nine tenths of it to be free, even where it is told how large the KV cache is.
    """
    from vllm.platforms import current_platform

    return {} if current_platform.is_cpu() else {"gpu_memory_utilization": 0.01}


def load_in_worker(
    model_dir: str, watch: Callable[[nn.Module, Load], None], *, tensor_parallel_size: int, **options: Any
) -> int:
    """Let this rank's vLLM worker build a model and load its weights, as when an engine starts, and end it again.

    There is no scheduler and no KV cache, which loading does not know of.

    Args:
        model_dir: directory with config.json and safetensors.
        watch: called as `watch(model, load)` where vLLM loads the weights, before it packs them for its
            kernels. `load(change)` is vLLM's own way to load the checkpoint, its guard against missing
            weights included; `change` is applied to the (name, tensor) pairs on their way to the model.
        tensor_parallel_size: number of ranks, of which each has to call this with RANK and so on set.
        **options: engine arguments, passed on.

    Returns:
        The number of ranks as vLLM counts them.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.v1.executor.abstract import Executor

    if tensor_parallel_size > 1:
        options["distributed_executor_backend"] = "external_launcher"
        _share_memory_privately()
    arguments = EngineArgs(
        model=model_dir,
        tensor_parallel_size=tensor_parallel_size,
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,  # never allocated; without it the worker wants most of the machine's memory
        **{**_beside_others(), **options},
    )
    config = arguments.create_engine_config()
    load_weights, get_all_weights = DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights

    def watched(self: Any, model: nn.Module, model_config: Any) -> None:
        def load(change: Change) -> None:
            self.get_all_weights = lambda *a, **k: change(get_all_weights(self, *a, **k))
            try:
                load_weights(self, model, model_config)
            finally:
                del self.get_all_weights

        watch(model, load)

    DefaultModelLoader.load_weights = watched  # type: ignore[method-assign]
    try:
        executor = Executor.get_class(config)(config)
    finally:
        DefaultModelLoader.load_weights = load_weights  # type: ignore[method-assign]
    size = parallel_group("tp")[1]
    executor.shutdown()
    leave_world()
    return size


def unguarded(model: nn.Module) -> set[str]:
    """Names of the parameters that vLLM's guard against missing weights takes for loaded whatever happened.

    Those of every module with a quantisation method, and all of vLLM's own linear layers and embeddings have one.
    """
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading")
        for name, _ in module.named_parameters()
    }


def _share_memory_privately() -> None:
    """Let ranks in hosts on CPU reduce through vLLM's shared memory, as deployed ranks do.

    vLLM names the memory after the rendezvous, and that is `env://` for every engine in hosts: sessions on one
    machine would get in each other's way, what a killed host leaves behind would stop all later ones, and each
    engine would map memory anew. Here it is the processes' own, mapped once, and has no name once all have it.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    shared = getattr(cpu_communicator, "_CPUSHMDistributed", None)
    if shared is None or shared._init_cpu_shm is _join_memory:
        return
    # Where ranks differ in it, which are on several machines then, vLLM reduces through torch.distributed.
    machine = f"{platform.node()}-{SHARED_MEMORY.stat().st_dev}" if SHARED_MEMORY.is_dir() else str(os.getpid())
    shared.make_group_name = staticmethod(lambda communicator: f"{machine}-{_kind(communicator)}")
    shared._init_cpu_shm = _join_memory


SHARED_MEMORY = Path("/dev/shm")
"""Where POSIX shared memory lives on Linux."""
_MEMORY: dict[tuple[tuple[int, ...], str], int] = {}
"""Handles of the shared memory of this process, by the processes that share it and the kind of group."""


def _kind(communicator: Any) -> str:
    """Of a "tp:3": vLLM counts the groups it made in a process, and ranks that ran at TP=1 before made more."""
    kind: str = communicator.unique_name.partition(":")[0]
    return kind


def _join_memory(self: Any) -> int:
    """What `_CPUSHMDistributed._init_cpu_shm` does, at most once for the same processes."""
    import torch.distributed as dist

    group, world_size = self.communicator.device_group, self.communicator.world_size
    mine = os.getpid(), torch.get_num_threads(), uuid.uuid4().hex
    everyone: list[tuple[int, int, str]] = [mine] * world_size
    dist.all_gather_object(everyone, mine, group=group)
    pids, threads, names = zip(*everyone, strict=True)
    key = pids, _kind(self.communicator)
    if key not in _MEMORY:
        name, rank = f"vllm_dist_{names[0]}", self.communicator.rank
        # As with vLLM's own, a file of that name tells of it, should this process not live to unlink it.
        (Path(tempfile.gettempdir()) / name).touch()
        _MEMORY[key] = torch.ops._C.init_shm_manager(name, world_size, rank, min(threads))
        dist.barrier(group)
        torch.ops._C.join_shm_manager(_MEMORY[key], name)
        dist.barrier(group)
        (SHARED_MEMORY / f"{name}_{rank}").unlink(missing_ok=True)
    return _MEMORY[key]


def _count_ranks_eagerly() -> None:
    """Spare every process an inductor compile of one comparison in the sampler, about 2 s.

    It ranks the sampled token among the logits, which the harness does not read.
    """
    from vllm.v1.sample import sampler

    compiled: Any = getattr(sampler, "batched_count_greater_than", None)
    if hasattr(compiled, "_torchdynamo_orig_callable"):
        vars(sampler)["batched_count_greater_than"] = compiled._torchdynamo_orig_callable


def stop_engine(llm: Any) -> None:
    """End an engine so that another, of another size too, can start in the same process."""
    _let_processes_end_meanwhile()
    # An engine core in a process of its own often does not exit by itself; vLLM kills it after this many seconds.
    llm.llm_engine.engine_core.shutdown(timeout=1.0)
    leave_world()


def _let_processes_end_meanwhile() -> None:
    """Let vLLM kill a tree of processes of which some end by themselves just then.

    vLLM looks them up more than once, and a process that has ended stays to be found until its parent reaps it.
    Parent of an engine's processes is usually the one that runs the engine, but in hosts the fork server, which
    reaps at once.
    """
    import psutil
    from vllm.v1 import utils

    kill_process_tree: Any = vars(utils)["kill_process_tree"]
    if kill_process_tree.__module__ == __name__:
        return

    def kill_what_is_left(pid: int) -> None:
        while True:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill_process_tree(pid)
                return

    vars(utils)["kill_process_tree"] = kill_what_is_left


def leave_world() -> None:
    """Forget vLLM's process groups in this process, if any were left by a run that raised."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def generate(llm: Any, prompts: list[dict[str, Any]], stagger: int = 0) -> list[Any]:
    """Run requests together.

    Each is {"tokens", "max_tokens", "temperature", "seed", "candidates", "score_prompt", "embedded"}; of one that is
    embedded the engine gets what `embed_input_ids` makes of its tokens, and not the tokens.

    With `stagger` they arrive that many scheduler steps apart instead of all at once.

    Returns vLLM's RequestOutputs in order, with flat logprobs holding raw logits.
    """
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            max_tokens=p["max_tokens"],
            temperature=p["temperature"],
            seed=p["seed"],
            logprobs=p["candidates"],
            prompt_logprobs=p["candidates"] if p["score_prompt"] else None,
            flat_logprobs=True,
            ignore_eos=True,
            detokenize=False,
        )
        for p in prompts
    ]
    tokens = [
        {"prompt_embeds": _embed(llm, p["tokens"])} if p["embedded"] else {"prompt_token_ids": list(p["tokens"])}
        for p in prompts
    ]
    if stagger:
        return _arriving(llm.llm_engine, tokens, parameters, stagger)
    outputs: list[Any] = llm.generate(tokens, parameters, use_tqdm=False)
    return outputs


def _embed(llm: Any, tokens: Sequence[int]) -> torch.Tensor:
    """What the model of an in-process engine embeds tokens as, [tokens, hidden]; all ranks have to call this."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
    device = next(model.parameters()).device
    with torch.inference_mode():
        embedded: torch.Tensor = model.embed_input_ids(torch.tensor(tokens, device=device))
    return embedded.cpu().clone()


@contextlib.contextmanager
def observe_embeddings(llm: Any) -> Iterator[list[int]]:
    """Collect, for each scheduler step of an in-process engine, how many tokens reached the model as embeddings.

    Only those of requests that the worker knows by their embeddings alone are counted, and only as many rows as the
    model's forward was given embeddings for.
    """
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner, model = worker.model_runner, worker.get_model()
    execute, found = runner.execute_model, list[int]()
    unknown: dict[str, int] = {}
    rows: list[int] = []

    def executed(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for request in scheduler_output.scheduled_new_reqs:
            if request.prompt_token_ids is None and request.prompt_embeds is not None:
                unknown[request.req_id] = len(request.prompt_embeds)
        scheduled = scheduler_output.num_scheduled_tokens
        prompts = {name: min(left, scheduled.get(name, 0)) for name, left in unknown.items()}
        rows.clear()
        result = execute(scheduler_output, *args, **kwargs)
        found.append(min(sum(prompts.values()), sum(rows)))
        unknown.update({name: unknown[name] - count for name, count in prompts.items()})
        return result

    def before(_: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        given = arguments.get("inputs_embeds")
        rows.append(0 if given is None else len(given))

    runner.execute_model = executed
    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()
        runner.execute_model = execute


def _arriving(engine: Any, tokens: list[Any], parameters: list[Any], stagger: int) -> list[Any]:
    from vllm.sampling_params import RequestOutputKind

    finished: dict[str, Any] = {}
    waiting = [(f"arriving-{i}", *pair) for i, pair in enumerate(zip(tokens, parameters, strict=True))]
    order = [name for name, *_ in waiting]
    steps = 0
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % stagger == 0:
            name, prompt, sampling = waiting.pop(0)
            sampling.output_kind = RequestOutputKind.FINAL_ONLY
            engine.add_request(name, prompt, sampling)
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        steps += 1
    return [finished[name] for name in order]


def reload_weights(llm: Any, directory: str) -> None:
    """Load a checkpoint into the running model, in process, and drop the prefix cache of the old weights.

    As RL trainers do it: by the model's own `load_weights`, or by vLLM's reload where its layers keep
    derived copies (packed weights on CPU, quantised ones) that `load_weights` alone would leave behind.
    """
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model = worker.get_model()
    if any(hasattr(module, "quant_method") for module in model.modules()):
        worker.reload_weights(weights_path=directory)
        _pack_tied_weights(model)
    else:
        files = sorted(str(path) for path in Path(directory).glob("*.safetensors"))
        model.load_weights(safetensors_weights_iterator(files, False))
    llm.reset_prefix_cache()


def _pack_tied_weights(model: nn.Module) -> None:
    """Make the packed copies of tied heads anew, which vLLM's reload leaves as they were.

    On CPU, vLLM's layers multiply by packed copies of their weights. A reload packs again the layers that a checkpoint
    has tensors for: the embedding, and not the head that is tied to it. On GPUs nothing is packed.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    owners = Counter(id(layer.weight) for layer in layers)
    for layer in layers:
        if owners[id(layer.weight)] > 1 and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


@contextlib.contextmanager
def observe_schedule(llm: Any) -> Iterator[list[dict[str, int]]]:
    """Collect, for each scheduler step of an in-process engine, {request id: tokens computed}.

    The ids are those of the RequestOutputs; newer vLLMs' own have a random suffix.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, steps = scheduler.schedule, []

    def observed(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            known = llm.llm_engine.output_processor.request_states
            steps.append(
                {
                    getattr(known.get(inner), "external_req_id", inner): count
                    for inner, count in output.num_scheduled_tokens.items()
                }
            )
        return output

    scheduler.schedule = observed
    try:
        yield steps
    finally:
        scheduler.schedule = schedule


@contextlib.contextmanager
def scarce_cache(llm: Any, requests: int) -> Iterator[None]:
    """Let an in-process engine run out of cache blocks once `requests` requests are being continued.

    All free blocks are taken away then, and given back when a request has been preempted for want of one: whatever
    layers share the cache, and into however many groups of blocks vLLM puts them.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    blocks, schedule = scheduler.kv_cache_manager.block_pool, scheduler.schedule
    taken: list[Any] = []
    ready = False

    def observed(*args: Any, **kwargs: Any) -> Any:
        nonlocal ready
        known = scheduler.requests.values()
        if not ready and sum(r.num_computed_tokens >= r.num_prompt_tokens for r in known) >= requests:
            ready = True
            taken.extend(blocks.get_new_blocks(blocks.get_num_free_blocks()))
        output = schedule(*args, **kwargs)
        if taken and any(r.num_preemptions for r in known):
            give_back()
        return output

    def give_back() -> None:
        blocks.free_blocks(taken)
        taken.clear()

    scheduler.schedule = observed
    try:
        yield
    finally:
        scheduler.schedule = schedule
        give_back()


def observe_forward(
    runner: Any, begin: Callable[[list[tuple[str, tuple[int, ...], int]], torch.Tensor], None]
) -> nn.Module:
    """Be told of every forward pass of this process's rank, from now until its engine ends, before the model runs.

    Args:
        runner: the first of vLLM's two model runners: `runner_of` an in-process engine, or a worker's `model_runner`.
        begin: called with (id, prompt, tokens in this pass) of each request, in the order of the model's rows,
            and with the positions [T] of all rows.

    Returns:
        The model, as vLLM built it.
    """
    execute = runner.execute_model
    scheduled: dict[str, int] = {}

    def executed(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        scheduled.clear()
        scheduled.update(scheduler_output.num_scheduled_tokens)
        return execute(scheduler_output, *args, **kwargs)

    def before(_: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        batch = [
            (r, tuple(runner.requests[r].prompt_token_ids), scheduled.get(r, 0)) for r in runner.input_batch.req_ids
        ]
        positions = arguments["positions"]
        # Multi-dimensional rotary positions are [3, T]; for text all three are the same.
        begin(batch, positions[0] if positions.dim() > 1 else positions)

    runner.execute_model = executed
    model: nn.Module = runner.model
    if parallel_group("pp")[0] > 0 and runner.intermediate_tensors is None:
        # The runner makes room for what the stage before sends when it warms up, which an eager engine does not do.
        runner.intermediate_tensors = model.make_empty_intermediate_tensors(  # type: ignore[operator]
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )
    model.register_forward_pre_hook(before, with_kwargs=True)
    return model


def model_of(llm: Any) -> nn.Module:
    """The model of an in-process engine, as vLLM built it."""
    model: nn.Module = runner_of(llm).model
    return model


def runner_of(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def worker_report(worker: Any, driver: int) -> dict[str, Any]:
    """Run inside a worker by `collective_rpc` of process `driver`: which process holds which model on which backend."""
    import multiprocessing

    from vllm.compilation.counter import compilation_counter as counter

    model = worker.get_model()
    inner = model.model if type(model).__mro__[1].__name__ == "CallableModelWrapper" else model
    backends = {type(m.impl).__name__ for m in model.modules() if is_attention(m) and hasattr(m, "impl")}
    started = getattr(multiprocessing.current_process(), "_start_method", "unknown")
    return {
        "pid": os.getpid(),
        "model_class": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "backend": ", ".join(sorted(backends)),
        "dtype": str(worker.model_config.dtype).removeprefix("torch."),
        "compiled_models": counter.num_models_seen,
        "compiled_graphs": counter.num_aot_compiles + counter.num_aot_artifacts_loaded + counter.num_graphs_seen,
        "captured_graphs": counter.num_cudagraph_captured,
        "start_method": "in-process" if os.getpid() == driver else str(started),
        "stage": parallel_group("pp")[0],
    }


def watch_stage(worker: Any) -> None:
    """Run inside a worker by `collective_rpc`: let each stage of a pipeline that hands on what it must not say so.

    vLLM fails without a word about the key, or, in place of a tensor that never came, computes with zeros.
    """
    stage, stages, _ = parallel_group("pp")
    model = worker.get_model()

    def look(_: nn.Module, __: Any, output: Any) -> None:
        problem = stage_problem(model, output, stage, stages)
        if problem:
            raise TypeError(problem)

    model.register_forward_hook(look)


def stage_problem(model: Any, output: Any, stage: int, stages: int) -> str:
    """What is wrong with what a stage of a pipeline gives; empty if nothing is."""
    from vllm.sequence import IntermediateTensors

    if stage == stages - 1:
        if isinstance(output, IntermediateTensors):
            return f"stage {stage}, the last one, returns IntermediateTensors, not hidden states"
        return ""
    if not isinstance(output, IntermediateTensors):
        return (
            f"stage {stage} returns a {type(output).__name__}; all but the last of {stages} return IntermediateTensors"
        )
    sent = output.tensors
    for name, value in sent.items():
        if not isinstance(value, torch.Tensor):
            return (
                f'stage {stage} sends intermediate tensor "{name}" as {type(value).__name__}; '
                "every value must be a tensor"
            )
    like = next(iter(sent.values()), torch.empty(0))
    wanted = model.make_empty_intermediate_tensors(batch_size=1, dtype=like.dtype, device=like.device).tensors
    if sent.keys() != wanted.keys():
        return (
            f"stage {stage} sends intermediate tensors {_quoted(sent)}, and stage {stage + 1} expects "
            f"{_quoted(wanted)}, as make_empty_intermediate_tensors has them"
        )
    for name, value in sent.items():
        if value.shape[1:] != wanted[name].shape[1:]:
            return (
                f'stage {stage} sends intermediate tensor "{name}" as {list(value.shape)}, and stage {stage + 1} '
                f"expects {['tokens', *wanted[name].shape[1:]]}, as make_empty_intermediate_tensors has it"
            )
    return ""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"


def engine_facts(llm: Any) -> dict[str, Any]:
    """What the engine's config says after vLLM adjusted it, and what every worker reports."""
    config = llm.llm_engine.vllm_config
    return {
        "world_size": config.parallel_config.world_size,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "executor": str(config.parallel_config.distributed_executor_backend),
        "block_size": config.cache_config.block_size,
        "eager": config.model_config.enforce_eager,
        "workers": llm.collective_rpc(worker_report, args=(os.getpid(),)),
    }
