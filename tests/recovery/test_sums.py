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


@pytest.mark.parametrize("norm", ["beside", "shared"])
def test_the_norm_before_the_sum_is_undone_and_no_other(norm: str) -> None:
    model = randomise(Stream(WAYS["plain"][0], norm))
    gain = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt() if norm == "shared" else torch.ones(8)
    assert_aims_at(model, data(7, 3, 6, 5), 1, gain.detach())


def test_a_sum_of_other_shares_in_both_models_is_left_alone() -> None:
    model = randomise(Stream(lambda s, y: torch.add(s, y, alpha=0.5)))
    batches = data(7, 3, 6, 5)
    small = off(model, batches)
    small.add = lambda s, y: torch.add(s, y, alpha=0.25)
    summed, plain = (tp.reconstruct(small, batches, model, tp.Reconstruct(sums=s)) for s in (True, False))
    assert torch.equal(summed.conv2.weight, plain.conv2.weight)
