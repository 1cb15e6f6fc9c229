"""The dense decoder of plain torch.nn modules, made tensor parallel by torch's parallelize_module.

The model is written for one device. `PLAN` says how each module's weight is spread over the ranks, and
torch turns the weights into DTensors and adds the collectives, in training and in vLLM alike. All that
the model itself is told is how many ranks share its heads, since vLLM's KV cache is for a rank's own.

It loads dense.py's checkpoints, and dense is its independent reference:

    pytest --genmodel=genmodel.reference_models.dtensor:factory \
        --genmodel-reference=genmodel.reference_models.dense:factory

References:
    Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models", https://arxiv.org/abs/2307.09288
    PyTorch, "Large Scale Transformer model training with Tensor Parallel (TP)",
        https://docs.pytorch.org/tutorials/intermediate/TP_tutorial.html
    torchtitan, https://github.com/pytorch/torchtitan: models/llama3/infra/parallelize.py

Legend of shape suffixes: T tokens (any leading dimensions: [tokens] or [batch, tokens]),
C hidden size, H heads of this rank, queries or keys, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from genmodel.modeling.attention import TrainableAttention
from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models.dense import Config


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; prefix names it for vLLM's KV cache."""

    def __init__(self, config: Config, ranks: int, prefix: str) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % ranks or kv_heads % ranks:
            raise ValueError(
                f"num_attention_heads ({heads}) and num_key_value_heads ({kv_heads}) have to be divisible "
                f"by the tensor parallel size ({ranks})"
            )
        self.dim = dim
        self.q_proj = nn.Linear(size, heads * dim, bias=False)
        self.k_proj = nn.Linear(size, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(size, kv_heads * dim, bias=False)
        self.attn = TrainableAttention(heads // ranks, dim, kv_heads // ranks, prefix=prefix)
        self.o_proj = nn.Linear(heads * dim, size, bias=False)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the pairs (i, i + D / 2) of each head: [T, H * D] -> [T, H * D]."""
        x_THD = x.unflatten(-1, (-1, self.dim)).to(cos.dtype)
        left, right = x_THD.chunk(2, -1)
        turned: Tensor = x_THD * cos + torch.cat([-right, left], -1) * sin
        return turned.flatten(-2).to(x.dtype)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.q_proj(x_TC), self.k_proj(x_TC), self.v_proj(x_TC)
        out_TC: Tensor = self.o_proj(self.attn(self.rotate(q, cos, sin), self.rotate(k, cos, sin), v))
        return out_TC


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        out_TC: Tensor = self.down(F.silu(self.gate_proj(x_TC)) * self.up_proj(x_TC))
        return out_TC


class Layer(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream that it adds to."""

    def __init__(self, config: Config, ranks: int, prefix: str) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, ranks, f"{prefix}.attn")
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_TC = x_TC + self.attn(self.attn_norm(x_TC), cos, sin)
        out_TC: Tensor = x_TC + self.mlp(self.mlp_norm(x_TC))
        return out_TC


class Decoder(nn.Module):
    """The model, with the methods vLLM calls."""

    def __init__(self, config: Config, ranks: int = 1) -> None:
        super().__init__()
        self.config = config
        size, vocab = config.hidden_size, config.vocab_size
        self.embed_tokens = nn.Embedding(vocab, size)
        self.layers = nn.ModuleList(Layer(config, ranks, f"layers.{i}") for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, vocab, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)  # Llama's initializer_range

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """int [T] -> [T, C]."""
        x_TC: Tensor = self.embed_tokens(input_ids)
        return x_TC

    def rotary_table(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of position * theta^(-2i / D), [T, 1, D], from float64 angles, in float32 at least."""
        dim, theta = self.config.head_dim, self.config.rope_theta
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions_T.device) / dim
        angles = torch.outer(positions_T.flatten().double(), theta**-exponents).repeat(1, 2)
        angles = angles.view(*positions_T.shape, 1, dim)
        wide = torch.promote_types(dtype, torch.float32)
        return angles.cos().to(wide), angles.sin().to(wide)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids (or inputs_embeds [T, C]) and positions, int [tokens] or [batch, tokens], to hidden states [T, C]."""
        if inputs_embeds is None:
            assert input_ids is not None, "pass input_ids or inputs_embeds"
            inputs_embeds = self.embed_input_ids(input_ids)
        x_TC = inputs_embeds
        cos, sin = self.rotary_table(positions, x_TC.dtype)
        for layer in self.layers:
            x_TC = layer(x_TC, cos, sin)
        out_TC: Tensor = self.norm(x_TC)
        return out_TC

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[T, C] -> [T, V]."""
        logits_TV: Tensor = self.lm_head(hidden_states)
        return logits_TV

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load (name, full tensor) pairs, of which each DTensor takes its own part; returns what was loaded."""
        return load_weights(self, unfused(self.config, weights))


def unfused(config: Config, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """dense.py's checkpoints have q, k and v in one tensor, gate and up in another; a plan cuts plain blocks only."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for name, full in weights:
        if ".qkv." in name:
            parts = (name.replace("qkv", f"{x}_proj") for x in "qkv")
            yield from zip(parts, full.split([q, kv, kv]), strict=True)
        elif ".gate_up." in name:
            parts = (name.replace("gate_up", f"{x}_proj") for x in ("gate", "up"))
            yield from zip(parts, full.chunk(2), strict=True)
        else:
            yield name, full


PLAN = {
    "embed_tokens": RowwiseParallel(input_layouts=Replicate()),  # rows of the vocabulary
    "layers.*.attn.[qkv]_proj": ColwiseParallel(),  # heads
    "layers.*.attn.o_proj": RowwiseParallel(),
    "layers.*.mlp.gate_proj": ColwiseParallel(),
    "layers.*.mlp.up_proj": ColwiseParallel(),
    "layers.*.mlp.down": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),  # every rank gets all logits
}
"""What is spread over the ranks; all else (the norms) is on each of them."""


def factory(vllm_config: Any, parallel_context: ParallelContext) -> Decoder:
    """What is registered: `pytest --genmodel=genmodel.reference_models.dtensor:factory`."""
    config = Config.from_hf(vllm_config.model_config.hf_config)
    ranks = parallel_context.get_tensor_parallel_world_size()
    model = Decoder(config, ranks)
    if ranks > 1:
        mesh = parallel_context.device_mesh
        if mesh is None:
            raise ValueError(
                f"the tensor parallel size is {ranks} and there is no process group: "
                "pass ParallelContext.from_group(group) or from_mesh(device_mesh)"
            )
        parallelize_module(model, mesh, PLAN)
    if config.tie_word_embeddings:  # not before: parallelize_module makes a parameter of each module's own
        model.lm_head.weight = model.embed_tokens.weight
    return model
