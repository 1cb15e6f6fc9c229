"""vLLM's models that differ from transformers', each with the one thing changed that makes it differ.

`sweep_architectures.py` runs these after the originals: that they agree is the proof of what is said of the originals.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.apertus import ApertusForCausalLM
from vllm.model_executor.models.bloom import BloomForCausalLM
from vllm.model_executor.models.cohere2_moe import Cohere2MoeForCausalLM
from vllm.model_executor.models.commandr import CohereForCausalLM
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from vllm.model_executor.models.ernie45_moe import Ernie4_5_MoeForCausalLM
from vllm.model_executor.models.glm4_moe_lite import Glm4MoeLiteForCausalLM
from vllm.model_executor.models.lfm2 import Lfm2ForCausalLM
from vllm.model_executor.models.lfm2_moe import Lfm2MoeForCausalLM
from vllm.model_executor.models.llama4 import Llama4ForCausalLM
from vllm.model_executor.models.minicpm3 import MiniCPM3ForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM


class Bloom(BloomForCausalLM):
    """With the tanh approximation of GELU, which BLOOM was trained with."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        blocks: Any = self.transformer.h
        for block in blocks:
            block.mlp.gelu_impl = nn.GELU(approximate="tanh")


class Apertus(ApertusForCausalLM):
    """With the parameters of the activation, xIELU, in float32 like all others."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if type(module).__name__ == "XIELU":
                module.to(torch.float32)


class _NarrowerWindow:
    """With sliding layers that see `sliding_window` positions, and not one more."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        config.sliding_window -= 1
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        finally:
            config.sliding_window += 1


class Cohere2(_NarrowerWindow, CohereForCausalLM):
    """Command R7B and later, so."""


class Cohere2Moe(_NarrowerWindow, Cohere2MoeForCausalLM):
    """The same, of experts."""


class Ministral3(MistralForCausalLM):
    """With queries scaled by position as the config says in `rope_parameters`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        rope = config.rope_parameters
        config.llama_4_scaling = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class Llama4(Llama4ForCausalLM):
    """With the attention temperature that the config asks for, at any length."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if type(module).__name__ == "Llama4Attention":
                module.attn_temperature_tuning = module.nope


class _SmallerEpsilon(nn.Module):
    """With 1e-6 for the epsilon of the norms inside attention, whatever the config says."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for name, module in self.named_modules():
            if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
                module.variance_epsilon = 1e-6


class _RotaryInPyTorch(nn.Module):
    """With vLLM's own PyTorch code for rotary embeddings, as a compiled engine has it, and not the kernel for CPU."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if "RotaryEmbedding" in type(module).__name__:
                rotary: Any = module
                rotary.forward = rotary.forward_native


class DeepseekV2(_RotaryInPyTorch, DeepseekV2ForCausalLM):
    """DeepSeek V2, so."""


class DeepseekV3(_RotaryInPyTorch, DeepseekV3ForCausalLM):
    """DeepSeek V3, so."""


class Lfm2(_RotaryInPyTorch, Lfm2ForCausalLM):
    """LFM2, so."""


class Lfm2Moe(_RotaryInPyTorch, Lfm2MoeForCausalLM):
    """The same, of experts."""


class Glm4MoeLite(_SmallerEpsilon, _RotaryInPyTorch, Glm4MoeLiteForCausalLM):
    """GLM 4.7 Flash, with both."""


class MiniCPM3(_SmallerEpsilon, MiniCPM3ForCausalLM):
    """The same, as MiniCPM's own code has it too."""


class Ernie45Moe(Ernie4_5_MoeForCausalLM):
    """With experts chosen by their scores and the correction bias, which vLLM's router for CPU leaves out."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for block in self.modules():
            if type(block).__name__ == "Ernie4_5_MoeMoE":
                _choose_by_bias(block)


def _choose_by_bias(block: Any) -> None:
    def route(gating_output: torch.Tensor, topk: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = gating_output.float().softmax(-1)
        chosen = (scores + block.gate.e_score_correction_bias).topk(topk, -1).indices
        weights = scores.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True), chosen

    for module in block.modules():
        for holder in (module, getattr(module, "router", None)):
            if holder is not None and hasattr(holder, "custom_routing_function"):
                holder.custom_routing_function = route
