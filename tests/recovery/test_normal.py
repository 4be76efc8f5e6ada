"""Ridge regressions from sums, or from rows where these are few, against least squares of the stacked rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tpvprune.recovery.normal import Normal, chosen_ridge

INPUTS, OUTPUTS = 12, 3
EXACT = 1e-9
"""Relative, in float64: the reference solves the stacked system by QR, not its normal equations."""


def rows(count: int, groups: int = 1, seed: int = 0, inputs: int = INPUTS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, count, inputs, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.randn(groups, count, OUTPUTS, generator=generator, dtype=torch.float64) - 1


def gathered(x: Tensor, d: Tensor, sizes: Sequence[int]) -> Normal:
    found = Normal()
    for part in zip(x.split(list(sizes), 1), d.split(list(sizes), 1), strict=True):
        found.add(*part)
    return found


def stacked(x: Tensor, d: Tensor, ridge: float, biased: bool, free: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows over rows of the ridge, one group and one output at a time; the bias is a column that nothing pulls at."""
    changes, biases = [], []
    for number, (one, wanted) in enumerate(zip(x, d, strict=True)):
        about = one - one.mean(0) if biased else one
        pull = (ridge * float(about.square().mean())) ** 0.5
        for output in range(OUTPUTS):
            held = torch.ones(INPUTS, dtype=torch.bool) if free is None else free[number, output]
            count = int(held.sum())
            left = torch.cat([one[:, held] / len(one) ** 0.5, pull * torch.eye(count, dtype=one.dtype)])
            column = torch.cat([one.new_full((len(one), 1), len(one) ** -0.5), one.new_zeros(count, 1)])
            right = torch.cat([wanted[:, output] / len(one) ** 0.5, torch.zeros(count, dtype=one.dtype)])
            solved = torch.linalg.lstsq(torch.cat([left, column], 1) if biased else left, right.unsqueeze(1)).solution
            change = torch.zeros(INPUTS, dtype=one.dtype)
            change[held] = solved[:count, 0]
            changes.append(change)
            biases.append(solved[count, 0] if biased else torch.zeros((), dtype=one.dtype))
    shape = (len(x), OUTPUTS)
    return torch.stack(changes).reshape(*shape, INPUTS), torch.stack(biases).reshape(shape)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("sizes", [[2], [4, 3], [11], [6, 5, 1], [7, 30], [40]], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_few_rows_and_many_give_the_ridge_solution(
    sizes: list[int], ridge: float, biased: bool, groups: int, masked: bool
) -> None:
    x, d = rows(sum(sizes), groups)
    free = torch.rand(groups, OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    found = gathered(x, d, sizes).solve(ridge, biased, free)
    for mine, wanted in zip(found, stacked(x, d, ridge, biased, free), strict=True):
        error = EXACT if free is None else 1e-6  # iterations end there
        torch.testing.assert_close(mine, wanted, rtol=0, atol=error * float(1 + wanted.abs().max()))


@pytest.mark.parametrize("sizes", [([3], [4]), ([5], [9]), ([5], [30]), ([30], [5]), ([20], [15]), ([], [5])], ids=str)
def test_two_halves_together_are_all_rows(sizes: tuple[list[int], list[int]]) -> None:
    count = sum(map(sum, sizes))
    x, d = rows(count)
    cut = sum(sizes[0])
    halves = gathered(x[:, :cut], d[:, :cut], sizes[0]), gathered(x[:, cut:], d[:, cut:], sizes[1])
    both = halves[0] + halves[1]
    assert both.rows == count
    for mine, wanted in zip(both.solve(0.01, True, None), stacked(x, d, 0.01, True), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=EXACT * float(1 + wanted.abs().max()))


@pytest.mark.parametrize("count", [5, 30])
def test_what_is_left_is_the_mean_square_less_that_of_the_residual(count: int) -> None:
    x, d = rows(count, groups=2)
    change, bias = stacked(*rows(40, groups=2, seed=7), 0.1, True)
    left = (d - x @ change.mT - bias.unsqueeze(1)).square().sum() - d.square().sum()
    found = gathered(x, d, [count]).left(change, bias)
    assert found == pytest.approx(float(left) / count, rel=1e-10)


@pytest.mark.parametrize("counts", [(5, 6), (5, 40), (40, 41)])
def test_the_ridge_is_chosen_by_what_each_half_leaves_of_the_other(counts: tuple[int, int]) -> None:
    parts = [rows(count, seed=seed) for seed, count in enumerate(counts)]
    ridges = (1e-4, 1e-2, 1.0, 100.0)

    def left(ridge: float) -> float:
        total = 0.0
        for (x, d), other in zip(parts, reversed(parts), strict=True):
            change, bias = stacked(*other, ridge, True)
            error = (d - x @ change.mT - bias.unsqueeze(1)).square().sum() - d.square().sum()
            total += float(error) / x.shape[1]
        return total

    halves = [gathered(x, d, [x.shape[1]]) for x, d in parts]
    assert chosen_ridge(halves, ridges, True, None) == min(ridges, key=left)


def test_a_row_has_more_inputs_than_their_products_would_find_room_for() -> None:
    x, d = rows(4, inputs=300_000)  # products of all with all: 720 GB
    change, bias = gathered(x, d, [3, 1]).solve(1e-6, True, None)
    left = d - x @ change.mT - bias.unsqueeze(1)
    assert float(left.abs().max()) < 1e-4 * float(d.abs().max())


@pytest.mark.parametrize("count", [1, 5])
def test_dead_inputs_change_nothing(count: int) -> None:
    d = rows(count)[1]
    change, bias = gathered(torch.zeros(1, count, INPUTS), d.float(), [count]).solve(0.0, True, None)
    assert float(change.abs().max()) == 0
    torch.testing.assert_close(bias, d.float().double().mean(1))


def test_rows_that_are_kept_are_not_those_they_were_taken_from() -> None:
    x, d = rows(5)
    found = gathered(x, d, [5])
    before = found.solve(0.1, True, None)
    x.zero_(), d.zero_()
    for mine, wanted in zip(found.solve(0.1, True, None), before, strict=True):
        assert torch.equal(mine, wanted)
