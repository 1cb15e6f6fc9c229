"""Reference models with one mistake each, from the bug reports that taught it; and the check that must catch it.

Every mutant is a factory. Most are judged against the correct model as an independent reference; those
marked `alone=True` have only themselves, as a new author does, and must be caught all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling.attention import TrainableAttention
from genmodel.modeling.collectives import gather_from_group, reduce_from_group
from genmodel.modeling.layers import RowParallelLinear, VocabParallelEmbedding
from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense, gpt

Factory = Callable[[Any, ParallelContext], nn.Module]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A broken factory and who must notice."""

    name: str
    factory: Factory
    caught_by: str | tuple[str, ...]
    """Id of the check that must fail, or of several."""
    reports: str
    """Public bug reports of the class; empty where we know of none."""
    tp: tuple[int, ...]
    reference: str | None
    at: str | None = None
    """The module whose code or weights are wrong, "" for the model's own forward; None if it is not one place."""
    config: str | None = None
    """What it is configured by, as "module:attr"; None means the tiny default."""

    @property
    def checks(self) -> tuple[str, ...]:
        """Ids of all checks that must fail."""
        return (self.caught_by,) if isinstance(self.caught_by, str) else self.caught_by


MUTANTS: list[Mutant] = []


def mutant(
    *,
    caught_by: str | tuple[str, ...],
    reports: str,
    tp: tuple[int, ...] = (1,),
    of: Any = dense,
    alone: bool = False,
    reference: str = "",
    at: str | None = None,
    config: str | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a mutation `(model) -> None` of a reference model.

    Its reference is that model; with `alone` there is none, and `reference` names another one, a factory in
    the mutation's own module.
    """

    def register(mutate: Callable[..., None]) -> Callable[..., None]:
        def factory(vllm_config: Any, parallel_context: ParallelContext) -> nn.Module:
            model = of.factory(vllm_config, parallel_context)
            mutate(model)
            return model  # type: ignore[no-any-return]

        factory.__qualname__ = f"{mutate.__name__}.factory"
        spec = f"{mutate.__module__}:{reference}" if reference else f"{of.__name__}:factory"
        MUTANTS.append(Mutant(mutate.__name__, factory, caught_by, reports, tp, None if alone else spec, at, config))
        return mutate

    return register


# Sharding: right at TP=1, wrong at TP=2 ------------------------------------------------------------------


@mutant(caught_by="logits.values", reports="#3775", tp=(1, 2), alone=True, at="layers.0.mlp.down")
def missing_all_reduce(model: Any) -> None:
    """The MLP's partial sums are never added up."""
    for layer in model.layers:
        layer.mlp.down.forward = lambda x, down=layer.mlp.down: F.linear(x, down.weight)


@mutant(caught_by="logits.tensor_parallel", reports="#3775", tp=(1, 2), alone=True, at="layers.0.mlp.gate_up")
def gate_up_as_one_column(model: Any) -> None:
    """[gate; up] is cut in two, so that one rank holds gate and the other up."""
    context = _context(model)
    for layer in model.layers:
        layer.mlp.gate_up.weight.weight_loader = _plain_slice(context)


@mutant(caught_by="logits.prefill_top_k", reports="#42803", tp=(2,), alone=True, at="layers.0.attn.qkv")
def naive_qkv_slices(model: Any) -> None:
    """[q; k; v] is cut in two without regard to what is q, k and v."""
    context = _context(model)
    for layer in model.layers:
        layer.attn.qkv.weight.weight_loader = _plain_slice(context)


@mutant(caught_by="logits.first_token", reports="vllm-gguf-plugin#103", tp=(2,), alone=True, at="layers.0.mlp.down")
def every_rank_loads_shard_0(model: Any) -> None:
    """All shapes fit, and every rank holds the first half."""
    for layer in model.layers:

        def load(parameter: Tensor, full: Tensor) -> None:
            parameter.data.copy_(full[:, : parameter.shape[1]])

        layer.mlp.down.weight.weight_loader = load


@mutant(caught_by="logits.greedy_rank", reports="#20843, SpecForge#284", tp=(2,), alone=True, at="lm_head")
def logits_of_ranks_swapped(model: Any) -> None:
    """The vocabulary's parts are joined in the wrong order."""
    context = _context(model)
    head = model.lm_head

    def forward(hidden: Tensor) -> Tensor:
        gathered = gather_from_group(F.linear(hidden, head.weight), context)
        parts = gathered.chunk(context.get_tensor_parallel_world_size(), -1)
        return torch.cat(parts[::-1], -1)[..., : head.num_embeddings]

    head.forward = forward


@mutant(
    caught_by="logits.values",
    reports="text-generation-inference#1036",
    tp=(2,),
    of=gpt,
    alone=True,
    at="layers.0.attn.o_proj",
)
def row_bias_on_every_rank(model: Any) -> None:
    """Every rank adds the row-parallel bias before the reduction."""
    context = _context(model)
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            module.forward = lambda x, m=module: reduce_from_group(F.linear(x, m.weight, m.bias), context)  # type: ignore[method-assign]


# The model's own mathematics: wrong everywhere, seen only by an independent reference ----------------------


@mutant(caught_by="logits.values", reports="#36637", at="layers.0.attn.attn")
def attention_scale_ignored(model: Any) -> None:
    """The config's attention scale is not passed on."""
    for layer in model.layers:
        attn = layer.attn.attn
        layer.attn.attn = TrainableAttention(
            attn.num_heads, attn.head_dim, attn.num_kv_heads, scale=0.1, prefix=f"{attn.prefix}.rescaled"
        )


@mutant(caught_by="logits.decode_top_k", reports="vllm-ascend#4641", at="layers.0.attn")
def rotary_interleaved(model: Any) -> None:
    """Neighbours (2i, 2i + 1) are rotated where the weights were trained for (i, i + D / 2)."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)

    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q = rotate(q.unflatten(-1, (-1, self.head_dim)), cos, sin).flatten(-2)
        k = rotate(k.unflatten(-1, (-1, self.head_dim)), cos, sin).flatten(-2)
        attended: Tensor = self.o_proj(self.attn(q, k, v))
        return attended

    for layer in model.layers:
        layer.attn.forward = MethodType(forward, layer.attn)


@mutant(caught_by="logits.values", reports="Liger-Kernel#74", at="layers.0.attn_norm")
def norm_weight_offset(model: Any) -> None:
    """Norm weights are taken as 1 + weight."""
    for module in model.modules():
        if isinstance(module, dense.RMSNorm):
            module.forward = lambda x, m=module: dense.RMSNorm.forward(m, x) + dense.RMSNorm.forward(m, x) / m.weight  # type: ignore[method-assign]


@mutant(caught_by="logits.kl", reports="vllm-metal#659", at="norm")
def final_norm_skipped(model: Any) -> None:
    """The last normalisation is left out."""
    model.norm.forward = lambda x: x * model.norm.weight


@mutant(caught_by="logits.values", reports="#52158", at="compute_logits")
def logit_scale_dropped(model: Any) -> None:
    """Logits are half of what they should be: every argmax, and every top-K, is still right."""
    compute = model.compute_logits
    model.compute_logits = lambda hidden: compute(hidden) / 2


@mutant(caught_by="logits.values", reports="#21863, #49795", at="layers.1.attn.attn")
def window_where_there_is_none(model: Any) -> None:
    """One layer sees only the last 16 tokens: short prompts are all right."""
    attn = model.layers[1].attn.attn
    model.layers[1].attn.attn = TrainableAttention(
        attn.num_heads, attn.head_dim, attn.num_kv_heads, sliding_window=16, prefix=f"{attn.prefix}.windowed"
    )


@mutant(caught_by="logits.values", reports="#5621, #53019", alone=True, at="lm_head")
def real_head_discarded(model: Any) -> None:
    """`load_weights` takes the embedding for the head although the checkpoint has a head of its own."""

    def load(weights: Any) -> set[str]:
        kept = {name: tensor for name, tensor in weights if not name.startswith("lm_head")}
        return load_weights(model, {**kept, "lm_head.weight": kept["embed_tokens.weight"]}.items())

    model.load_weights = load


# Scheduling: right on a whole sequence, wrong in the engine -----------------------------------------------


@mutant(caught_by="logits.decode_top_k", reports="mlx-vlm#1983", alone=True, at="")
def positions_start_at_zero(model: Any) -> None:
    """Positions are counted from the start of the batch instead of taken as given."""
    forward = model.forward

    def counted(input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = forward(input_ids, torch.arange(positions.shape[0], device=positions.device))
        return hidden

    model.forward = counted


@mutant(caught_by="logits.batching", reports="#43631", alone=True, at="embed_tokens")
def state_leaks_between_requests(model: Any) -> None:
    """A running mean kept in the module moves with every token it ever saw."""
    embed = model.embed_tokens.forward
    seen = {"mean": torch.zeros(())}

    def remembering(input_ids: Tensor) -> Tensor:
        embedded: Tensor = embed(input_ids)
        embedded = embedded + 0.1 * seen["mean"]
        seen["mean"] = 0.9 * seen["mean"] + 0.1 * embedded.detach().mean()
        return embedded

    model.embed_tokens.forward = remembering


@mutant(caught_by="gradients.packed_sequences", reports="transformers#46634", alone=True, at="embed_tokens")
def packed_sequences_see_each_other(model: Any) -> None:
    """A token is mixed with its left neighbour, whosever sequence that belongs to."""
    embed = model.embed_tokens.forward

    def shifted(input_ids: Tensor) -> Tensor:
        embedded: Tensor = embed(input_ids)
        return embedded + 0.1 * F.pad(embedded, (0, 0, 1, 0))[:-1]

    model.embed_tokens.forward = shifted


# Training: the forward is right --------------------------------------------------------------------------


@mutant(caught_by="gradients.attention_inputs", reports="minimind#859", alone=True)
def attention_cut_from_the_graph(model: Any) -> None:
    """Attention runs under no_grad, as an inference-only kernel does."""
    for layer in model.layers:
        attend = layer.attn.attn.forward

        def cut(*qkv: Tensor, attend: Any = attend) -> Tensor:
            with torch.no_grad():
                attended: Tensor = attend(*qkv)
            return attended

        layer.attn.attn.forward = cut


@mutant(caught_by="gradients.numeric", reports="minimind#859", alone=True)
def one_of_two_paths_detached(model: Any) -> None:
    """Every parameter has a gradient, but the gate's path is missing from it."""
    for layer in model.layers:

        def forward(x: Tensor, mlp: Any = layer.mlp) -> Tensor:
            gate, up = mlp.gate_up(x).chunk(2, -1)
            out: Tensor = mlp.down(F.silu(gate).detach() * up)
            return out

        layer.mlp.forward = forward


@mutant(caught_by="gradients.causality", reports="", alone=True, at="norm")
def sees_the_future(model: Any) -> None:
    """Hidden states are centred on the mean over all tokens, later ones included."""
    forward = model.norm.forward
    model.norm.forward = lambda x: forward(x - 0.1 * x.mean(0, keepdim=True))


@mutant(caught_by="gradients.train_eval", reports="", alone=True)
def training_mode_differs(model: Any) -> None:
    """Training computes something else although no dropout is declared."""
    forward = model.norm.forward
    model.norm.forward = lambda x: forward(x) * (1.01 if model.training else 1.0)


@mutant(caught_by="gradients.dropout", reports="", alone=True)
def dropout_at_inference(model: Any) -> None:
    """Dropout that never learns of evaluation mode."""
    model.dropout = nn.Dropout(0.1)
    forward = model.norm.forward
    model.norm.forward = lambda x: F.dropout(forward(x), model.dropout.p, training=True)


# The interface -------------------------------------------------------------------------------------------


@mutant(caught_by="interface.parameters_registered", reports="#10327", alone=True)
def layers_in_a_plain_list(model: Any) -> None:
    """No state dict has the layers, so nothing ever loads them."""
    layers = list(model.layers)
    del model.layers
    model.layers = layers


@mutant(caught_by="interface.attention_prefixes", reports="vllm-ascend#4603, #3924", alone=True)
def one_prefix_for_all_layers(model: Any) -> None:
    """Layers that share a prefix would share a KV cache."""
    for layer in model.layers:
        layer.attn.attn.prefix = "model.attn"


@mutant(caught_by="interface.signature", reports="vllm-ascend#3091, #12038", alone=True)
def forward_without_positions(model: Any) -> None:
    """vLLM passes `positions`, and forward has no such argument."""
    forward = model.forward
    model.forward = lambda input_ids: forward(input_ids, torch.arange(input_ids.shape[0], device=input_ids.device))


@mutant(caught_by="interface.embed_input_ids", reports="#27583, #30469", alone=True)
def embedding_of_the_wrong_width(model: Any) -> None:
    """Embeddings are not as wide as the hidden states."""
    embed = model.embed_input_ids
    model.embed_input_ids = lambda input_ids: embed(input_ids)[..., :64]


@mutant(caught_by="interface.compute_logits", reports="#20843", alone=True)
def padded_vocabulary_shows(model: Any) -> None:
    """The head's padding rows are returned as if they were tokens."""
    compute = model.compute_logits
    model.compute_logits = lambda hidden: F.pad(compute(hidden), (0, 5))


@mutant(caught_by="interface.rebuild", reports="#10327", alone=True)
def differs_from_build_to_build(model: Any) -> None:
    """Parameter names depend on what was built before."""
    _BUILDS.append(None)
    model.register_parameter(f"extra_{len(_BUILDS)}", nn.Parameter(torch.ones(3)))


@mutant(caught_by="interface.rebuild", reports="", alone=True)
def embedding_kept_from_the_build_before(model: Any) -> None:
    """Every model has the first one's embedding: what loads one changes the others."""
    model.embed_tokens = _EMBEDDINGS.setdefault("first", model.embed_tokens)


_BUILDS: list[None] = []
_EMBEDDINGS: dict[str, nn.Module] = {}


def _context(model: nn.Module) -> ParallelContext:
    return next(m.parallel_context for m in model.modules() if isinstance(m, VocabParallelEmbedding))


def _plain_slice(context: ParallelContext) -> Callable[[Tensor, Tensor], None]:
    """A loader that cuts the fused tensor's rows into equal parts."""

    def load(parameter: Tensor, full: Tensor) -> None:
        rank = context.get_tensor_parallel_rank()
        rows = parameter.shape[0]
        parameter.data.copy_(full[rank * rows : (rank + 1) * rows])

    return load
