"""A dense decoder of Megatron-core's parallel layers: an author's own library, inside vLLM.

RMSNorm, rotary positions, grouped-query attention and SwiGLU, as in dense.py, which has the same
parameter names and is this model's independent reference. What differs is what an author of a
Megatron model brings along: Megatron's linear layers and embedding, their configuration and process
group, and Megatron's own order of rows in its fused projections. Needs `pytest-genmodel[megatron]`.

References:
    Shoeybi et al. 2019, "Megatron-LM", https://arxiv.org/abs/1909.08053
    Megatron-core 0.16, https://github.com/NVIDIA/Megatron-LM: tensor_parallel/layers.py,
        transformer/attention.py (order of query, key and value rows), transformer/mlp.py (gate and up)

Legend of shape suffixes: T tokens (any leading dimensions: [tokens] or [batch, tokens]),
C hidden size, G query groups (one for each kv head), Q query heads in a group, D head dimension,
F intermediate size, V vocabulary. G and F are this rank's share; C and V are full on every rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from genmodel.modeling.attention import TrainableAttention
from genmodel.modeling.collectives import gather_from_group
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models.dense import Config

OLDEST = "0.16"
try:
    import megatron.core as mcore
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
except ModuleNotFoundError as error:
    raise ImportError(
        f"{__name__} needs megatron-core {OLDEST} or newer: pip install 'megatron-core>={OLDEST}' ({error})"
    ) from None
if Version(mcore.__version__) < Version(OLDEST):
    raise ImportError(
        f"{__name__} needs megatron-core {OLDEST} or newer, and {mcore.__version__} is installed: "
        f"pip install 'megatron-core>={OLDEST}'"
    )


class Megatron:
    """Makes Megatron's layers for the tensor parallel group that a ParallelContext names.

    Raises:
        ValueError: there is no process group.
    """

    def __init__(self, context: ParallelContext) -> None:
        group = context.get_tensor_parallel_group()
        if group is None:
            raise ValueError(
                "Megatron's layers need a process group, for a single process too: torch.distributed.init_process_group"
                "(...), then ParallelContext.from_group(torch.distributed.group.WORLD)"
            )
        self.rank, self.size = group.rank(), group.size()
        self.common = {
            "config": mcore.ModelParallelConfig(
                tensor_model_parallel_size=self.size,
                params_dtype=torch.get_default_dtype(),
                # On any device: each rank draws the full tensor from torch's generator and keeps its own part
                # of it. The other way needs Megatron's random states, which are for CUDA only.
                use_cpu_initialization=True,
            ),
            "init_method": partial(nn.init.normal_, std=0.02),  # Llama's initializer_range
            "tp_group": group,
        }

    def column(self, size_in: int, size_out: int, stride: int = 1) -> Any:
        """Holds a share of the rows; `stride` says how many matrices are fused in them."""
        return ColumnParallelLinear(size_in, size_out, bias=False, stride=stride, **self.common)

    def row(self, size_in: int, size_out: int) -> Any:
        """Holds a share of the columns; takes a share of the input, gives the full output."""
        more = {"input_is_parallel": True, "skip_bias_add": False}
        return RowParallelLinear(size_in, size_out, bias=False, **more, **self.common)

    def embedding(self, rows: int, size: int) -> Any:
        """Holds a share of the rows."""
        return VocabParallelEmbedding(rows, size, **self.common)

    def padded(self, vocab_size: int) -> int:
        """The smallest size, at least this one, that the ranks divide, as Megatron asks of a vocabulary."""
        return -(-vocab_size // self.size) * self.size

    def load_rows(self, parameter: Tensor, full_VC: Tensor, *, rows: int) -> None:
        """A `weight_loader`, given how many rows there are: keep this rank's block; zeros make them divisible."""
        if len(full_VC) != rows:
            raise ValueError(f"the table has {rows} rows, and the checkpoint's {len(full_VC)}")
        missing = len(parameter) * self.size - rows
        self.keep(parameter, F.pad(full_VC, (0, 0, 0, missing)).chunk(self.size)[self.rank])

    @staticmethod
    def keep(parameter: Tensor, share: Tensor) -> None:
        """Copy what fits; copy_ alone would repeat a single column, and take integers for weights."""
        if share.shape != parameter.shape or not share.is_floating_point():
            raise ValueError(f"a parameter of {list(parameter.shape)} is given {list(share.shape)}, {share.dtype}")
        parameter.data.copy_(share)


class Rotary:
    """Turns the pair (i, i + D / 2) of each head by position * theta^(-2i / D), as a complex number."""

    def __init__(self, positions_T: Tensor, head_dim: int, theta: float) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_T.device) / head_dim
        angles = positions_T[..., None] * theta**-exponents
        self.turn = torch.polar(torch.ones_like(angles), angles)[..., None, None, :]  # [T, 1, 1, D / 2]

    def __call__(self, x_TGQD: Tensor) -> Tensor:
        left, right = x_TGQD.to(torch.promote_types(x_TGQD.dtype, torch.float32)).chunk(2, -1)
        turned = torch.complex(left, right) * self.turn.to(torch.promote_types(left.dtype, torch.complex64))
        return torch.cat([turned.real, turned.imag], -1).to(x_TGQD.dtype)


class Attention(nn.Module):
    """Grouped-query attention; prefix names it for vLLM's KV cache."""

    def __init__(self, config: Config, megatron: Megatron, prefix: str) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if heads % kv_heads or kv_heads % megatron.size:
            raise ValueError(
                f"num_attention_heads ({heads}) has to be divisible by num_key_value_heads ({kv_heads}), "
                f"and that by the tensor parallel size ({megatron.size})"
            )
        self.megatron, self.dim = megatron, dim
        self.groups, self.queries = kv_heads // megatron.size, heads // kv_heads
        qkv = self.qkv = megatron.column(config.hidden_size, (heads + 2 * kv_heads) * dim)
        qkv.weight.weight_loader = self.load_qkv
        self.attn = TrainableAttention(self.groups * self.queries, dim, self.groups, prefix=prefix)
        self.o_proj = megatron.row(heads * dim, config.hidden_size)

    def load_qkv(self, parameter: Tensor, full: Tensor) -> None:
        """A `weight_loader`: [all q; all k; all v] of a checkpoint become [q..; k; v] group by group.

        In this order, Megatron's, a block of the rows is whole groups, so that ranks can have one each.
        """
        groups = self.groups * self.megatron.size
        q, k, v = full.unflatten(0, (-1, self.dim)).split([groups * self.queries, groups, groups])  # [.., D, C]
        mixed = torch.cat([q.unflatten(0, (groups, -1)), k.unsqueeze(1), v.unsqueeze(1)], 1)  # [G, Q + 2, D, C]
        self.megatron.keep(parameter, mixed.flatten(0, 2).chunk(self.megatron.size)[self.megatron.rank])

    def forward(self, x_TC: Tensor, rotary: Rotary) -> Tensor:
        mixed, _ = self.qkv(x_TC)
        mixed = mixed.unflatten(-1, (self.groups, self.queries + 2, self.dim))  # [T, G, Q + 2, D]
        q_TGQD, k_TG1D, v_TG1D = mixed.split([self.queries, 1, 1], -2)
        x_THD = self.attn(rotary(q_TGQD).flatten(-3), rotary(k_TG1D).flatten(-3), v_TG1D.flatten(-3))
        out_TC: Tensor
        out_TC, _ = self.o_proj(x_THD)
        return out_TC


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), a rank's rows being [its share of gate; its share of up]."""

    def __init__(self, config: Config, megatron: Megatron) -> None:
        super().__init__()
        self.gate_up = megatron.column(config.hidden_size, 2 * config.intermediate_size, stride=2)
        self.down = megatron.row(config.intermediate_size, config.hidden_size)

    def forward(self, x_TC: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TC)[0].chunk(2, -1)
        out_TC: Tensor
        out_TC, _ = self.down(F.silu(gate_TF) * up_TF)
        return out_TC


class Layer(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream that it adds to."""

    def __init__(self, config: Config, megatron: Megatron, prefix: str) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, megatron, f"{prefix}.attn")
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, megatron)

    def forward(self, x_TC: Tensor, rotary: Rotary) -> Tensor:
        x_TC = x_TC + self.attn(self.attn_norm(x_TC), rotary)
        out_TC: Tensor = x_TC + self.mlp(self.mlp_norm(x_TC))
        return out_TC


class MegatronDense(nn.Module):
    """The model, with the methods vLLM calls; a plain PyTorch module in training."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        super().__init__()
        megatron = Megatron(context)
        self.config, self.context = config, context
        size, rows = config.hidden_size, megatron.padded(config.vocab_size)
        self.embed_tokens = megatron.embedding(rows, size)
        self.layers = nn.ModuleList(Layer(config, megatron, f"layers.{i}") for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = megatron.column(size, rows)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for parameter in (self.embed_tokens.weight, self.lm_head.weight):
            parameter.weight_loader = partial(megatron.load_rows, rows=config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """int [T] -> [T, C]."""
        x_TC: Tensor = self.embed_tokens(input_ids)
        return x_TC

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
        rotary = Rotary(positions, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers:
            x_TC = layer(x_TC, rotary)
        out_TC: Tensor = self.norm(x_TC)
        return out_TC

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[T, C] -> [T, V], on every rank."""
        logits, _ = self.lm_head(hidden_states)
        # Megatron's own gather_output=True allocates on the CUDA device; this works on a CPU as well.
        return gather_from_group(logits, self.context)[..., : self.config.vocab_size]


def factory(vllm_config: Any, parallel_context: ParallelContext) -> MegatronDense:
    """What is registered: `pytest --genmodel=genmodel.reference_models.megatron:factory`."""
    return MegatronDense(Config.from_hf(vllm_config.model_config.hf_config), parallel_context)
