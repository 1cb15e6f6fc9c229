"""Correct: a head of vLLM's that is its embedding. On CPU vLLM keeps a packed copy of the head's weight."""

from genmodel.reference_models.vllm_layers import VllmDense
from genmodel.runners.checkpoint import TINY_CONFIG

CONFIG = {**TINY_CONFIG, "tie_word_embeddings": True}

__all__ = ["CONFIG", "VllmDense"]
