"""The pure-PyTorch side: build a target outside any engine, load it, and run it on whole sequences."""

from __future__ import annotations

import contextlib
import itertools
import random
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from genmodel.modeling import _vllm
from genmodel.modeling.loading import load_weights, loadable
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.modeling.wrapper import call_factory, is_vllm_style
from genmodel.runners import hugging_face, native_attention, native_experts
from genmodel.runners.protocol import Unusable


@dataclass(frozen=True, slots=True)
class Standalone:
    """A model built outside any engine, and the context it must be run in."""

    model: nn.Module
    native: bool
    """Whether it has vLLM's own attention layers, evaluated here in plain PyTorch."""
    vllm_config: Any
    refused: tuple[str, ...] = ()
    """Which of those layers cannot be evaluated here, and why: the model can be inspected and is no reference."""

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden] of one sequence of token ids [T].

        Raises:
            Unusable: if they would not be the model's.
        """
        self.must_be_evaluated()
        states: torch.Tensor = self.model(input_ids=tokens, positions=torch.arange(len(tokens)))
        return states

    def must_be_evaluated(self) -> None:
        """Raise Unusable, which says what to do, if some layer cannot be evaluated here."""
        if self.refused:
            more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
            raise Unusable(
                f"a reference cannot be made of this model, part of which plain PyTorch does not know: "
                f"{self.refused[0]}{more}; name another one, --genmodel-reference=my_pkg.my_module:factory"
            )

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of one sequence of token ids [T]."""
        model: Any = self.model
        scores: torch.Tensor = model.compute_logits(self.hidden(tokens))
        return scores


def needs_vllm(error: BaseException) -> bool:
    """Whether vLLM's own code raised this: the factory builds vLLM's layers and lacks vLLM's context."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "/vllm/" in frames[-1].filename and "/genmodel/" not in frames[-1].filename


@contextlib.contextmanager
def build(
    target: Any, vllm_config: Any, dtype: torch.dtype, context: ParallelContext | None = None, *, cast: bool = True
) -> Iterator[Standalone]:
    """Build a target as plain PyTorch; vLLM's own layers are evaluated with SDPA.

    The factory is first called with no trace of vLLM around it, as training code calls it. Only if the
    target is a vLLM-style class, or vLLM's code itself asks for its context, is a world of one set up.

    Args:
        target: the factory or class, or a class of transformers.
        vllm_config: what it receives as `vllm_config`.
        dtype: default dtype during the build, and of every floating-point parameter after it.
        context: what it receives as `parallel_context`; None means TP=1, with a process group of one.
        cast: False leaves parameters in the dtypes that the target made them in, as an engine does.

    Raises:
        Exception: whatever the factory raises.
    """
    vllm_config.model_config.dtype = dtype
    _leave_random_state(0 if context is None else context.get_tensor_parallel_rank())
    if hugging_face.is_class(target):
        yield Standalone(hugging_face.build(target, Path(vllm_config.model_config.model), dtype), False, vllm_config)
        return
    if not is_vllm_style(target):
        with contextlib.ExitStack() as stack:
            given = context if context is not None else stack.enter_context(alone())
            plain = _build_plain(target, vllm_config, dtype, given)
            if plain is not None:
                yield Standalone((plain.to(dtype) if cast else plain).eval(), False, vllm_config)
                return
    with _vllm.native_world(vllm_config), default_dtype(dtype):
        vllm_config.compilation_config.static_forward_context.clear()
        given = context if context is not None else ParallelContext.from_group(_vllm.parallel_group("tp")[2])
        with _vllm.attention_arguments_kept():
            model = call_factory(target, vllm_config, given)
        _vllm.use_plain_linear(model)
        native = any(_vllm.is_attention(m) and hasattr(getattr(m, "impl", None), "scale") for m in model.modules())
        refused = [*native_attention.evaluate(model), *native_experts.evaluate(model)]
        yield Standalone((model.to(dtype) if cast else model).eval(), native, vllm_config, tuple(refused))


_BUILDS = itertools.count(1)


def _leave_random_state(rank: int) -> None:
    """Let every build, and every rank's, begin at a state of the random number generators that no other began at.

    What a model draws at random while it is built is not in its checkpoint, and not the same in an engine.
    """
    seed = 1_000_003 * next(_BUILDS) + rank
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the state that a model would draw from


def _build_plain(target: Any, vllm_config: Any, dtype: torch.dtype, context: ParallelContext) -> nn.Module | None:
    """None if the factory cannot do without vLLM's context."""
    try:
        with default_dtype(dtype), _vllm.standalone():
            return call_factory(target, vllm_config, context)
    except Exception as error:
        if not needs_vllm(error):
            raise
        return None


@contextlib.contextmanager
def alone() -> Iterator[ParallelContext]:
    """What training code has that was launched as a single process: a group of one, which some libraries insist on."""
    started = not dist.is_initialized()
    if started:
        store = dist.HashStore()  # type: ignore[attr-defined] # public, and left out of torch's __all__
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield ParallelContext.from_group(dist.group.WORLD)
    finally:
        if started:
            dist.destroy_process_group()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """`torch.set_default_dtype` for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def checkpoint_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full checkpoint shape by name; a tied parameter appears once, a padded vocabulary unpadded."""
    seen: set[int] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    modules = dict(model.named_modules())
    for name, parameter in loadable(model)[0].items():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        shape = tuple(getattr(parameter, "full_shape", parameter.shape))
        rows = getattr(modules[name.rpartition(".")[0]], "org_vocab_size", None)
        shapes[name] = (rows, *shape[1:]) if rows is not None else shape
    return shapes


def load(standalone: Standalone, weights: Mapping[str, torch.Tensor]) -> None:
    """Load a checkpoint: by name where the names are the model's own, else by its own `load_weights`.

    Loading by name does not run the author's `load_weights`, so a mistake in there shows as a
    disagreement between the engine, which does run it, and this reference.
    """
    parameters, buffers = loadable(standalone.model)
    own = getattr(standalone.model, "load_weights", None)
    if set(weights) <= {*parameters, *buffers} or not callable(own):
        load_weights(standalone.model, weights.items())
    else:
        own(iter(weights.items()))
