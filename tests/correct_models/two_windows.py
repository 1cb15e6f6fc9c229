"""Correct: three layers of attention that see 16, 24 and all tokens."""

from torch import nn

from genmodel import ParallelLMHead, QKVParallelLinear, RowParallelLinear, TrainableAttention, VocabParallelEmbedding

WINDOWS = (16, 24, None)


class Layer(nn.Module):
    def __init__(self, c, ctx, window, prefix):
        super().__init__()
        self.norm = nn.LayerNorm(c.hidden_size)
        size, heads, kv_heads = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
        dim = size // heads
        self.qkv = QKVParallelLinear(size, heads, kv_heads, dim, parallel_context=ctx)
        heads, kv_heads = self.qkv.num_heads, self.qkv.num_kv_heads
        self.attn = TrainableAttention(heads, dim, kv_heads, sliding_window=window, prefix=prefix)
        self.out = RowParallelLinear(size, size, parallel_context=ctx)

    def forward(self, x):
        return x + self.out(self.attn(*self.qkv(self.norm(x))))


class Model(nn.Module):
    def __init__(self, c, ctx):
        super().__init__()
        self.tokens = VocabParallelEmbedding(c.vocab_size, c.hidden_size, parallel_context=ctx)
        self.places = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, ctx, w, f"layers.{i}.attn") for i, w in enumerate(WINDOWS))
        self.norm = nn.LayerNorm(c.hidden_size)
        self.head = ParallelLMHead(c.vocab_size, c.hidden_size, parallel_context=ctx)

    def embed_input_ids(self, input_ids):
        return self.tokens(input_ids)

    def forward(self, input_ids, positions, inputs_embeds=None):
        x = (self.tokens(input_ids) if inputs_embeds is None else inputs_embeds) + self.places(positions)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def compute_logits(self, hidden_states):
        return self.head(hidden_states)


def factory(vllm_config, parallel_context):
    return Model(vllm_config.model_config.hf_config, parallel_context)
