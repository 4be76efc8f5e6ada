"""What a layer in front of a sum makes up for, however the sum is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.cases import randomise
from tests.helpers import gap
from tests.recovery.test_reconstruct import close, cut, data, refit_conv

Way = Callable[[Tensor, Tensor], Tensor]
RIDGE = 0.05


class Stream(nn.Module):
    """A residual block; `norm` lies between its last layer and the sum, or reads that layer beside it."""

    def __init__(self, add: Way, norm: str = "") -> None:
        super().__init__()
        self.add, self.where = add, norm
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv1, self.conv2 = nn.Conv2d(8, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def stream(self, x: Tensor) -> Tensor:
        return torch.tanh(self.stem(x))

    def inner(self, s: Tensor) -> Tensor:
        return torch.relu(self.conv1(s))

    def forward(self, x: Tensor) -> Tensor:
        s = self.stream(x)
        y = self.conv2(self.inner(s))
        beside = self.norm(y).tanh() if self.where == "beside" else 0
        if self.where == "shared":
            y, beside = self.norm(y), self.norm(s)
        return self.fc((torch.relu(self.add(s, y)) + beside).mean((2, 3)))


WAYS: dict[str, tuple[Way, float]] = {  # and how often the stream goes into the sum for once that the branch does
    "plain": (lambda s, y: s + y, 1),
    "branch": (lambda s, y: torch.add(s, y, alpha=0.2), 5),
    "branch taken off": (lambda s, y: s.add(y, alpha=-0.5), -2),
    "in place": (lambda s, y: s.add_(y, alpha=2), 0.5),
    "stream": (lambda s, y: torch.add(y, s, alpha=-0.3), -0.3),
    "stream in place": (lambda s, y: y.add_(s, alpha=0.3), 0.3),
    "never": (lambda s, y: torch.add(s, y, alpha=0) + 0.1 * y, 0),
}


def off(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """A pruned model whose stream is off by something that is not refitted away."""
    small = cut(model, batches[0], {"conv1": [1, 4]})
    with torch.no_grad():
        small.stem.weight += 0.1 * torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(3)).double()
    return small


def assert_aims_at(model: nn.Module, batches: list[Tensor], share: float, gain: Tensor) -> None:
    small = off(model, batches)
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=RIDGE))
    plain = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=RIDGE, sums=False))
    with torch.no_grad():
        seen = [small.inner(small.stream(b)) for b in batches]
        lacks = [share * (model.stream(b) - small.stream(b)) / gain.reshape(-1, 1, 1) for b in batches]
        given = [model.conv2(model.inner(model.stream(b))) for b in batches]
        wanted = [g + lack for g, lack in zip(given, lacks, strict=True)]
    weight, bias = refit_conv(small.conv2, seen, wanted, RIDGE, free_bias=True)
    close(found.conv2.weight, weight)
    close(found.conv2.bias, bias)
    assert (gap(found.conv2.weight, plain.conv2.weight) > 1e-3) == (share != 0)


@pytest.mark.parametrize("name", WAYS)
def test_terms_that_go_into_a_sum_several_times_count_as_often(name: str) -> None:
    add, share = WAYS[name]
    assert_aims_at(randomise(Stream(add)), data(7, 3, 6, 5), share, torch.ones(8))


def test_the_norm_before_the_sum_is_undone() -> None:
    model = randomise(Stream(WAYS["plain"][0], "shared"))
    gain = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    assert_aims_at(model, data(7, 3, 6, 5), 1, gain.detach())


class Several(nn.Module):
    """Branches `ends[n](relu(starts[n](s)))` of a stream `s`, and what is made of them."""

    def __init__(self, use: Callable[[Tensor, list[Tensor]], Tensor], stream: Way | None = None) -> None:
        super().__init__()
        self.use, self.way = use, stream or (lambda x, y: x)
        self.stem = nn.Conv2d(3, 8, 1)
        self.starts = nn.ModuleList(nn.Conv2d(8, 6, 3, 1, 1) for _ in range(2))
        self.ends = nn.ModuleList(nn.Conv2d(6, 8, 3, 1, 1) for _ in range(2))

    def stream(self, x: Tensor) -> Tensor:
        return self.way(torch.tanh(self.stem(x)), x)

    def forward(self, x: Tensor) -> Tensor:
        s = self.stream(x)
        return self.use(s, [end(torch.relu(start(s))) for start, end in zip(self.starts, self.ends, strict=True)])


def strayed(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    small = cut(model, batches[0], {"starts.0": [1, 4], "starts.1": [2]})
    with torch.no_grad():
        small.stem.weight += 0.1 * torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(3)).double()
    return small


STREAMS: dict[str, Way | None] = {
    "one tensor": None,
    "a part": lambda s, x: torch.cat([s, s.flip(1)], 1).chunk(2, 1)[1],
    "of a list": lambda s, x: torch.stack([s, s.tanh()]).unbind()[1],
}


@pytest.mark.parametrize("name", STREAMS)
def test_branches_of_one_stream_make_up_for_it_each(name: str) -> None:
    model = randomise(Several(lambda s, ys: torch.cat([s + ys[0], s + ys[1]], 1).mean((2, 3)), STREAMS[name]))
    batches = data(7, 3, 6, 5)
    small = strayed(model, batches)
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=RIDGE))
    for number in range(2):
        with torch.no_grad():
            seen = [torch.relu(small.starts[number](small.stream(b))) for b in batches]
            given = [model.ends[number](torch.relu(model.starts[number](model.stream(b)))) for b in batches]
            wanted = [g + model.stream(b) - small.stream(b) for g, b in zip(given, batches, strict=True)]
        weight, bias = refit_conv(small.ends[number], seen, wanted, RIDGE, free_bias=True)
        close(found.ends[number].weight, weight)
        close(found.ends[number].bias, bias)


def one_by_one(x: Tensor) -> Tensor:
    return torch.stack([one / (1 + one.norm()) for one in x])


ALONE: dict[str, nn.Module] = {
    "read beside the sum": Several(lambda s, ys: torch.cat([s + ys[0], ys[0].tanh(), ys[1]], 1).mean((2, 3))),
    "in two sums": Several(lambda s, ys: torch.cat([s + ys[0], s.tanh() + ys[0], ys[1]], 1).mean((2, 3))),
    "given out too": Several(lambda s, ys: (ys[0], (s + ys[0]).mean((2, 3)), ys[1])),  # type: ignore[arg-type, return-value]
    "behind samples one by one": Several(
        lambda s, ys: torch.cat([s + ys[0], s + ys[1]], 1).mean((2, 3)), lambda s, x: one_by_one(s)
    ),
    "normed beside the sum": Stream(WAYS["plain"][0], "beside"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_goes_elsewhere_too_or_cannot_be_told_is_refitted_to_itself(name: str) -> None:
    model, batches = randomise(ALONE[name]), data(7, 3, 6, 5)
    small = (off if isinstance(model, Stream) else strayed)(model, batches)
    summed, plain = (tp.reconstruct(small, batches, model, tp.Reconstruct(sums=s)) for s in (True, False))
    for one, other in zip(summed.parameters(), plain.parameters(), strict=True):
        close(one, other.detach())


def test_a_sum_of_other_shares_in_both_models_is_left_alone() -> None:
    model = randomise(Stream(lambda s, y: torch.add(s, y, alpha=0.5)))
    batches = data(7, 3, 6, 5)
    small = off(model, batches)
    small.add = lambda s, y: torch.add(s, y, alpha=0.25)
    summed, plain = (tp.reconstruct(small, batches, model, tp.Reconstruct(sums=s)) for s in (True, False))
    assert torch.equal(summed.conv2.weight, plain.conv2.weight)
