"""What networks do with their channels, followed: each is cut, and gives what it gives with the same units masked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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


@net(stem=8, act=4, last=3)
class Gated(Base):
    """Halves that gate each other, along channels that lie second, and last."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.gate = nn.Conv2d(8, 8, 1), nn.GLU(1)
        self.last, self.fc = nn.Linear(4, 6), nn.Linear(3, 4)

    def body(self, x: Tensor) -> Tensor:
        return F.glu(self.last(self.gate(self.act(x)).movedim(1, -1))).movedim(-1, 1)


@net(stem=8, up=6)
class Unflattened(Base):
    """Channels that a linear layer writes, each with its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.shape, self.fc = nn.Linear(8, 54), nn.Unflatten(1, (6, 3, 3)), nn.Linear(6, 4)

    def body(self, x: Tensor) -> Tensor:
        return self.shape(self.up(x.mean((2, 3)))).relu()


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


class Looks(nn.Module):
    """Looks units up by their places, behind something that pools over them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.norm = how, nn.Linear(5, 8), nn.LayerNorm(8)
        self.b, self.c, self.table = nn.Linear(8, 3), nn.Linear(4, 3), nn.Embedding(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        if self.how == "roll":
            return self.b(x.roll(2, -1))
        if self.how == "argmax":
            return self.b(x) + self.table(x.argmax(-1))
        places = torch.tensor([0, 2, 4, 6])
        return self.b(x) + self.c(x[:, places] if self.how == "index" else x.index_select(1, places))


@pytest.mark.parametrize("how", ["roll", "argmax", "index", "index_select"])
def test_units_that_are_told_by_their_places_stay(how: str) -> None:
    model = randomise(Looks(how))
    graph = tp.trace(model, example(3, 5))
    assert graph.groups == ()
    assert "'Looks'" in graph.skipped["a"]
    assert "by their" in graph.skipped["a"]


class HeadSize(nn.Module):
    """As many heads as a head has channels; the size of a head is a scale, too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_size = 4, 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        B, N = x.shape[:2]
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.mT * self.head_size**-0.5).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(B, N, -1))


class Tempered(nn.Module):
    """A number that happens to be the width, where nothing can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.temp = 16, 16
        self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(len(x), self.hidden)
        return self.b((x / self.temp).softmax(-1).view(len(x), -1))


def test_a_number_counts_where_the_code_names_it() -> None:
    heads = randomise(nn.Sequential(nn.Linear(8, 16), HeadSize(), nn.Linear(16, 5)))
    graph = tp.trace(heads, example(2, 6, 8))
    assert graph.counts == {"1.num_heads": ("1", 1)}
    plan = plan_without(graph, random_gone(graph, 0))
    assert (
        gap(tp.apply(heads, plan)(example(2, 6, 8)), tp.mask(heads, plan)(example(2, 6, 8))) < tolerances.SAME_FUNCTION
    )
    tempered = randomise(Tempered())
    assert set(tp.trace(tempered, example(2, 5)).counts) == {"hidden"}


def test_a_group_that_would_turn_depthwise_is_left_when_it_is_cut_again(tmp_path) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(16, 5, 1)))
    inputs = example(2, 3, 6, 6)
    graph = tp.trace(model, inputs)
    small = tp.apply(model, plan_without(graph, {"0": [0]}))
    again = tp.trace(small, inputs)
    smaller = tp.apply(small, plan_without(again, random_gone(again, 0)))
    tp.save(smaller, tmp_path / "out")
    assert torch.equal(tp.load(tmp_path / "out", skeleton=model)(inputs), smaller(inputs))


def test_traces_side_by_side_leave_the_switches_of_the_process_alone() -> None:
    model, inputs = randomise(Activations()).float(), example(1, 3, 7, 7).float()
    switches = (torch.backends.mha.get_fastpath_enabled, torch.backends.cuda.flash_sdp_enabled)
    switches += (torch.backends.cuda.mem_efficient_sdp_enabled,)
    before = [switch() for switch in switches]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: tp.trace(model, inputs), range(12)))
    assert [switch() for switch in switches] == before
