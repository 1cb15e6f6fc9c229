"""The size of rounding: what one run in the tested dtype shows, and what several with weights moved show beyond it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from genmodel.reference_models import dense, moe
from genmodel.runners import noise, teacher_forcing
from genmodel.runners.standalone import Standalone
from test_runners_choices import tiny

SEQUENCE = tuple(range(2, 42))


def test_without_draws_it_is_the_error_itself() -> None:
    """As it was before there were any."""
    errors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    assert [found.tolist() for found in noise.sizes(errors, [])] == [[1.0, 2.0], [3.0]]


def test_a_small_error_by_luck_is_lifted_to_what_the_position_is_sensitive_to() -> None:
    """In the scale of the errors, whatever that of the draws is; what is larger than that stays."""
    errors = [torch.tensor([2.0, 2.0, 0.1]), torch.tensor([9.0, 2.0])]
    draws = [[torch.tensor([5e-3, 5e-3, 2e-2]), torch.tensor([5e-3, 5e-3])] for _ in range(2)]
    assert [found.tolist() for found in noise.sizes(errors, draws)] == [[2.0, 2.0, 8.0], [9.0, 2.0]]


def test_each_row_has_a_scale_of_its_own() -> None:
    """The largest over a vocabulary and the mean are no one number."""
    errors = [torch.tensor([[4.0, 4.0, 0.0], [1.0, 1.0, 0.0]])]
    draws = [[torch.tensor([[2.0, 2.0, 4.0], [2.0, 2.0, 4.0]])]]
    assert noise.sizes(errors, draws)[0].tolist() == [[4.0, 4.0, 8.0], [1.0, 1.0, 2.0]]


@pytest.mark.parametrize("silent", [torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])])
def test_draws_that_move_nothing_change_nothing(silent: torch.Tensor) -> None:
    """A model without parameters, or one whose parameters reach few positions."""
    errors = [torch.tensor([2.0, 1.0, 3.0])]
    assert noise.sizes(errors, [[silent]])[0].tolist() == [2.0, 1.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_moved_by_half_an_ulp_and_come_back(dtype: torch.dtype) -> None:
    """A table that is tied moves with its partner; every draw is another, and each the same again."""
    model = nn.Module()
    model.table = nn.Parameter(torch.randn(50, 8, dtype=torch.float64))
    model.head = nn.Linear(8, 50, bias=False, dtype=torch.float64)
    model.head.weight = model.table
    model.whole = nn.Parameter(torch.arange(4), requires_grad=False)
    before, seen = copy.deepcopy(model.state_dict()), []
    for draw in (0, 1, 0):
        with noise.moved_weights(model, draw, dtype):
            assert model.head.weight is model.table
            assert torch.equal(model.whole, before["whole"])
            seen.append((model.table / before["table"] - 1).detach() / torch.finfo(dtype).eps)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert 0.45 < seen[0].abs().max() <= 0.5 + 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_floors_bound_what_another_order_of_adding_up_does() -> None:
    """Forty float32 models whose hidden units are shuffled, which changes rounding alone, stay within four floors.

    They stay farther within than with the errors of one run for floors, and the median floor is hardly higher.
    """
    exact = tiny(dense, torch.float64)
    built = Standalone(exact, False, None)
    runs = teacher_forcing.run(built, [SEQUENCE])
    tested = teacher_forcing.run(Standalone(copy.deepcopy(exact).float(), False, None), [SEQUENCE])
    moved = teacher_forcing.with_moved_weights(built, runs, torch.float32)
    floors = teacher_forcing.noise_floors(tested, runs, moved)[SEQUENCE][0]
    single = teacher_forcing.noise_floors(tested, runs, [])[SEQUENCE][0]
    errors = torch.stack([shuffled_error(exact, runs.logits[SEQUENCE], seed) for seed in range(40)])
    worst, worst_of_one = ((errors / floor.clamp(min=floor.median())).max() for floor in (floors, single))
    assert worst < 4
    assert worst < worst_of_one
    assert floors.median() < 1.5 * single.median(), "a floor that is lifted everywhere is no floor"


def shuffled_error(model: nn.Module, exact: torch.Tensor, seed: int) -> torch.Tensor:
    """Largest error over V, [T], of the model in float32 with the units of its feed-forward layers in another order."""
    other = copy.deepcopy(model).float()
    for layer in other.layers:
        size = layer.mlp.down.weight.shape[1]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        layer.mlp.down.weight.copy_(layer.mlp.down.weight[:, order])
        both = layer.mlp.gate_up.weight
        both.copy_(torch.cat([half[order] for half in both.split(size)]))
    logits = other.compute_logits(other(torch.tensor(SEQUENCE), torch.arange(len(SEQUENCE))))
    return (logits.double() - exact).abs().amax(-1)


@torch.no_grad()
def test_what_rounding_did_turn_counts_as_a_turn() -> None:
    """A run in the tested dtype with choices of its own: where it is off by more than rounding, and nowhere else."""
    built = Standalone(tiny(moe, torch.float64), False, None)
    exact = teacher_forcing.run(built, [SEQUENCE])
    tested = teacher_forcing.run(Standalone(copy.deepcopy(built.model).float(), False, None), [SEQUENCE], like=exact)
    none = {call: -torch.ones(len(made.scores)) for call, made in enumerate(exact.made[0])}  # no margin is that small
    free = teacher_forcing.Run(logits={SEQUENCE: tested.logits[SEQUENCE].double()})
    free.logits[SEQUENCE][7, 3] += 1.0
    floors = teacher_forcing.noise_floors(tested, exact, [])
    largest, mean = teacher_forcing.turns(built, exact, [none], floors, free)[SEQUENCE]
    assert largest[7] == pytest.approx(1, abs=1e-4)
    assert mean[7] > 0
    assert largest[[*range(7), *range(8, len(SEQUENCE))]].max() == 0
