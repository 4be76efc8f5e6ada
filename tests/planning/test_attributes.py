"""Numbers of equal value among a module's attributes: which of them counts what, its code tells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import assert_scores_close, gap, plan_without, random_gone
from tests.planning.test_trace import macs_of


class Widths(nn.Module):
    """A linear layer that holds its widths, as transformers' Conv1D does, and its weight the other way round."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.nf, self.nx = made, given
        self.weight, self.bias = nn.Parameter(torch.zeros(given, made)), nn.Parameter(torch.zeros(made))


class ByVariable(Widths):
    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class ByTwo(Widths):
    def forward(self, x: Tensor) -> Tensor:
        made = self.nf
        size_out = (*x.shape[:-1], made)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class ByPair(Widths):
    def forward(self, x: Tensor) -> Tensor:
        given, made = self.nx, self.nf
        x = torch.addmm(self.bias, x.view(-1, given), self.weight)
        return x.view(len(x) // 4, 4, made)


class OtherName(Widths):
    def forward(this, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], this.nf)
        x = torch.addmm(this.bias, x.view(-1, x.size(-1)), this.weight)
        return x.view(size_out)


@pytest.mark.parametrize("made", [6, 9])
@pytest.mark.parametrize("kind", [ByVariable, ByTwo, ByPair, OtherName])
def test_a_width_is_the_one_that_the_code_reads(kind: Callable[[int, int], nn.Module], made: int) -> None:
    layers = nn.Linear(5, 6), nn.Tanh(), kind(6, made), nn.Tanh(), kind(made, 6), nn.Tanh(), nn.Linear(6, 3)
    model, inputs = randomise(nn.Sequential(*layers)), example(2, 4, 5)
    graph = tp.trace(model, inputs)
    assert {g.id: g.units for g in graph.groups} == {"0": 6, "2": made, "4": 6}
    assert graph.counts == {"2.nx": ("0", 1), "2.nf": ("2", 1), "4.nx": ("2", 1), "4.nf": ("4", 1)}
    for seed in range(3):
        plan = plan_without(graph, random_gone(graph, seed))
        small = tp.apply(model, plan)
        assert gap(small(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_FUNCTION
        assert plan.macs == macs_of(small, inputs) < graph.macs()
        assert (small[2].nf, small[4].nx) == (int(plan.keep["2"].sum()),) * 2


def test_a_weight_the_other_way_round_is_scored_as_a_linear_layer_is() -> None:
    odd = randomise(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), ByVariable(6, 9), nn.Tanh(), ByVariable(9, 3)))
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double().eval()
    model.load_state_dict({k: v.mT if v.ndim == 2 and k[0] != "0" else v for k, v in odd.state_dict().items()})
    inputs = example(40, 4, 5)
    for criterion in (tp.TPV(head="logits"), tp.TPV(head="logits", compensated=True)):
        one, other = (tp.score(m, [inputs], tp.trace(m, inputs), criterion).values for m in (odd, model))
        assert_scores_close(one, other, tolerances.EXACT)


class Windowed(nn.Module):
    """Has a number of positions that happens to be as many as its channels, and one that tells others of these."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.longest, self.dim = 16, 16
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.first, self.middle, self.last = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        B, N, C = x.shape
        y = self.middle(x.reshape(B * N, C)).reshape(B, N, C)
        return self.last((x + y.relu())[:, : self.longest]).cumsum(1)[:, -1]


@pytest.mark.parametrize("norm", [False, True])
def test_numbers_that_happen_to_be_a_width_stay(norm: bool) -> None:
    model = randomise(Windowed(norm)).eval()
    graph = tp.trace(model, example(1, 8, 5))
    assert set(graph.counts) == {"dim"}
    gone = {group.id: [0, 3, 7] for group in graph.groups}
    plan = plan_without(graph, gone)
    small = tp.apply(model, plan)
    assert (small.longest, small.dim) == (16, 13)
    if not norm:
        inputs = example(2, 20, 5)  # longer than the example: here the number counts
        assert gap(small(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_FUNCTION
