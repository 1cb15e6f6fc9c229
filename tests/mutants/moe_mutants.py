"""A mixture of experts with one mistake each: in the router, in what is added up, in what is loaded where.

Those that are not alone have the correct mixture for a reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genmodel.modeling._vllm import engine_config
from genmodel.modeling.collectives import reduce_from_group
from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import moe
from genmodel.runners.checkpoint import TINY_CONFIG
from mutants.dense_mutants import _context, mutant

NOT_RENORMALISED = TINY_CONFIG | {"norm_topk_prob": False}
TWELVE = TINY_CONFIG | {"num_experts": 12, "moe_intermediate_size": 32}
BOTH = (1, 2)


def mixtures(model: Any) -> Iterable[Any]:
    """The mixture of every layer."""
    return [layer.mlp for layer in model.layers]


# The router: wrong everywhere, seen only by an independent reference ----------------------------------------------


@mutant(caught_by="logits.values", reports="torchtitan#1448", of=moe, at="layers.0.mlp.router")
def chosen_weights_not_renormalised(model: Any) -> None:
    """The chosen experts' shares are used as softmax gave them, and sum to less than one."""
    for mixture in mixtures(model):
        mixture.router.renormalise = False


@mutant(
    caught_by="logits.values",
    reports="litgpt#2013, sglang#35160",
    of=moe,
    config="mutants.moe_mutants:NOT_RENORMALISED",
    at="layers.0.mlp.router",
)
def softmax_over_the_chosen_only(model: Any) -> None:
    """Softmax after the choice instead of before, in a model whose shares are not renormalised."""

    def forward(self: Any, x: Tensor) -> Tensor:
        scores = F.linear(x, self.weight)
        best, index = scores.topk(self.chosen, -1)
        return torch.zeros_like(scores).scatter(-1, index, best.softmax(-1))

    for mixture in mixtures(model):
        mixture.router.forward = MethodType(forward, mixture.router)


@mutant(caught_by="logits.values", reports="#58076, #14027", of=moe, alone=True, at="layers.0.mlp.router")
def router_in_bfloat16(model: Any) -> None:
    """In the engine the scores are computed in bfloat16, whatever the model's dtype."""

    def forward(self: Any, x: Tensor) -> Tensor:
        share = F.linear(x.bfloat16(), self.weight.bfloat16()).float().softmax(-1)
        best, index = share.topk(self.chosen, -1)
        return torch.zeros_like(share).scatter(-1, index, best / best.sum(-1, keepdim=True)).to(x.dtype)

    if engine_config() is not None:
        for mixture in mixtures(model):
            mixture.router.forward = MethodType(forward, mixture.router)


@mutant(caught_by="logits.resolution", reports="#10327", of=moe, alone=True)
def router_that_cannot_decide(model: Any) -> None:
    """All experts score the same, as if the router were never loaded: every choice is a tie, and nothing is told."""
    for mixture in mixtures(model):
        mixture.router.forward = lambda x, router=mixture.router: moe.Router.forward(router, torch.zeros_like(x))


# What is added up -------------------------------------------------------------------------------------------------


@mutant(caught_by="logits.values", reports="Megatron-Bridge#4706", of=moe, at="layers.0.mlp.shared")
def shared_expert_dropped(model: Any) -> None:
    """The expert that all tokens share is loaded, and left out of the sum."""
    for mixture in mixtures(model):
        mixture.forward = lambda x, mixture=mixture: mixture.experts(x, mixture.router(x))


@mutant(caught_by="logits.values", reports="#49122", tp=BOTH, of=moe, alone=True, at="layers.0.mlp.shared")
def shared_expert_reduced_twice(model: Any) -> None:
    """The shared expert's sum over the ranks is summed up once more with the other experts'."""
    context = _context(model)
    for mixture in mixtures(model):
        forward = mixture.shared.forward
        mixture.shared.forward = lambda x, forward=forward: reduce_from_group(forward(x), context)


@mutant(
    caught_by="logits.values", reports="vllm-ascend#10557", tp=BOTH, of=moe, alone=True, at="layers.0.mlp.experts.down"
)
def experts_not_reduced(model: Any) -> None:
    """Each rank goes on with what its share of the experts' hidden units gives."""
    for mixture in mixtures(model):
        down = mixture.experts.down
        down.forward = lambda x, down=down: F.linear(x, down.weight)


@mutant(caught_by="gradients.parallel", reports="Megatron-LM#1446", tp=BOTH, of=moe, alone=True)
def router_s_gradient_not_reduced(model: Any) -> None:
    """The router gets the gradient of this rank's hidden units only: the forward is right."""
    for mixture in mixtures(model):
        mixture.experts.context = ParallelContext()


# Sharding and loading ---------------------------------------------------------------------------------------------


@mutant(
    caught_by="logits.tensor_parallel", reports="#3775", tp=BOTH, of=moe, alone=True, at="layers.0.mlp.experts.down"
)
def experts_cut_as_one_row(model: Any) -> None:
    """Rank 0 loads the first half of the experts' fused columns, where its inputs are half of every expert's."""
    rank = _context(model).get_tensor_parallel_rank()

    def load(parameter: Tensor, full: Tensor) -> None:
        share = parameter.shape[1]
        parameter.data.copy_(full[:, rank * share : (rank + 1) * share])

    for mixture in mixtures(model):
        mixture.experts.down.weight.weight_loader = load


@mutant(
    caught_by="weights.every_element",
    reports="vllm-gguf-plugin#103",
    tp=BOTH,
    of=moe,
    alone=True,
    at="layers.0.mlp.experts.gate_up",
)
def first_share_of_every_expert(model: Any) -> None:
    """Every rank loads the first share of each expert's hidden units."""
    for mixture in mixtures(model):
        gate_up = mixture.experts.gate_up
        whole = gate_up.partitions["weight"]
        gate_up.partitions["weight"] = replace(whole, segments=tuple(replace(x, start=0) for x in whole.segments))
        gate_up._attach()


@mutant(
    caught_by="logits.values",
    reports="#36997",
    of=moe,
    alone=True,
    config="mutants.moe_mutants:TWELVE",
    at="layers.0.mlp.experts.down",
)
def experts_in_the_order_of_their_names(model: Any) -> None:
    """`load_weights` fuses the experts' down projections as their names sort: 10 comes before 2."""
    count = model.config.num_experts
    order = sorted(range(count), key=str)

    def sort(name: str, tensor: Tensor) -> Tensor:
        if "experts.down" not in name:
            return tensor
        return tensor.unflatten(1, (count, -1))[:, order].flatten(1)

    model.load_weights = lambda weights: load_weights(model, ((name, sort(name, full)) for name, full in weights))
