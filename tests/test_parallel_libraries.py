"""Authors' own parallel libraries: Megatron-core and DTensor models against dense, on one rank and on two."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distributed import run_ranks
from genmodel.modeling.loading import LoadError, load_weights
from genmodel.modeling.parallel_context import GroupMember, ParallelContext
from genmodel.modeling.registration import resolve
from genmodel.reference_models import dense, dtensor
from genmodel.runners import standalone
from genmodel.runners.checkpoint import TINY_CONFIG

megatron = pytest.importorskip("genmodel.reference_models.megatron", exc_type=ImportError)

FACTORIES = {"megatron": megatron.factory, "dtensor": dtensor.factory}


def build(factory: Any, context: ParallelContext, **changes: Any) -> Any:
    hf_config = SimpleNamespace(**TINY_CONFIG | {"num_hidden_layers": 2, **changes})
    return factory(SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config)), context)


def load(model: nn.Module, tensors: dict[str, Tensor], context: ParallelContext) -> None:
    """Into this rank's parameters, by the model's own load_weights where it has one."""
    if isinstance(model, dtensor.Decoder):
        model.load_weights(tensors.items())
    else:
        load_weights(model, tensors.items(), context)


def part(gradient: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a gradient."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        return gradient.redistribute(placements=parameter.placements).to_local()
    return gradient


def differences(name: str) -> list[dict[str, float]]:
    """On this rank, with a head of its own and with a tied one."""
    with standalone.default_dtype(torch.float64):
        return [difference(name, tied) for tied in (False, True)]


def difference(name: str, tied: bool) -> dict[str, float]:
    """Of a model and dense with the same weights: what differs, and by how much."""
    torch.manual_seed(0)
    context = ParallelContext.from_group(dist.group.WORLD)
    whole = build(dense.factory, ParallelContext(), tie_word_embeddings=tied)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    model = build(FACTORIES[name], context, tie_word_embeddings=tied)
    load(model, dict(whole.named_parameters()), context)

    ids = torch.randint(331, (12,))
    logits = []
    for each in (whole, model):
        logits.append(each.compute_logits(each(ids[:-1], torch.arange(11))))
        F.cross_entropy(logits[-1], ids[1:]).backward()
    # A gradient is sharded as its parameter is: load the whole model's gradients into a twin.
    twin = build(FACTORIES[name], context, tie_word_embeddings=tied)
    load(twin, {key: p.grad for key, p in whole.named_parameters() if p.grad is not None}, context)
    found = {"logits": float((logits[1] - logits[0]).detach().abs().max())}
    for (key, parameter), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        found[key] = float((part(parameter.grad, parameter) - part(wanted.detach(), wanted)).abs().max())
    return found


@pytest.fixture
def alone() -> Iterator[ParallelContext]:
    with standalone.alone() as context:
        yield context


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", FACTORIES)
def test_same_function_and_same_gradients_as_dense(name: str) -> None:
    """From dense's checkpoint, with its fused projections: all logits, and each rank's part of each gradient."""
    for found in [*differences(name), *chain(*run_ranks(differences, 2, name))]:
        assert len(found) > 10
        assert max(found.values()) < 1e-12, found


def test_megatron_fuses_query_key_and_value_group_by_group(alone: ParallelContext) -> None:
    """Two query heads, their key and their value, then the next two: the order in which ranks get whole groups."""
    model = build(megatron.factory, alone)
    attention = model.layers[0].attn
    heads = torch.arange(8.0).repeat_interleave(32)[:, None].expand(-1, 128)  # q0 q1 q2 q3, k0 k1, v0 v1
    attention.load_qkv(attention.qkv.weight, heads)
    assert attention.qkv.weight[::32, 0].tolist() == [0, 1, 4, 6, 2, 3, 5, 7]


@pytest.mark.usefixtures("alone")
def test_megatron_draws_the_same_weights_at_any_number_of_ranks() -> None:
    """Under one seed, what two ranks hold is what one does, if the vocabulary needs no padding."""
    assert torch.equal(torch.cat(run_ranks(down_projection, 2), 1), down_projection())


def down_projection() -> Tensor:
    torch.manual_seed(5)
    model = build(megatron.factory, ParallelContext.from_group(dist.group.WORLD), vocab_size=332)
    weight: Tensor = model.layers[1].mlp.down.weight.detach()
    return weight


class Declared(nn.Module):
    """Parameters that say how they are cut by Megatron-core's attributes alone."""

    def __init__(self, stride: int = 1, **shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            parameter: Any = nn.Parameter(torch.zeros(shape))
            parameter.tensor_model_parallel = True
            parameter.partition_dim = 0 if name == "rows" else 1
            parameter.partition_stride = stride
            self.register_parameter(name, parameter)


def test_weights_load_by_megatron_s_attributes() -> None:
    """Rows, columns, and two matrices fused in the rows, of each of which a rank has its share."""
    second = ParallelContext(tensor_parallel=GroupMember(1, 2))
    full = torch.arange(32.0).view(8, 4)
    plain = Declared(rows=(4, 4), columns=(8, 2))
    load_weights(plain, [("rows", full), ("columns", full)], second)
    assert torch.equal(plain.rows, full[4:])
    assert torch.equal(plain.columns, full[:, 2:])
    fused = Declared(stride=2, rows=(4, 4))
    load_weights(fused, [("rows", full)], second)
    assert torch.equal(fused.rows, full[[2, 3, 6, 7]])
    with pytest.raises(
        LoadError, match=r"rows is \[4, 4\] on this rank but the checkpoint holds \[9, 4\], and nothing"
    ):
        load_weights(fused, [("rows", torch.zeros(9, 4))], second)


def test_a_weight_loader_may_put_another_parameter_in_place() -> None:
    """As those do that vLLM's reload_weights puts around ours: what was loaded counts, and a tied name with it."""
    model = nn.Module()
    model.first = nn.Linear(2, 2, bias=False)
    model.second = nn.Linear(2, 2, bias=False)
    model.second.weight = model.first.weight

    def replace(_: Tensor, tensor: Tensor) -> None:
        model.first.weight = model.second.weight = nn.Parameter(tensor.clone())

    parameter: Any = model.first.weight
    parameter.weight_loader = replace
    assert load_weights(model, [("first.weight", torch.eye(2))]) == {"first.weight", "second.weight"}
    assert torch.equal(model.second.weight, torch.eye(2))
    model.third = nn.Linear(2, 2, bias=False)
    with pytest.raises(LoadError, match=r"the checkpoint has nothing for first.weight, third.weight$"):
        load_weights(model, [])


# --- bad input -----------------------------------------------------------------------------------------------------


def test_megatron_without_a_process_group_is_one_clear_line() -> None:
    with pytest.raises(
        ValueError, match=r"^Megatron's layers need a process group, for a single process too: "
    ) as caught:
        build(megatron.factory, ParallelContext())
    assert "\n" not in str(caught.value)


def test_dtensor_without_a_process_group_is_one_clear_line() -> None:
    """One process needs none: it is the single-device model."""
    assert build(dtensor.factory, ParallelContext()) is not None
    with pytest.raises(ValueError, match=r"^the tensor parallel size is 2 and there is no process group: ") as caught:
        build(dtensor.factory, ParallelContext(tensor_parallel=GroupMember(0, 2)))
    assert "\n" not in str(caught.value)


def test_heads_that_cannot_be_shared_are_one_clear_line(alone: ParallelContext) -> None:
    with pytest.raises(
        ValueError, match=r"^num_attention_heads \(4\) has to be divisible by num_key_value_heads \(3\)"
    ):
        build(megatron.factory, alone, num_key_value_heads=3)
    with pytest.raises(
        ValueError, match=r"^num_attention_heads \(4\) and num_key_value_heads \(2\) have to be .* \(4\)$"
    ):
        build(dtensor.factory, ParallelContext(tensor_parallel=GroupMember(0, 4)))


def fresh_import(monkeypatch: pytest.MonkeyPatch, installed: dict[str, Any]) -> str:
    """What importing the Megatron model says where `installed` is what there is of Megatron."""
    for name in [*sys.modules]:
        if name == "megatron" or name.startswith("megatron.") or name == "genmodel.reference_models.megatron":
            monkeypatch.delitem(sys.modules, name)
    for name, module in installed.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError) as caught:
        resolve("genmodel.reference_models.megatron:factory")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_megatron_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = fresh_import(monkeypatch, {"megatron": None})
    assert said.startswith(
        "genmodel.reference_models.megatron needs megatron-core 0.16 or newer: pip install 'megatron"
    )


def test_old_megatron_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Any = ModuleType("megatron.core")
    old.__version__ = "0.15.3"
    layers: Any = ModuleType("megatron.core.tensor_parallel")
    for name in ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"):
        setattr(layers, name, object)
    old.tensor_parallel = layers
    package: Any = ModuleType("megatron")
    package.core = old
    said = fresh_import(
        monkeypatch, {"megatron": package, "megatron.core": old, "megatron.core.tensor_parallel": layers}
    )
    assert said.startswith(
        "genmodel.reference_models.megatron needs megatron-core 0.16 or newer, and 0.15.3 is installed"
    )
