"""The dense model of vLLM's own layers, with attention layers built in every way that vLLM has; all of them right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

from genmodel.reference_models import vllm_layers


class Changed(vllm_layers.VllmDense):
    """Its attention layers are built by `attention(number of the layer, arguments)`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        numbers = iter(range(100))

        def build(heads: int, size: int, scale: float, **arguments: Any) -> nn.Module:
            return self.attention(next(numbers), num_heads=heads, head_size=size, scale=scale, **arguments)

        with mock.patch.object(vllm_layers, "Attention", build):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def attention(self, number: int, **arguments: Any) -> nn.Module:
        raise NotImplementedError


class Sinks(Changed):
    """As GPT-OSS has them, in a parameter."""

    def attention(self, number: int, **arguments: Any) -> nn.Module:
        sinks = nn.Parameter(torch.zeros(arguments["num_heads"]))
        layer = Attention(**arguments, sinks=sinks)
        layer.sinks = sinks
        return layer


class SinksInABuffer(Changed):
    """Which another dtype of the model would replace."""

    def attention(self, number: int, **arguments: Any) -> nn.Module:
        sinks = torch.arange(arguments["num_heads"], dtype=torch.float32)
        layer = Attention(**arguments, sinks=sinks)
        layer.register_buffer("sinks", sinks, persistent=False)
        return layer


class ThreeDimensions(Changed):
    """Calls its layers with [tokens, heads, size], and says what shape it wants."""

    def attention(self, number: int, **arguments: Any) -> nn.Module:
        layer = Attention(**arguments)

        class Caller(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                wanted = torch.Size(q.shape)
                q, k, v = (x.unflatten(-1, (-1, arguments["head_size"])) for x in (q, k, v))
                out: Tensor = self.layer(q, k, v, output_shape=wanted) if number % 2 else self.layer(q, k, v)
                return out

        return Caller()


class OwnForward(Changed):
    """Layers of a subclass that does something before and after."""

    def attention(self, number: int, **arguments: Any) -> nn.Module:
        class Doubled(Attention):
            def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                out: Tensor = super().forward(query * 2, key, value)
                return out + 1

        return Doubled(**arguments)


class SharedKeysAndValues(Changed):
    """The second layer attends to the first one's; its own count for nothing, where it is given any."""

    given = False

    def attention(self, number: int, **arguments: Any) -> nn.Module:
        if number == 0:
            self.first = arguments["prefix"]
            return Attention(**arguments)
        given = self.given

        class Shared(Attention):
            def forward(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
                own = (key, value) if given else (None, None)
                out: Tensor = super().forward(query, *own)
                return out

        return Shared(**arguments, kv_sharing_target_layer_name=self.first)


class SharedAndGiven(SharedKeysAndValues):
    given = True


class Capped(Changed):
    def attention(self, number: int, **arguments: Any) -> nn.Module:
        return Attention(**arguments, logits_soft_cap=5.0, per_layer_sliding_window=9 if number else None)


class Sloped(Changed):
    def attention(self, number: int, **arguments: Any) -> nn.Module:
        slopes = [2.0 ** -(2 + head) for head in range(arguments["num_heads"])]
        return Attention(**arguments, alibi_slopes=slopes)


class Chunked(Changed):
    def attention(self, number: int, **arguments: Any) -> nn.Module:
        return ChunkedLocalAttention(**arguments, attention_chunk_size=32)


# --- what plain PyTorch does not know -------------------------------------------------------------------------------


class OwnCache(Changed):
    """A layer that the KV cache is told something else of."""

    def attention(self, number: int, **arguments: Any) -> nn.Module:
        class Windowed(Attention):
            def get_kv_cache_spec(self, vllm_config: Any) -> Any:
                return super().get_kv_cache_spec(vllm_config)

        return Windowed(**arguments)


class AnotherSequence(Changed):
    def attention(self, number: int, **arguments: Any) -> nn.Module:
        return Attention(**arguments, attn_type="encoder_decoder")


class OwnBackend(Changed):
    def attention(self, number: int, **arguments: Any) -> nn.Module:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return Attention(**arguments, attn_backend=CPUAttentionBackend)


class NewArgument(Changed):
    """One that a future vLLM may have."""

    def attention(self, number: int, **arguments: Any) -> nn.Module:
        return _as_if_known(Attention, "temperature", arguments, 0.5)


def _as_if_known(build: Callable[..., nn.Module], name: str, arguments: dict[str, Any], value: Any) -> nn.Module:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    own = CPUAttentionBackendImpl.__init__

    def taking(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop(name, None)
        own(self, *args, **kwargs)

    with mock.patch.object(CPUAttentionBackendImpl, "__init__", taking):
        return build(**arguments, **{name: value})
