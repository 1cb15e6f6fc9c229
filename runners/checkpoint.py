"""Checkpoints that hide nothing: config.json, and safetensors of seeded adversarial weights.

Freshly initialised weights make a suite worthless: norms are one, biases zero, heads alike, logits
flat, so a dropped norm or bias changes nothing. The weights made here have logits with a real spread,
norm weights away from one, biases away from zero, rows of different size (so that heads differ), and
attention sharp enough to matter.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from genmodel.modeling.loading import loadable
from genmodel.runners.evidence import COMPUTED_TABLE
from genmodel.runners.workload import edge_tokens

TINY_CONFIG: dict[str, Any] = {
    # Llama's names, which most models read; head_dim 32 is the least vLLM's CPU kernels take.
    "model_type": "genmodel",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 208,
    "vocab_size": 331,  # prime: divisible neither by the padding unit nor by any number of ranks
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,  # far from what is often hard-coded, and large enough to be seen at every norm
    "layer_norm_eps": 1e-3,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""The configuration of a target that brings none."""

SMALL_ROWS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""What the rows of the `edge_tokens` are scaled by: ascending, so that each outweighs what it attends to."""
SMALLEST_TABLE = 64
"""Rows of an embedding that has some to spare; what is looked up in smaller ones are kinds, not tokens."""

VISIBLE_EPSILON = 1e-3
"""An epsilon that shows in float32 where a norm's input is of unit scale: ten times it moves what comes out by 0.5%."""
QUIETEST = 0.01
QUIETEST_TIED = 0.1
"""What the residual stream is scaled by at least: float16 has to hold the weights that write into it, and where the
head is the embedding's table, logits become as small, which may not hide a soft cap."""
EPSILONS = ("eps", "epsilon", "variance_epsilon", "norm_eps")
"""Attributes in which norms keep theirs."""
WRITES = re.compile(r"(^|\.)(o_proj|out_proj|wo|c_proj|attn_out|down_proj|down|w2|fc2|fc_out|dense_4h_to_h)(\.|_|$)")
"""Names of the layers that write into the residual stream, where their class is not one of RowParallelLinear."""

LOGIT_SPREAD = 3.0
"""Standard deviation the logits of a model that ends in a normalisation are given, roughly."""


INDEX = "model.safetensors.index.json"
"""Which tensor is in which file, of a checkpoint in several."""


def write_config(directory: Path, config: Mapping[str, Any], arch: str, dtype: str) -> None:
    """Write config.json so that vLLM builds `arch` from it."""
    merged = {"model_type": "genmodel", **config, "architectures": [arch], "torch_dtype": dtype}
    merged.pop("auto_map", None)
    merged.pop("dtype", None)
    (directory / "config.json").write_text(json.dumps(merged, indent=2))


def adversarial_weights(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """A full state dict for `model`, float32, the same for the same names, shapes and seed.

    Args:
        model: a build at TP=1, for the kinds of its modules; its values decide only whether a vector
            is centred on zero or on one.
        shapes: checkpoint shape by parameter name; tied parameters appear once.
        seed: of all values.
    """
    owners = {
        f"{path}.{name}".lstrip("."): module
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    state = model.state_dict(keep_vars=True)
    scale = _residual_scale(model, shapes, owners)
    made: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        tensor = _adversarial(name, shape, owners.get(name), state.get(name), seed).to(torch.float32)
        made[name] = tensor * scale if _writes(name, owners.get(name)) else tensor
    return made


def _residual_scale(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], owners: Mapping[str, nn.Module]) -> float:
    """What to scale by all that writes into the residual stream, so that every norm shows its epsilon.

    Norms undo the scale: a small epsilon is to a small residual stream what a large one is to a usual one.
    """
    found = [getattr(module, name, None) for module in model.modules() for name in EPSILONS]
    epsilons = [float(value) for value in found if isinstance(value, float) and 0 < value < VISIBLE_EPSILON]
    tables = [shapes[name] for name, owner in owners.items() if name in shapes and _is_table(owner)]
    has_head = any(sum(shape == table for shape in shapes.values()) > 1 for table in tables)
    scale = math.sqrt(min(epsilons, default=VISIBLE_EPSILON) / VISIBLE_EPSILON)
    return max(QUIETEST if has_head else QUIETEST_TIED, scale)


def _writes(name: str, owner: nn.Module | None) -> bool:
    """Whether a parameter's layer writes into the residual stream."""
    return _is_table(owner) or "RowParallel" in type(owner).__name__ or WRITES.search(name) is not None


def _is_table(owner: nn.Module | None) -> bool:
    return is_embedding(owner) and "LMHead" not in type(owner).__name__


def adversarial_buffers(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Persistent buffers for a checkpoint: what training or a constructor gave them, moved; float32 and integers.

    What their values mean is kept, as far as values tell: signs, zeros, masks and tables of integers.

    Args:
        model: a build at TP=1.
        seed: of all values.
    """
    made: dict[str, torch.Tensor] = {}
    for name, buffer in persistent_buffers(model).items():
        shape = tuple(getattr(buffer, "full_shape", buffer.shape))
        held = (buffer.to_local() if isinstance(buffer, DTensor) else buffer).detach().cpu().clone()
        if not held.is_floating_point() or COMPUTED_TABLE.search(name):
            made[name] = held
            continue
        wide = held.float()
        if wide.isinf().any():
            continue  # a mask, that no file of weights may have
        sane = (
            shape == tuple(held.shape) and bool(wide.isfinite().all()) and (_is_mask(wide) or wide.abs().lt(1e6).all())
        )
        if not sane:  # memory that nobody wrote to
            made[name] = _adversarial(name, shape, None, None, seed).float()
        elif not wide.any():
            made[name] = 0.15 * torch.randn(shape, generator=_generator(name, seed))
        else:
            made[name] = _moved(wide, _generator(name, seed))
    return made


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that a checkpoint of the model has, by their first names; vLLM's own layers take care of theirs."""
    foreign = {n: type(module).__module__.startswith("vllm.") for n, module in model.named_modules()}
    buffers = loadable(model)[1]
    first = {id(buffer): name for name, buffer in reversed(buffers.items())}
    return {
        name: buffers[name]
        for name in buffers
        if first[id(buffers[name])] == name
        and not foreign.get(name.rpartition(".")[0], False)
        and not buffers[name].is_complex()
    }


def _adversarial(
    name: str, shape: tuple[int, ...], owner: nn.Module | None, initial: torch.Tensor | None, seed: int
) -> torch.Tensor:
    # Seeded per name: adding a parameter to a model leaves all others as they were.
    generator = _generator(name, seed)
    normal = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        if name.endswith("bias"):
            return 0.15 * normal
        centred_on_zero = initial is not None and initial.numel() > 0 and bool((initial == 0).all())
        return (0.0 if centred_on_zero else 1.0) + 0.5 * (2 * torch.rand(shape, generator=generator) - 1)
    if is_embedding(owner):
        # Also right as a tied head: hidden states of unit scale times this give LOGIT_SPREAD.
        rows = normal * LOGIT_SPREAD / math.sqrt(shape[-1])
        return rows if "LMHead" in type(owner).__name__ else _with_small_rows(rows)
    row_scale = torch.exp(torch.rand(shape[:-1], generator=generator) - 0.5).unsqueeze(-1)
    return normal * row_scale / math.sqrt(_fan_in(shape, owner))


def _with_small_rows(table: torch.Tensor) -> torch.Tensor:
    """An embedding table [V, C] of which the workload's prompt of `edge_tokens` looks up nearly nothing.

    The epsilon of a norm decides what becomes of rows whose variance is below it. What a branch adds to such a row is
    at most 1 / sqrt(epsilon) of it, so that it is some layers before the residual stream has its usual size, and the
    smaller the row, the more of them: at one or other of these tokens, every norm's input is as small as its epsilon.
    """
    if len(table) < SMALLEST_TABLE:
        return table
    for token, size in zip(edge_tokens(len(table)), SMALL_ROWS, strict=True):
        table[token] *= size
    return table


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))


def _moved(wide: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every value moved by a good part of the tensor's size, float32; what has one sign keeps it, and a mask all."""
    normal = torch.randn(wide.shape, generator=generator)
    if _is_mask(wide):
        return wide
    if bool((wide >= 0).all()) or bool((wide <= 0).all()):
        return wide * torch.exp(0.3 * normal)  # a variance, or a table of frequencies
    return wide + 0.3 * wide.square().mean().sqrt() * normal


def _is_mask(wide: torch.Tensor) -> bool:
    """Whether there are two values, and too many of them for that to be chance."""
    if wide.numel() <= 8:
        return False
    low, high = wide.aminmax()
    return bool(low < high) and bool(((wide == low) | (wide == high)).all())


def _fan_in(shape: tuple[int, ...], owner: nn.Module | None) -> float:
    """How many inputs an output sums over."""
    if len(shape) == 2:
        return shape[-1]
    if owner is not None and "Conv" in type(owner).__name__:
        return math.prod(shape[1:])
    return math.sqrt(shape[-1] * shape[-2])  # experts side by side, whose matrices some models keep transposed


def is_embedding(module: nn.Module | None) -> bool:
    """Whether the module looks rows up: ours, PyTorch's, Megatron's and vLLM's are all named so."""
    return module is not None and ("Embedding" in type(module).__name__ or "LMHead" in type(module).__name__)


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`; what float16 is too coarse for becomes its smallest normal number, and never zero.

    Tensors of integers stay what they are.
    """
    if not tensor.is_floating_point():
        return tensor
    smallest = torch.finfo(dtype).tiny
    vanishing = (tensor != 0) & (tensor.abs() < smallest)
    return torch.where(vanishing, tensor.sign() * smallest, tensor).to(dtype)


def save_weights(directory: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write model.safetensors; tensors must not share memory."""
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )


def save_refit_weights(directory: Path, seed: int) -> None:
    """Write `refit/`, the same checkpoint with every tensor, buffers too, moved by a good part of its own size."""
    other = directory / "refit"
    other.mkdir(exist_ok=True)
    moved = {}
    for name, tensor in read_weights(directory).items():
        generator = _generator(f"{name} refit", seed)
        moves = tensor.is_floating_point() and tensor.numel() and not COMPUTED_TABLE.search(name)
        moved[name] = _moved(tensor.float(), generator).to(tensor.dtype) if moves else tensor
    save_weights(other, moved)
    (other / "config.json").write_text((directory / "config.json").read_text())


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the checkpoint: those that its index names, as vLLM reads it, else all.

    Raises:
        ValueError: if the index cannot be read, or names a file that is not there.
    """
    files = sorted(directory.glob("*.safetensors"))
    index = directory / INDEX
    if not index.is_file():
        return files
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error}") from None
    absent = sorted(str(name) for name in named if not (directory / str(name)).is_file())
    if absent:
        raise ValueError(f"{index} names {', '.join(absent[:3])}, which is not there")
    return [path for path in files if path.name in named]


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file of the checkpoint, on the CPU, by name.

    Raises:
        ValueError: if there is none, one cannot be read or is not there though the index names it, or a tensor holds
            NaN or infinity; the message names the file.
    """
    tensors: dict[str, torch.Tensor] = {}
    files = weight_files(directory)
    for path in files:
        if not path.is_file():  # or reading a pipe would wait for ever
            raise ValueError(f"{path} {'leads nowhere' if path.is_symlink() else 'is not a file'}")
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            size = path.stat().st_size
            raise ValueError(f"{path} ({size} bytes) cannot be read as safetensors: {error}") from None
    if not files:
        raise ValueError(f"no *.safetensors file in {directory}")
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise ValueError(f"the weights are not finite: NaN or infinity in {', '.join(bad[:5])}")
    return tensors
