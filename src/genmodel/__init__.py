"""pytest-genmodel: what authors of custom vLLM models build with, and what tells them the truth.

The public names are imported on first use, so that loading the pytest plugin costs neither torch
nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from genmodel.conformance.api import check_model as check_model
    from genmodel.fixtures.parametrize import parametrize_with_checks as parametrize_with_checks
    from genmodel.modeling.attention import TrainableAttention as TrainableAttention
    from genmodel.modeling.attention import TrainableFlashAttention as TrainableFlashAttention
    from genmodel.modeling.layers import ColumnParallelLinear as ColumnParallelLinear
    from genmodel.modeling.layers import ParallelLMHead as ParallelLMHead
    from genmodel.modeling.layers import QKVParallelLinear as QKVParallelLinear
    from genmodel.modeling.layers import RowParallelLinear as RowParallelLinear
    from genmodel.modeling.layers import VocabParallelEmbedding as VocabParallelEmbedding
    from genmodel.modeling.parallel_context import ParallelContext as ParallelContext
    from genmodel.modeling.registration import register_model as register_model
    from genmodel.modeling.wrapper import CallableModelWrapper as CallableModelWrapper
    from genmodel.modeling.wrapper import as_model_class as as_model_class

_HOME = {
    "CallableModelWrapper": "genmodel.modeling.wrapper",
    "ColumnParallelLinear": "genmodel.modeling.layers",
    "ParallelContext": "genmodel.modeling.parallel_context",
    "ParallelLMHead": "genmodel.modeling.layers",
    "QKVParallelLinear": "genmodel.modeling.layers",
    "RowParallelLinear": "genmodel.modeling.layers",
    "TrainableAttention": "genmodel.modeling.attention",
    "TrainableFlashAttention": "genmodel.modeling.attention",
    "VocabParallelEmbedding": "genmodel.modeling.layers",
    "as_model_class": "genmodel.modeling.wrapper",
    "check_model": "genmodel.conformance.api",
    "parametrize_with_checks": "genmodel.fixtures.parametrize",
    "register_model": "genmodel.modeling.registration",
}

__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605 - frozen by tests/test_packaging.py


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'genmodel' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
