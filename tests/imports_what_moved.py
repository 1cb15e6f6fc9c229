"""A target written for an older vLLM."""

from vllm.attention import Attention as factory  # type: ignore[import-not-found] # noqa: F401, N813
