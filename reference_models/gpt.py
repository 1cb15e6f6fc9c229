"""A GPT: learned positions, LayerNorm, GELU, biases everywhere, one embedding tied to the head.

The architecture of GPT-2, in one file, for training and for vLLM, at any tensor parallel size, built
on the whole attention block of this package, TrainableFlashAttention.

References:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2)
    Ba et al. 2016, "Layer Normalization", https://arxiv.org/abs/1607.06450
    Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415
    Press and Wolf 2017, "Using the Output Embedding to Improve Language Models", https://arxiv.org/abs/1608.05859
    Karpathy, nanoGPT, https://github.com/karpathy/nanoGPT

Legend of shape suffixes: T tokens (any leading dimensions: [tokens] or [batch, tokens]),
C hidden size, F this rank's share of the intermediate size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling.attention import TrainableFlashAttention
from genmodel.modeling.layers import ColumnParallelLinear, ParallelLMHead, RowParallelLinear, VocabParallelEmbedding
from genmodel.modeling.parallel_context import ParallelContext


@dataclass(kw_only=True, slots=True, frozen=True)
class Config:
    """The shape of the model; the names are those of a Llama config.json, so that both models read one."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    @classmethod
    def from_hf(cls, hf_config: Any) -> Self:
        """From a Hugging Face config, or anything with its attributes; others are ignored.

        In particular num_key_value_heads (every head has its own) and tie_word_embeddings (always).

        Raises:
            ValueError: an attribute is missing.
        """
        optional = ("layer_norm_eps", "attention_dropout")
        required = [field.name for field in fields(cls) if field.name not in optional]
        missing = [name for name in required if not hasattr(hf_config, name)]
        if missing:
            raise ValueError(f"the config has no {', '.join(missing)}; gpt needs {', '.join(required)}")
        present = [name for name in optional if hasattr(hf_config, name)]
        return cls(**{name: getattr(hf_config, name) for name in (*required, *present)})


class MLP(nn.Module):
    """One hidden layer of GELU: down(gelu(up x + b) + c)."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.up = ColumnParallelLinear(size, inner, bias=True, parallel_context=context)
        self.down = RowParallelLinear(inner, size, bias=True, parallel_context=context)

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        h_TF = F.gelu(self.up(x_TC), approximate="tanh")
        out_TC: Tensor = self.down(h_TF)
        return out_TC


class Layer(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream that it adds to."""

    def __init__(self, config: Config, context: ParallelContext, prefix: str) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = TrainableFlashAttention(
            config.hidden_size,
            config.num_attention_heads,
            dropout=config.attention_dropout,
            bias=True,
            parallel_context=context,
            prefix=prefix,
        )
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, context)

    def forward(self, x_TC: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        x_TC = x_TC + self.attn(self.attn_norm(x_TC))
        out_TC: Tensor = x_TC + self.mlp(self.mlp_norm(x_TC))
        return out_TC


class GPT(nn.Module):
    """The model, with the methods vLLM calls; a plain PyTorch module in training."""

    def __init__(self, config: Config, parallel_context: ParallelContext | None = None) -> None:
        super().__init__()
        context = parallel_context if parallel_context is not None else ParallelContext()
        self.config = config
        size, vocab = config.hidden_size, config.vocab_size
        self.embed_tokens = VocabParallelEmbedding(vocab, size, parallel_context=context)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, size)
        self.layers = nn.ModuleList(Layer(config, context, f"layers.{i}") for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.lm_head = ParallelLMHead(vocab, size, parallel_context=context).tie_weights(self.embed_tokens)
        with torch.no_grad():
            # GPT-2's scale. At nn.Embedding's own, the tied head would make each token predict itself.
            self.embed_tokens.weight.mul_(0.02)
            self.embed_positions.weight.mul_(0.02)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """int [T] -> [T, C], without the positions, as vLLM wants it."""
        x_TC: Tensor = self.embed_tokens(input_ids)
        return x_TC

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids and their positions, int [tokens] or [batch, tokens], to hidden states [.., C].

        The arguments are vLLM's: `inputs_embeds` [.., C] replaces `input_ids` where given;
        `intermediate_tensors` belongs to pipeline parallelism, which this model does not have.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "pass input_ids or inputs_embeds"
            inputs_embeds = self.embed_input_ids(input_ids)
        x_TC = inputs_embeds + self.embed_positions(positions)
        for layer in self.layers:
            x_TC = layer(x_TC)
        out_TC: Tensor = self.norm(x_TC)
        return out_TC

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[.., C] -> [.., V], on every rank."""
        logits_TV: Tensor = self.lm_head(hidden_states)
        return logits_TV


def factory(vllm_config: Any, parallel_context: ParallelContext) -> GPT:
    """What is registered: `pytest --genmodel=genmodel.reference_models.gpt:factory`."""
    return GPT(Config.from_hf(vllm_config.model_config.hf_config), parallel_context)
