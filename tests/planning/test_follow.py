"""What networks do with their channels, followed: each is cut, and gives what it gives with the same units masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import gap, plan_without, random_gone

NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {}


def net(**units: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """A network and how many units each of its groups has; underscores of layers inside others stand for dots."""

    def keep(kind: type[nn.Module]) -> type[nn.Module]:
        NETS[kind.__name__] = kind, {name.replace("__", "."): count for name, count in units.items()}
        return kind

    return keep


class Base(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, width, 3), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


@net(stem=8, act=8)
class Activations(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.act(F.relu6(F.hardtanh(F.hardswish(x)))))


@net(stem=8)
class Normalised(Base):
    """Repeats what it divides by."""

    def body(self, x: Tensor) -> Tensor:
        return x / x.abs().amax((2, 3), keepdim=True).clamp(min=0.5).expand_as(x) + F.normalize(x, dim=(2, 3))


@net(stem=8, mix=8)
class TokenJoined(Base):
    """A token of its own in front of more positions than there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix = nn.Parameter(torch.zeros(1, 1, 8)), nn.Linear(8, 8)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(len(x), -1, -1), x.flatten(2).mT), dim=1)
        return torch.stack((self.mix(x[:, 0]), self.mix(x[:, 1:]).mean(1)), 2).unsqueeze(-1)


class Part(nn.Module):
    """A convolution over some of the channels; how many, attributes tell."""

    def __init__(self, some: int, rest: int) -> None:
        super().__init__()
        self.some, self.rest = some, rest
        self.conv = nn.Conv2d(some, some, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        some, rest = torch.split(x, [self.some, self.rest], dim=1)
        return torch.cat((some + self.conv(some), rest), 1)


@net(stem=3, **{"stem/2": 5})
class Parts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part(3, 5)

    def body(self, x: Tensor) -> Tensor:
        return self.part(x)


class First(nn.Module):
    """What it is given is added to the first channels of what it makes."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.given = given
        self.conv = nn.Conv2d(given, made, 1)

    def forward(self, x: Tensor) -> Tensor:
        more = self.conv(x)
        return torch.cat((more[:, : self.given] + x, more[:, self.given :]), 1)


@net(stem=5, **{"first.conv": 4})
class Slices(Base):
    def __init__(self) -> None:
        super().__init__(9)
        self.stem, self.first = nn.Conv2d(3, 5, 3), First(5, 9)

    def body(self, x: Tensor) -> Tensor:
        return self.first(x)


@net(**{"table.heads": 3, "table.bias": 4, "table.out": 8, "stem": 8})
class Tables(Base):
    """Keeps a table made of a parameter between passes; the shape of another one is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    def body(self, x: Tensor) -> Tensor:
        return self.table(x)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.Conv2d(8, 3, 1), nn.Conv2d(4, 8, 1)
        self.per_head, self.bias = nn.Parameter(torch.zeros(3, 5)), nn.Conv2d(3, 4, 1, bias=False)
        self.more, self.shape = nn.Parameter(torch.zeros(4)), (1, 4, 1, 1)
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Table:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.kept:
            self.kept["table"] = self.per_head[:, torch.tensor([0, 2, 4, 2])].detach()
        x = self.bias(self.heads(x) + self.kept["table"].mean(1).view(1, -1, 1, 1))
        return self.out(x * self.more.view(self.shape))


@pytest.mark.parametrize("name", NETS)
def test_groups_are_found_and_cut(name: str) -> None:
    make, units = NETS[name]
    model, inputs = randomise(make()), example(2, 3, 7, 7)
    graph = tp.trace(model, inputs)
    assert {g.id: g.units for g in graph.groups} == units
    assert all(g.exact_mask for g in graph.groups)
    for seed in range(3):
        plan = plan_without(graph, random_gone(graph, seed))
        small, masked = tp.apply(model, plan), tp.mask(model, plan)
        assert gap(small(inputs), masked(inputs)) < tolerances.SAME_FUNCTION
        assert gap(small(inputs), model(inputs)) > tolerances.OTHER_FUNCTION
        assert sum(p.numel() for p in small.parameters()) == graph.params(plan.keep)


class Written(Part):
    """The same, with numbers that nothing tells."""

    def forward(self, x: Tensor) -> Tensor:
        some, rest = x[:, :3], x[:, 3:]
        return torch.cat((some + self.conv(some), rest), 1)


def test_parts_whose_lengths_nothing_tells_stay() -> None:
    model, inputs = randomise(Parts()), example(2, 3, 7, 7)
    model.part = randomise(Written(1, 1))
    model.part.conv = randomise(nn.Conv2d(3, 3, 3, padding=1))
    graph = tp.trace(model, inputs)
    assert graph.groups == ()
    assert "takes a part of its channels" in graph.skipped["stem"]


class Shared(nn.Module):
    """One number for the widths of two layers that can be cut apart."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 6
        self.stem = nn.Conv2d(3, 4, 3)
        self.a, self.b, self.fc = nn.Conv2d(4, 12, 1), nn.Conv2d(4, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        a, b = (torch.split(layer(x), self.dim, dim=1) for layer in (self.a, self.b))
        return self.fc(torch.cat((a[0] * a[1], b[0] * b[1]), 1).mean((2, 3)))


def test_one_number_for_two_groups_is_found_out() -> None:
    model, inputs = randomise(Shared()), example(2, 3, 5, 5)
    graph = tp.trace(model, inputs)
    for seed in range(3):
        plan = plan_without(graph, random_gone(graph, seed))
        assert gap(tp.apply(model, plan)(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_FUNCTION
    assert "a" not in graph
    assert "b" not in graph


class Chaotic(nn.Module):
    """Makes so much of rounding that float32 tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(5, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sin(1e7 * self.b(self.a(x).relu())))


def test_rounding_is_not_taken_for_a_mistake() -> None:
    torch.manual_seed(0)
    model, inputs = Chaotic().eval(), torch.randn(2, 5)
    graph = tp.trace(model, inputs)
    assert {g.id: g.units for g in graph.groups} == {"a": 64, "b": 64}
    plan = plan_without(graph, random_gone(graph, 0))
    with torch.no_grad():
        assert gap(tp.apply(model, plan)(inputs), tp.mask(model, plan)(inputs)) > tolerances.OTHER_FUNCTION
