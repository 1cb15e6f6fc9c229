r"""The dense decoder once more, in vLLM's own layers, as a model inside vLLM's tree is written.

Llama's architecture, for vLLM only: vLLM makes its parameters without gradients, so this model does not train. Its
pure-PyTorch reference is automatic, and because the parameters have dense's names, dense is an independent one:

    pytest --genmodel=genmodel.reference_models.vllm_layers:VllmDense \
        --genmodel-reference=genmodel.reference_models.dense:factory

What vLLM wants of a model is what is here: a class with (vllm_config, prefix), a prefix for every layer, `load_weights`
for checkpoints whose projections are fused or not, and, for pipeline parallelism, layers of other ranks left out and
IntermediateTensors handed from one rank to the next.

References:
    vLLM, vllm/model_executor/models/llama.py
    vLLM, "Basic Model", https://docs.vllm.ai/en/latest/contributing/model/basic.html

Legend of shape suffixes: T tokens of all requests, flattened, C hidden size, Q and K the query's and the key's
widths on this rank, F this rank's share of the intermediate size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        ranks = get_tensor_model_parallel_world_size()
        heads = config.num_attention_heads // ranks
        kv_heads = max(1, config.num_key_value_heads // ranks)  # fewer than ranks: replicated
        self.sizes = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
        self.qkv = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary = get_rope(
            config.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        self.attn = Attention(
            heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x_TC: Tensor) -> Tensor:
        qkv, _ = self.qkv(x_TC)
        q_TQ, k_TK, v_TK = qkv.split(self.sizes, -1)
        q_TQ, k_TK = self.rotary(positions, q_TQ, k_TK)
        out_TC: Tensor
        out_TC, _ = self.o_proj(self.attn(q_TQ, k_TK, v_TK))
        return out_TC


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_up = MergedColumnParallelLinear(
            size, [inner, inner], bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up"
        )
        self.down = RowParallelLinear(inner, size, bias=False, quant_config=quant_config, prefix=f"{prefix}.down")
        self.activation = SiluAndMul()

    def forward(self, x_TC: Tensor) -> Tensor:
        gate_up, _ = self.gate_up(x_TC)  # [T, 2 F]
        out_TC: Tensor
        out_TC, _ = self.down(self.activation(gate_up))
        return out_TC


class Layer(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream that it adds to."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = SelfAttention(vllm_config, f"{prefix}.attn")
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(vllm_config, f"{prefix}.mlp")

    def forward(self, positions: Tensor, x_TC: Tensor, residual_TC: Tensor | None) -> tuple[Tensor, Tensor]:
        # vLLM's RMSNorm adds to the residual stream and normalises the sum in one kernel.
        if residual_TC is None:
            x_TC, residual_TC = self.attn_norm(x_TC), x_TC
        else:
            x_TC, residual_TC = self.attn_norm(x_TC, residual_TC)
        x_TC = self.attn(positions, x_TC)
        x_TC, residual_TC = self.mlp_norm(x_TC, residual_TC)
        return self.mlp(x_TC), residual_TC


class VllmDense(nn.Module, SupportsPP):
    """The model; `pytest --genmodel=genmodel.reference_models.vllm_layers:VllmDense`."""

    stacked_params_mapping = (
        # parameter, name of its part in a checkpoint that is not fused, shard id
        (".qkv.", ".q_proj.", "q"),
        (".qkv.", ".k_proj.", "k"),
        (".qkv.", ".v_proj.", "v"),
        (".gate_up.", ".gate_proj.", 0),
        (".gate_up.", ".up_proj.", 1),
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.config = config
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        tied = config.tie_word_embeddings
        self.embed_tokens: Any = PPMissingLayer()
        if first or (last and tied):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, quant_config=quant_config)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: Layer(vllm_config, prefix),
            prefix=maybe_prefix(prefix, "layers"),
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if last else PPMissingLayer()
        self.lm_head: Any = PPMissingLayer()
        if last:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if tied:
                self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """int [T] -> [T, C]."""
        x_TC: Tensor = self.embed_tokens(input_ids)
        return x_TC

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Token ids and their positions, int [T], to hidden states [T, C], or to what the next pipeline rank needs."""
        if get_pp_group().is_first_rank:
            x_TC = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual_TC: Any = None
        else:
            assert intermediate_tensors is not None, "an earlier pipeline rank sends these"
            x_TC, residual_TC = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in self.layers[self.start_layer : self.end_layer]:
            x_TC, residual_TC = layer(positions, x_TC, residual_TC)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x_TC, "residual": residual_TC})
        out_TC: Tensor
        out_TC, _ = self.norm(x_TC, residual_TC)
        return out_TC

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[T, C] -> [T, V], on every rank on CPU and on the first one on CUDA."""
        logits_TV: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits_TV

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load (name, full tensor) pairs; returns the names of the parameters that were loaded.

        Raises:
            ValueError: for a name that the model does not have.
        """
        parameters: dict[str, Any] = dict(self.named_parameters(remove_duplicate=False))
        loaded: set[str] = set()
        for name, tensor in weights:
            shard: tuple[Any, ...] = ()
            target = name
            for parameter, part, shard_id in self.stacked_params_mapping:
                if part in name:
                    target, shard = name.replace(part, parameter), (shard_id,)
            if is_pp_missing_parameter(target, self):
                continue  # another pipeline rank's
            if target not in parameters:
                raise ValueError(f"{type(self).__name__} has no {target} for the checkpoint's {name}")
            loader = getattr(parameters[target], "weight_loader", default_weight_loader)
            loader(parameters[target], tensor, *shard)
            loaded.add(target)
        return loaded
