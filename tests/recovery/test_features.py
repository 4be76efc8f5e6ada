"""Outputs of named layers beside the loss: wherever their channels lie."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests.helpers import outputs, plan_without
from tpvprune.recovery.distance import Features

GONE = [0, 3, 7, 8]
KEPT = [1, 2, 4, 5, 6, 9]


class FirstNorm(nn.LayerNorm):
    """A norm over the channels of maps that does not say so by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class Maps(nn.Module):
    """A norm between two convolutions; maps are as wide and high as they have channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 10, 1), norm, nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x))).mean((2, 3))


class Tokens(nn.Module):
    """A norm between two linear layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Linear(3, 10), norm, nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x))).mean(1)


CASES = {
    "LayerNorm2d": (lambda: Maps(LayerNorm2d(10)), (3, 10, 10), 1),
    "BatchNorm2d": (lambda: Maps(nn.BatchNorm2d(10)), (3, 10, 10), 1),
    "of no name": (lambda: Maps(FirstNorm(10)), (3, 5, 5), 1),
    "RMSNorm": (lambda: Tokens(nn.RMSNorm(10)), (10, 3), -1),
    "LayerNorm": (lambda: Tokens(nn.LayerNorm(10)), (10, 3), -1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_channels_that_are_left_are_compared(name: str) -> None:
    make, shape, axis = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    batches = [torch.randn(6, *shape) for _ in range(2)]
    graph = tp.trace(model, batches[0])
    small = tp.apply(model, plan_without(graph, {graph.groups[0].id: GONE}))
    features = Features(small, model, ["norm"])
    with features.watched() as found:
        outputs(small, batches[0]), outputs(model, batches[0])
    mine, wanted = (held["norm"] for held in found)
    wanted = wanted.movedim(axis, 0)[KEPT].movedim(0, axis)
    expected = (mine - wanted).square().mean() / wanted.square().mean()
    torch.testing.assert_close(features.distance(found), expected)
    settings = tp.Finetune(epochs=1, lr=1e-9, features=("norm",), feature_weight=2.0)
    told: list[dict[str, float]] = []
    tp.finetune(small, batches[:1], model, settings, log=told.append)
    tp.finetune(small, batches[:1], model, tp.Finetune(epochs=1, lr=1e-9), log=told.append)
    assert told[0]["loss"] - told[1]["loss"] == pytest.approx(2 * float(expected), rel=1e-4)


class Pair(nn.Identity):
    """Gives two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_what_gives_no_tensor_is_refused() -> None:
    class Both(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x))[0]).mean(1)

    model = Both(Pair()).eval()
    batches = [torch.randn(6, 10, 3)]
    small = tp.apply(model, plan_without(tp.trace(model, batches[0]), {"conv": GONE}))
    with pytest.raises(tp.InputError, match="'norm' gives a tuple"):
        tp.finetune(small, batches, model, tp.Finetune(epochs=1, features=("norm",), feature_weight=1.0))
