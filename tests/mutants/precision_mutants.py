"""Models that compute in another precision in training than in the engine, or in values that float16 does not have.

Every difference is smaller than bfloat16's own noise, so that no comparison of logits in bfloat16 sees it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genmodel.modeling._vllm import engine_config
from genmodel.modeling.collectives import gather_from_group
from mutants.dense_mutants import mutant

FP32_HEAD = "trl#4303, NeMo-RL#3936"


@mutant(caught_by="logits.module_dtypes", reports=FP32_HEAD, alone=True)
def head_in_float32_in_training_only(model: Any) -> None:
    """The trainer computes logits in float32, the engine in bfloat16."""
    if engine_config() is None:
        head_in_float32(model)


@mutant(caught_by="logits.module_dtypes", reports=FP32_HEAD, tp=(1, 2), alone=True)
def head_in_float32_in_the_engine_only(model: Any) -> None:
    """The other way round, and at every size."""
    if engine_config() is not None:
        head_in_float32(model)


@mutant(caught_by="logits.module_dtypes", reports="", tp=(1, 2), alone=True)
def residual_in_float32_in_the_engine_only(model: Any) -> None:
    """The engine adds the layers up in float32, the trainer in bfloat16."""
    if engine_config() is not None:
        residual_in_float32(model)


@mutant(caught_by="logits.module_dtypes", reports="", alone=True)
def one_norm_in_float32_in_training_only(model: Any) -> None:
    """One norm of many does not cast its result back."""
    if engine_config() is None:
        norm, attn = model.layers[1].attn_norm, model.layers[1].attn
        forward, attend = norm.forward, attn.forward
        norm.forward = lambda x: forward(x.float())
        attn.forward = lambda x, *tables: attend(x.to(model.norm.weight.dtype), *tables)


@mutant(caught_by="logits.module_dtypes", reports=FP32_HEAD, alone=True)
def head_in_float32_in_training_mode(model: Any) -> None:
    """The branch asks for the mode, not for vLLM."""
    head = model.lm_head
    narrow = head.forward
    head_in_float32(model)
    head.forward = lambda hidden, wide=head.forward: (wide if model.training else narrow)(hidden)


@mutant(caught_by="logits.module_dtypes", reports="", alone=True)
def one_layer_in_float32_while_recording(model: Any) -> None:
    """The branch asks whether autograd records: the layer adds in float32 only where gradients are taken."""
    layer = model.layers[1]
    forward, rest = layer.forward, model.layers[2]

    def added(x: Tensor, *tables: Tensor) -> Tensor:
        out: Tensor = forward(x, *tables)
        return out.float() + x.float() / 3 if torch.is_grad_enabled() else out + x / 3

    layer.forward = added
    rest.forward = lambda x, *tables, inner=rest.forward: inner(x.to(model.norm.weight.dtype), *tables)


@mutant(caught_by="logits.module_dtypes", reports="", tp=(1, 2), alone=True)
def norm_statistics_narrow_in_the_engine(model: Any) -> None:
    """What the norm gives is bfloat16 on both sides; the engine computes its statistics in bfloat16 too."""
    if engine_config() is not None:
        norm = model.layers[1].mlp_norm
        norm.forward = lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


@mutant(caught_by="logits.module_dtypes", reports="", alone=True)
def activation_wide_in_training_mode(model: Any) -> None:
    """A gated activation in float32 and cast back, in training mode only."""
    mlp = model.layers[2].mlp
    narrow = mlp.forward

    def by_mode(x: Tensor) -> Tensor:
        if model.training:
            gate, up = mlp.gate_up(x).chunk(2, -1)
            out: Tensor = mlp.down((F.silu(gate.float()) * up.float()).to(x.dtype))
        else:
            out = narrow(x)
        return out

    mlp.forward = by_mode


@mutant(caught_by="logits.float16_range", reports="transformers#9295, transformers#39972", alone=True)
def residual_beyond_float16(model: Any) -> None:
    """Embeddings are scaled up by so much that the residual stream leaves float16's range; norms hide it."""
    embed = model.embed_tokens.forward
    model.embed_tokens.forward = lambda input_ids: 1e5 * embed(input_ids)


def head_in_float32(model: Any) -> None:
    """Right, if it is so on both sides."""
    head = model.lm_head
    context = head.parallel_context

    def forward(hidden: Tensor) -> Tensor:
        logits = gather_from_group(F.linear(hidden.float(), head.weight.float()), context)
        return logits[..., : head.num_embeddings]

    head.forward = forward


def residual_in_float32(model: Any) -> None:
    """Right, if it is so on both sides: norms cast what they give, and layers add in float32."""
    embed = model.embed_tokens.forward
    model.embed_tokens.forward = lambda input_ids: embed(input_ids).to(
        torch.promote_types(model.norm.weight.dtype, torch.float32)
    )
    model.rotary_table = lambda positions, _, table=model.rotary_table: table(positions, model.norm.weight.dtype)
    for norm in [model.norm, *(n for layer in model.layers for n in (layer.attn_norm, layer.mlp_norm))]:
        norm.forward = lambda x, n=norm, forward=norm.forward: forward(x).to(n.weight.dtype)
