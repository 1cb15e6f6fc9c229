"""Hugging Face's classes: an architecture's independent reference, its tiny configuration, its checkpoints.

The class runs in eager attention and with plainly written experts: what sdpa and the fused expert kernels
leave out of an architecture (soft-capping, attention sinks, temperature tuning) is all there.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from genmodel.runners import checkpoint
from genmodel.runners.evidence import ModuleRecord
from genmodel.runners.protocol import Unusable

transformers.utils.logging.disable_progress_bar()

MODULE = "transformers:"
AUTO = "transformers:auto"
TINY = "tiny"

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 128),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "swa_v_head_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "intermediate_size_mlp"), 224),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
        ),
        96,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    "vocab_size": 331,  # prime: divisible neither by the padding unit nor by any number of ranks
    "sliding_window": 48,  # shorter than the long prompts
    "attention_chunk_size": 64,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 512,  # with the rotary part, the one latent size of vLLM's MLA kernels
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "rotary_dim": 16,
    # State-space and linear attention: heads times their size are twice the hidden size, as many classes ask for.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 32),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    "mamba_d_ssm": 256,
    "attention_hidden_size": 256,
    "attention_head_dim": 64,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "query_pre_attn_scalar": 40,
    "original_max_position_embeddings": 64,
    "factor": 4,  # of the maximum and the original positions
    "floor_scale": 16,
    "num_nextn_predict_layers": 0,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 331,
    "laurel_rank": 16,
}
"""What a setting of this name becomes in a tiny configuration, where the architecture has it.

Head sizes are multiples of 32, the least vLLM's CPU kernels take; head counts are divisible by two ranks.
"""

MOST: dict[str, int] = {
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k"), 3),
    "n_group": 2,
    "topk_group": 1,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
}
"""What a setting of this name is at most, if it was not less."""

SCALES: dict[str, float] = {
    # At one a multiplier that is forgotten makes no difference.
    "embedding_multiplier": 1.5,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.75,
    "logits_scaling": 1.25,
    "logit_scale": 0.75,
    "routed_scaling_factor": 1.5,
    "attn_logit_softcapping": 8.0,  # near enough to the scores to bend them
    "final_logit_softcapping": 12.0,
}

_NOT_A_SETTING = {"_name_or_path", "output_attentions"}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""For special tokens outside the small vocabulary."""

POSITIONS = {"max_position_embeddings", "n_positions", "max_seq_len"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "hy_v3": {"first_k_dense_replace": 1},
    "lfm2": {"block_dim": 128, "conv_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "minimax_m2": {"rotary_dim": 16},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
"""Settings that published configurations have and vLLM reads, but that the configuration class no longer knows."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
FEWEST_LAYERS = 3


def names_class(spec: str | None) -> bool:
    """Whether a reference is spelt "transformers:…"."""
    return spec is not None and spec.startswith(MODULE)


def is_class(target: object) -> bool:
    """Whether this is a model class of transformers, or an author's of the same kind."""
    return isinstance(target, type) and issubclass(target, transformers.PreTrainedModel)


def about() -> str:
    """What reports say of a reference of transformers."""
    return f"transformers {transformers.__version__}, eager attention"


def twin(architecture: str) -> str | None:
    """The reference of the same name, such as "transformers:LlamaForCausalLM"; None if there is no such class."""
    return f"{MODULE}{architecture}" if is_class(getattr(transformers, architecture, None)) else None


def spelt(model_class: Any) -> str:
    """The reference as one that names its class."""
    return f"{MODULE}{model_class.__name__}"


def no_twin(architecture: str) -> Unusable:
    """What to say of an architecture that transformers does not have."""
    return Unusable(
        f"transformers {transformers.__version__} has no {architecture} to compare with: name another of its classes "
        "with --genmodel-reference=transformers:CLASS, or a factory of your own with my_pkg:factory"
    )


def resolve(spec: str, architecture: str | None, config: Mapping[str, Any] | None) -> Any:
    """The class that "transformers:CLASS" or "transformers:auto" names.

    Args:
        spec: the reference as it was given.
        architecture: vLLM's name of the target, if it is one of vLLM's own.
        config: the target's config, from which "auto" reads `model_type`; None where there is none yet.

    Raises:
        Unusable: one line if there is no such class.
    """
    name = spec.removeprefix(MODULE)
    if spec == AUTO:
        name = architecture or _class_for(config)
        if twin(name) is None:
            raise no_twin(name)
    found = getattr(transformers, name, None)
    if is_class(found):
        return found
    if found is not None:
        raise Unusable(f"--genmodel-reference={spec} is not a model class: one is named like LlamaForCausalLM")
    known = [known for known in dir(transformers) if known.endswith(("ForCausalLM", "LMHeadModel"))]
    raise Unusable(
        f"--genmodel-reference: transformers {transformers.__version__} has no class {name!r}{_close(name, known)}"
    )


def _class_for(config: Mapping[str, Any] | None) -> str:
    """The class for text generation that goes with the config's `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as BY_TYPE

    kind = (config or {}).get("model_type")
    if kind is None or kind not in BY_TYPE:
        raise Unusable(
            f"--genmodel-reference={AUTO} needs a config whose model_type transformers generates text with, "
            f"and {'there is none' if kind is None else f'this one is {kind!r}'}{_close(str(kind), list(BY_TYPE))}"
        )
    return str(BY_TYPE[kind])


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def config_class(model_class: Any) -> Any:
    """The class's configuration class.

    Raises:
        Unusable: if it has none.
    """
    found = getattr(model_class, "config_class", None)
    if isinstance(found, type) and issubclass(found, transformers.PretrainedConfig):
        return found
    raise Unusable(
        f"--genmodel-config={TINY}: {model_class.__name__} names no config_class to make a small configuration from; "
        "give one with --genmodel-config=FILE.json"
    )


def tiny_config(model_class: Any) -> dict[str, Any]:
    """A small configuration of a class, made from its configuration class's defaults.

    Few layers, but as many as it takes for every kind of layer to occur.

    Raises:
        Unusable: if the configuration class refuses it, or has none.
    """
    kind = config_class(model_class)
    try:
        defaults = kind().to_dict()
        changes = _shrunk(defaults, kind.attribute_map) | PUBLISHED.get(kind.model_type, {})
        found: dict[str, Any] = kind(**changes).to_dict()
    except Exception as error:  # noqa: BLE001 - a configuration class may refuse in any way
        raise Unusable(
            f"--genmodel-config={TINY}: {kind.__name__} refuses a small configuration ({_first_line(error)}); "
            "give one with --genmodel-config=FILE.json"
        ) from None
    for nested in (value for value in found.values() if isinstance(value, dict) and "model_type" in value):
        for name in _NOT_A_SETTING & nested.keys():  # which the class would refuse to read again
            del nested[name]
    computed = isinstance(getattr(kind, "head_dim", None), property)
    if "kv_lora_rank" not in found and found.get("head_dim") is None and not computed:
        found["head_dim"] = SIZES["head_dim"]  # what it is anyway; vLLM reads it of some that do not say
    if not POSITIONS & found.keys():
        found["max_position_embeddings"] = SIZES["max_position_embeddings"]  # vLLM would take 2048
    return found


def _shrunk(defaults: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Changes to a configuration's defaults that make it small."""
    layers_name = next((name for name in LAYERS if name in defaults), None)
    depth = defaults[layers_name] if layers_name is not None else 0
    per_layer = {k: v for k, v in defaults.items() if isinstance(v, list) and depth and len(v) == depth}
    layers = max([FEWEST_LAYERS, *(_to_see_every_kind(values) for values in per_layer.values())])
    changes: dict[str, Any] = {
        name: [SIZES[name]] * layers if name in SIZES else values[:layers] for name, values in per_layer.items()
    }
    if layers_name is not None:
        changes[layers_name] = layers
    for name, value in defaults.items():
        by_layer = isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)
        if by_layer and name != "id2label":
            changes[name] = {key: inner for key, inner in value.items() if int(key) < layers}
        else:
            changes |= _small(name, value)
    if "kv_lora_rank" in defaults:  # all heads share one latent, and what has a head's size is the rotary part
        multi_head_latent = {"num_key_value_heads": SIZES["num_attention_heads"], "head_dim": SIZES["qk_rope_head_dim"]}
        changes |= {name: value for name, value in multi_head_latent.items() if name in changes}
    return {name: value for name, value in changes.items() if name not in aliases or aliases[name] not in changes}


def _to_see_every_kind(values: list[Any]) -> int:
    """How many of the first layers have one of each kind; lists of all-different values tell nothing."""
    kinds = [values.index(value) + 1 for value in values]
    return max(kinds) if len(set(kinds)) <= len(values) // 2 else 0


def _small(name: str, value: Any) -> dict[str, Any]:
    """The change to one setting, if any."""
    if name.endswith("_token_id"):
        inside = SPECIAL_TOKENS.get(name, 0)
        largest = max(value) if isinstance(value, list) else value or 0
        return {name: [inside] if isinstance(value, list) else inside} if largest >= SIZES["vocab_size"] else {}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        inner = {key: small for k, v in value.items() for key, small in _small(k, v).items()}
        nested = "model_type" in value  # a configuration inside another, which adds its own defaults
        return {name: inner if nested else {**value, **inner}} if inner else {}
    if isinstance(value, bool | list) or (value is None and name not in ("num_key_value_heads", "num_experts_per_tok")):
        return {}
    if name in SIZES:
        return {name: SIZES[name]}
    if name in MOST:
        return {name: min(value or MOST[name], MOST[name])}
    return {name: SCALES[name]} if name in SCALES else {}


def load_config(model_class: Any, directory: Path) -> Any:
    """The class's own configuration of a checkpoint directory, whatever `model_type` config.json names.

    Raises:
        Unusable: if the configuration class refuses what is in there.
    """
    kind = config_class(model_class)
    found = json.loads((directory / "config.json").read_text())
    found.pop("model_type", None)
    try:
        return kind.from_dict(found)
    except Exception as error:  # noqa: BLE001 - a configuration class may refuse in any way
        raise Unusable(f"--genmodel-config: {kind.__name__} refuses it: {_first_line(error)}") from None


@functools.cache
def _untouched(model_class: Any) -> Any:
    """The class from a copy of its module.

    vLLM runs many an architecture by Hugging Face's own class, and changes that for its compiler.
    """
    spec = importlib.util.find_spec(model_class.__module__)
    if spec is None or spec.loader is None or not model_class.__module__.startswith("transformers."):
        return model_class
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, model_class.__name__)


def build(model_class: Any, directory: Path, dtype: torch.dtype) -> Any:
    """The class with random weights and the interface of a target: flattened tokens in, hidden states out.

    The modules keep their names. `load_weights` takes a checkpoint as transformers would have saved it.

    Args:
        model_class: a class of transformers.
        directory: what config.json is read from.
        dtype: of the parameters; in float64 nothing is computed in less, as such classes like to.

    Raises:
        Unusable: if the configuration does not fit the class.
    """
    config = load_config(model_class, directory)
    model_class = _untouched(model_class)
    model = _construct(model_class, config, dtype)
    whole = model.forward
    last: dict[str, torch.Tensor] = {}

    def forward(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden] as they enter the head."""
        seen: list[torch.Tensor] = []
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            with _Wide(dtype):
                logits = whole(input_ids=input_ids[None], position_ids=positions[None], use_cache=False).logits
        finally:
            hook.remove()
        last.update(hidden=seen[-1][0], logits=logits[0])
        return last["hidden"]

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of the hidden states that `forward` gave last."""
        if hidden is not last.get("hidden"):
            raise ValueError("the reference computes logits only of what its forward returned last")
        return last["logits"]

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        loaded = _converted(model_class, config, dict(weights), dtype)
        model.load_state_dict(loaded.state_dict())

    model.forward, model.compute_logits, model.load_weights = forward, compute_logits, load_weights
    return model


def _construct(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    try:
        with _Wide(dtype):
            model = model_class._from_config(config, dtype=dtype, **_PLAIN).eval()  # noqa: SLF001 - its public name builds from a name
    except Exception as error:  # noqa: BLE001 - a class may refuse a configuration in any way
        raise Unusable(
            f"transformers:{model_class.__name__} does not build from this config: {_first_line(error)}"
        ) from None
    for parameter in model.parameters():  # some modules name a dtype of their own, which loading overrides
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


_PLAIN: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}


def _converted(model_class: Any, config: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The model with a checkpoint as transformers saves it, whose names and shapes need not be the modules' own.

    Raises:
        Unusable: if tensors are missing, unknown or of another shape, naming them.
    """
    loaded, report = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **_PLAIN
    )
    wrong = {
        "is missing": report["missing_keys"],
        "is unknown to it": report["unexpected_keys"],
        "has another shape": [name for name, *_ in report["mismatched_keys"]],
    }
    said = [f"{', '.join(sorted(names)[:5])} {what}" for what, names in wrong.items() if names]
    if said:
        raise Unusable(f"the checkpoint does not fit transformers:{model_class.__name__}: {'; '.join(said)}")
    return loaded


class _Wide(TorchFunctionMode):
    """Computes in float64 what a float64 model would compute in float32: norms, softmax, rotary angles."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._active = dtype is torch.float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._active:
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def adversarial_checkpoint(model_class: Any, directory: Path, seed: int) -> dict[str, torch.Tensor]:
    """Seeded adversarial weights of a class, float32, under the names transformers saves them with."""
    model = _construct(_untouched(model_class), load_config(model_class, directory), torch.float32)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    biases = {n: tuple(b.shape) for n, b in _persistent_buffers(model) if n.endswith("bias") and b.is_floating_point()}
    made = checkpoint.adversarial_weights(model, {**shapes, **biases}, seed)
    for name, owner in model.named_modules():
        if owner is model.get_output_embeddings() and (weight := f"{name}.weight") in shapes:
            made[weight] = made[weight] * checkpoint.LOGIT_SPREAD
    with torch.no_grad():
        for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if name in made:
                value.copy_(made[name])
    with tempfile.TemporaryDirectory(dir=directory) as saved:
        model.save_pretrained(saved)
        return checkpoint.read_weights(Path(saved))


_ARRANGED_OTHERWISE = {
    "embed_tokens",
    "router",
    "experts",
    "query_key_value",
    "qkv_proj",
    "c_attn",
    "Wqkv",
    "gate_up_proj",
}


def comparable(record: ModuleRecord) -> ModuleRecord:
    """What of a record of such a class can be compared with vLLM's modules of the same names.

    Not what goes into them, for the two pass arguments in different orders; not what attention and whole layers give,
    for one may have added the residual and the other pass it on; not embeddings and routers, of which one scales its
    output and the other leaves that to its caller; not the experts, to which vLLM adds shared ones; not
    fused projections, in which the two order the heads differently; and not the activation of a gated MLP, which vLLM
    multiplies in the same go.
    """
    trunk = {
        whole
        for name, kind in record.classes.items()
        if "Attention" in kind
        for whole in itertools.accumulate(name.split("."), "{}.{}".format)
    }
    kept = [
        point
        for point in record.points
        if point.kind == "output" and point.part == "0" and point.module not in {"", *trunk}
    ]
    own = {f"{name.removesuffix('gate_proj')}act_fn" for name in record.classes if name.endswith(".gate_proj")}
    return replace(
        record,
        points=tuple(p for p in kept if p.module.rpartition(".")[2] not in _ARRANGED_OTHERWISE and p.module not in own),
    )


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    kept = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _first_line(error: BaseException) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
