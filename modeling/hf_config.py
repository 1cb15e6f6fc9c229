"""A Hugging Face configuration for models that have no architecture of their own there."""

from __future__ import annotations

from transformers import PretrainedConfig


class GenModelConfig(PretrainedConfig):
    """`model_type: genmodel`: whatever config.json holds becomes an attribute, under its own name."""

    model_type = "genmodel"
