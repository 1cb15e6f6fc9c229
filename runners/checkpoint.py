"""Checkpoints that hide nothing: config.json, and safetensors of seeded adversarial weights.

Freshly initialised weights make a suite worthless: norms are one, biases zero, heads alike, logits
flat, so a dropped norm or bias changes nothing. The weights made here have logits with a real spread,
norm weights away from one, biases away from zero, rows of different size (so that heads differ), and
attention sharp enough to matter.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

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

LOGIT_SPREAD = 3.0
"""Standard deviation the logits of a model that ends in a normalisation are given, roughly."""


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
    return {
        name: _adversarial(name, shape, owners.get(name), state.get(name), seed).to(torch.float32)
        for name, shape in shapes.items()
    }


def _adversarial(
    name: str, shape: tuple[int, ...], owner: nn.Module | None, initial: torch.Tensor | None, seed: int
) -> torch.Tensor:
    # Seeded per name: adding a parameter to a model leaves all others as they were.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
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
    """The tensor in `dtype`; what float16 is too coarse for becomes its smallest normal number, and never zero."""
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
    """Write `refit/`, the same checkpoint with every tensor moved by a good part of its own size."""
    other = directory / "refit"
    other.mkdir(exist_ok=True)
    moved = {}
    for name, tensor in read_weights(directory).items():
        if not tensor.is_floating_point():
            moved[name] = tensor
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()) + 1)
        wide = tensor.float()
        size = wide.square().mean().sqrt()
        moved[name] = (wide + 0.3 * size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_weights(other, moved)
    (other / "config.json").write_text((directory / "config.json").read_text())


def _check_index(path: Path) -> None:
    """Raise ValueError if the index of a checkpoint in several files names one that is not there."""
    try:
        named = set(json.loads(path.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files: {error}") from None
    absent = sorted(str(name) for name in named if not (path.parent / str(name)).is_file())
    if absent:
        raise ValueError(f"{path} names {', '.join(absent[:3])}, which is not there")


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file in the directory, on the CPU, by name.

    Raises:
        ValueError: if there is none, one cannot be read or is not there though the index names it, or a tensor holds
            NaN or infinity; the message names the file.
    """
    tensors: dict[str, torch.Tensor] = {}
    files = sorted(directory.glob("*.safetensors"))
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
    for index in directory.glob("*.safetensors.index.json"):
        _check_index(index)
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise ValueError(f"the weights are not finite: NaN or infinity in {', '.join(bad[:5])}")
    return tensors
