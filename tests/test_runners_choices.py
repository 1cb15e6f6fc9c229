"""Choices that rounding could turn: which they are, what turning them does, and that nothing else is excused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genmodel.modeling.parallel_context import ParallelContext
from genmodel.reference_models import dense, moe
from genmodel.runners.checkpoint import TINY_CONFIG
from genmodel.runners.choices import Choice, Choices, TurnedKinks, near_ties, turns

SCORES = torch.tensor([[3.0, 9.0, 5.0, 4.0], [1.0, 0.0, 2.0, 8.0]])  # margins of the second and third: 1, 1


def all_rows(_: int, margins: Tensor) -> Tensor:
    return torch.ones_like(margins, dtype=torch.bool)


def first_row(_: int, margins: Tensor) -> Tensor:
    return torch.arange(len(margins)) == 0


@pytest.mark.parametrize(
    ("call", "plain", "turned"),
    [
        (lambda x: x.topk(2, -1).indices, [[1, 2], [3, 2]], [[1, 3], [3, 0]]),
        (lambda x: x.topk(2, dim=1, sorted=False).values.sum(1), [14.0, 10.0], [13.0, 9.0]),
        (lambda x: x.topk(2, -1, largest=False).indices, [[0, 3], [1, 0]], [[0, 2], [1, 2]]),
        (lambda x: x.T.topk(2, 0).indices.T, [[1, 2], [3, 2]], [[1, 3], [3, 0]]),
        (lambda x: x.argmax(-1), [1, 3], [2, 2]),
        (lambda x: x.argmax(1, keepdim=True), [[1], [3]], [[2], [2]]),
        (lambda x: x.max(-1).values, [9.0, 8.0], [5.0, 2.0]),
        (lambda x: x.max(-1, keepdim=True).indices, [[1], [3]], [[2], [2]]),
        (lambda x: x.min(1).indices, [0, 1], [3, 0]),
        (lambda x: (-x).argmin(-1), [1, 3], [2, 2]),
    ],
)
def test_the_next_best_takes_the_place_of_the_last_chosen(
    call: Callable[[Tensor], Tensor], plain: list[Any], turned: list[Any]
) -> None:
    """For every way to choose, along any dimension, in the rows asked for and in no others."""
    with Choices() as seen:
        assert call(SCORES).tolist() == plain
    assert len(seen.made) == 1
    with Choices(all_rows):
        assert call(SCORES).tolist() == turned
    with Choices(first_row):
        assert call(SCORES).tolist() == [turned[0], plain[1]]


def test_what_chooses_nothing_is_no_choice() -> None:
    """All of a dimension, whole tensors, whole numbers."""
    with Choices() as seen:
        SCORES.topk(4, -1)
        SCORES.max()
        SCORES.argmax()
        SCORES.amax(-1)
        SCORES.long().topk(2, -1)
        torch.tensor(1.0).max(0)
    assert seen.made == []


def choice(*rows: list[float]) -> list[Choice]:
    return [Choice(torch.tensor(rows), 1)]


def test_near_ties_are_margins_that_rounding_can_turn() -> None:
    """Four deviations of the margins' own error, and no other rows' business."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1000, 6, generator=generator, dtype=torch.float64)
    best = scores.topk(3, -1)
    for row, margin in enumerate((0.0, 1e-4, 3e-3, 1.0)):
        scores[row, best.indices[row, 2]] = best.values[row, 1] - margin
    noise = 1e-3 * torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    (found,) = near_ties([[Choice((scores + noise).float(), 2)]], [[Choice(scores, 2)]])
    deviation = 2**0.5 * 1e-3  # of the difference of two scores
    assert found[0].median() == pytest.approx(4 * deviation, rel=0.2)
    near = Choice(scores, 2).margins() <= found[0]
    assert near[:4].tolist() == [True, True, True, False]
    assert 0 < near.double().mean() < 0.03


def test_without_a_near_tie_there_is_nothing_to_turn() -> None:
    """Exact scores, of a sequence with wide margins and of one with a tie."""
    wide, tied = choice([1.0, 2.0, 3.0]), choice([1.0, 3.0, 3.0])
    assert near_ties([wide, tied], [wide, tied])[0] == {}
    assert near_ties([wide, tied], [wide, tied])[1][0] > 0


def test_runs_that_chose_at_other_places_excuse_nothing() -> None:
    """A tie, but in calls that cannot be told to be the same."""
    tied = choice([3.0, 3.0])
    assert near_ties([tied * 2], [tied]) == [{}]
    assert near_ties([choice([3.0, 3.0, 0.0])], [tied]) == [{}]
    assert near_ties([[]], [[]]) == [{}]


def tiny(module: Any, dtype: torch.dtype, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(**(TINY_CONFIG | changes))))
    model = module.factory(config, ParallelContext()).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


IDS = torch.arange(2, 22)


def logits(model: Any) -> Tensor:
    found: Tensor = model.compute_logits(model(IDS, torch.arange(len(IDS))))
    return found


def made_by(model: Any) -> list[Choice]:
    with Choices() as seen:
        logits(model)
    return seen.made


@torch.no_grad()
def test_a_planted_near_tie_is_found_and_turned() -> None:
    """Two experts that score one token alike: only from that token on do the logits turn, to the other expert's."""
    model = tiny(moe, torch.float64, num_hidden_layers=1)
    assert turns_of(model).max() == 0, "the weights happen to have a near tie; choose another seed"
    inputs: list[Tensor] = []
    router = model.layers[0].mlp.router
    handle = router.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    base = logits(model)
    handle.remove()

    x, at, margin = inputs[0], 7, 1e-8
    scores = x[at] @ router.weight.T
    second, third = scores.topk(3).indices[1:].tolist()
    router.weight[third] += (scores[second] - scores[third] - margin) * x[at] / x[at].square().sum()
    base, moved = logits(model), turns_of(model)
    assert moved[:at].max() == 0
    assert moved[at] > 1e-3

    router.weight[third] += 2 * margin * x[at] / x[at].square().sum()  # what rounding might do
    other = (logits(model) - base).abs().amax(-1)
    torch.testing.assert_close(moved, other, atol=1e-6, rtol=0)


def turns_of(model: Any) -> Tensor:
    """How far near ties move a float64 model's logits, with float32 for the tested dtype."""
    (limits,) = near_ties([made_by(copy.deepcopy(model).float())], [made_by(model)])
    base = logits(model)
    return turns(lambda: logits(model), base, limits)[0] if limits else torch.zeros(len(base))


@torch.no_grad()
def test_a_router_that_is_wrong_is_not_excused() -> None:
    """In float32 the near ties of the reference allow no more than they did, whatever the model under test does."""
    model = tiny(moe, torch.float64)
    base = logits(model)
    allowed = turns_of(model)
    for mixture in (layer.mlp for layer in model.layers):
        mixture.router.renormalise = False
    error = (logits(model) - base).abs().amax(-1)
    assert (error > 100 * allowed + 1e-3).all()


@torch.no_grad()
def test_models_that_choose_nothing_have_no_choices() -> None:
    """Dense models cost nothing and are excused nothing."""
    assert made_by(tiny(dense, torch.float32)) == []


@torch.no_grad()
def test_hugging_face_routers_are_seen() -> None:
    """A mixture that knows nothing of this project: one choice for each layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        vocab_size=40,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with Choices() as seen:
        model(torch.arange(12)[None])
    assert [(tuple(made.scores.shape), made.k) for made in seen.made] == [((12, 6), 2)] * 3


def test_a_near_tie_that_another_one_moves_is_seen_by_itself() -> None:
    """Turned together, two near ties may cancel; each is turned without the other too, in every one of forty pairs.

    So it was with a router's tie at one token, which by way of attention moved another token in the next layer, where
    a margin hardly large enough became a near tie and was turned back.
    """
    pairs, gap = 40, 1e-3

    def logits() -> Tensor:
        even = torch.tensor([1.0, 1.0 - gap]).expand(pairs, 2)
        first = even.argmax(-1)
        second = even.argmax(-1)
        return (first != second).double()[:, None]  # moves if one of the two is turned, and not if both are

    near = dict.fromkeys((0, 1), torch.full((pairs,), 2 * gap))
    assert turns(logits, logits(), near)[0].min() == 1


def test_a_margin_that_was_exact_by_luck_is_no_wider_than_others() -> None:
    """Rows whose scores move more with the weights get a wider margin, even if one run in the tested dtype hit well."""
    scores = torch.tensor([[1.0, 0.0]]).repeat(9, 1)
    tested = scores + torch.tensor([[1e-3, 0.0]]) * (torch.arange(9) != 4)[:, None]
    sensitive = torch.where(torch.arange(9) == 4, 1e-2, 1e-4)[:, None] * torch.tensor([[1.0, 0.0]])
    higher = [[Choice(scores, 1), choice([0.0, 0.0])[0]]]  # the second is a tie, so that there are limits
    moved = [[[Choice(scores + sensitive, 1), choice([0.0, 0.0])[0]]]]
    lucky = near_ties([[Choice(tested, 1), choice([0.0, 0.0])[0]]], higher)[0][0]
    drawn = near_ties([[Choice(tested, 1), choice([0.0, 0.0])[0]]], higher, moved)[0][0]
    assert lucky[4] < 0.01
    assert drawn[4] == pytest.approx(0.4, rel=0.01)  # four times the error of the others, a hundred times as sensitive
    torch.testing.assert_close(drawn[:4], lucky[:4])


@pytest.mark.parametrize("kink", [torch.relu, lambda x: torch.nn.functional.leaky_relu(x, 0.5)])
def test_units_that_are_nearly_zero_are_turned(kink: Callable[[Tensor], Tensor]) -> None:
    """Their gradients are those of the other side; all others, and every value but for next to nothing, stay."""
    x = torch.tensor([1e-9, -1e-9, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(kink(x).sum(), x)[0]
    with TurnedKinks(1e-6):
        value = kink(x)
        turned = torch.autograd.grad(value.sum(), x)[0]
    assert turned.tolist() == [plain[1], plain[0], plain[2], plain[3]]
    torch.testing.assert_close(value, kink(x), atol=1e-8, rtol=0)
