"""Products with as many rows as a width that is cut: a plan says what the cut model is counted at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import gap, plan_without, random_gone
from tests.planning.test_trace import macs_of
from tpvprune import analysis
from tpvprune.analysis.rounder import FLOAT


class Base(nn.Module):
    """Six tokens of five channels, made eight wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(5, 8), nn.Linear(8, 3)
        self.make()

    def make(self) -> None: ...

    def body(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean(1))


class Mixed(Base):
    """Mixes tokens by layers with a width of their own."""

    def make(self) -> None:
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def body(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x.mT).relu()).mT


class Neighbours(Base):
    """Takes means over neighbours, with a buffer."""

    def make(self) -> None:
        self.register_buffer("near", torch.rand(6, 6, dtype=torch.float64))

    def body(self, x: Tensor) -> Tensor:
        return (self.near @ x).relu()


class Joined(Base):
    """Mixes tokens of the channels of two layers and of the input alike."""

    def make(self) -> None:
        self.more, self.mix, self.fc = nn.Linear(8, 4), nn.Linear(6, 6), nn.Linear(17, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        a = torch.cat((a, x, self.more(a)), 2)
        return self.fc(self.mix(a.mT).relu().mean(2))


class Often(Base):
    """One layer for tokens of a width that is cut, and for those of the input."""

    def make(self) -> None:
        self.mix, self.fc = nn.Linear(6, 7), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat((self.mix(self.stem(x).mT), self.mix(x.mT)), 1).mean(2))


class Folded(Base):
    """A convolution over one channel at a time, another one of more channels behind it."""

    def make(self) -> None:
        self.one, self.two = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 1, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        return self.two(self.one(x.mT.reshape(-1, 1, N)).relu()).reshape(B, -1, N).mT


class Gram(Base):
    """Channels by channels."""

    def body(self, x: Tensor) -> Tensor:
        return x @ (x.mT @ x).softmax(-1)


class Own(Base):
    """A weight for each channel, by which its tokens are mixed."""

    def make(self) -> None:
        self.each = nn.Parameter(torch.zeros(8, 6, 6))

    def body(self, x: Tensor) -> Tensor:
        return torch.bmm(self.each, x.permute(2, 1, 0)).permute(2, 1, 0)


NETS: dict[type[Base], dict[str, int]] = {
    Mixed: {"stem": 8, "up": 10},
    Neighbours: {"stem": 8},
    Joined: {"stem": 8, "more": 4},
    Often: {"stem": 8},
    Folded: {"stem": 8, "one": 4},
    Gram: {"stem": 8},
    Own: {"stem": 8},
}


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_rows_that_leave_cost_nothing(kind: type[Base]) -> None:
    model, inputs = randomise(kind()), example(2, 6, 5)
    graph = tp.trace(model, inputs)
    assert {g.id: g.units for g in graph.groups} == NETS[kind]
    assert graph.macs() == macs_of(model, inputs)
    for seed, gone in enumerate((random_gone(graph, 0), random_gone(graph, 1, 0.9), {"stem": [0]})):
        plan = plan_without(graph, gone)
        small = tp.apply(model, plan)
        assert plan.macs == macs_of(small, inputs) < graph.macs(), seed
        if all(group.exact_mask for group in graph.groups):
            assert gap(small(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_FUNCTION
    assert tp.Graph.from_json(graph.to_json()).macs(plan.keep) == plan.macs


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_a_budget_is_what_is_left_of_such_products(share: float) -> None:
    model, inputs = randomise(Mixed()), example(2, 6, 5)
    graph = tp.trace(model, inputs)
    plan = tp.allocate(tp.score(model, [inputs], graph, tp.L2()), graph, tp.Budget(macs=share))
    left = macs_of(tp.apply(model, plan), inputs) / macs_of(model, inputs)
    assert share - 0.15 < left <= share


class Some(Base):
    """Mixes tokens of a part of the channels, which nothing else tells from the others."""

    def make(self) -> None:
        self.some, self.rest, self.mix = 3, 5, nn.Linear(6, 6)

    def body(self, x: Tensor) -> Tensor:
        some, rest = x.split([self.some, self.rest], 2)
        return torch.cat((self.mix(some.mT).mT, rest), 2)


def test_units_that_cost_unequally_much_stay() -> None:
    model, inputs = randomise(Some()), example(2, 6, 5)
    graph = tp.trace(model, inputs)
    assert graph.groups == ()
    assert graph.skipped["stem"] == "what is left in 'mix' depends on which of its units leave"
    assert graph.macs() == macs_of(model, inputs)


def test_bits_of_such_layers_are_paid_for_each_row() -> None:
    model, batches = randomise(Mixed()), [example(16, 6, 5, seed=seed) for seed in range(3)]
    graph = tp.trace(model, batches[0])
    found = analysis.advise(model, batches, graph, 0.05, bits=(6, 4, 3), cost="bitops")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tp.apply(model, found.plan).requires_grad_(False)(batches[0][:1])
    spent = {name.rpartition(".")[2]: sum(each.values()) // 2 for name, each in counter.get_flop_counts().items()}
    bits = {layer: found.bits.get(f"{layer}.weight", FLOAT) for layer in ("stem", "up", "down", "fc")}
    assert set(bits.values()) != {FLOAT}
    wanted = sum(spent[layer] * count for layer, count in bits.items()) / (FLOAT * graph.macs())
    assert found.mixed.cost == pytest.approx(wanted, rel=tolerances.EXACT)
