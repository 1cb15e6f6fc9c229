"""The zoo: every module registers its mutants in one list."""

from mutants import (
    dense_mutants,
    interface_mutants,
    moe_mutants,
    pipeline_mutants,
    precision_mutants,
    scheduling_mutants,
    training_mutants,
    weight_mutants,
)
from mutants.dense_mutants import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "dense_mutants",
    "interface_mutants",
    "moe_mutants",
    "pipeline_mutants",
    "precision_mutants",
    "scheduling_mutants",
    "training_mutants",
    "weight_mutants",
]
