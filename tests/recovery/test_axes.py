"""Layers along tokens, whose rows are channels that leave: refitted as an independent solution says, or left alone."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests.cases import randomise
from tests.helpers import assert_same_state, gap, outputs, plan_without
from tests.recovery.test_reconstruct import close, data
from tests.reference import ridge_refit

# As many units of `e` and `n` as of the stream leave, and others.
GONE = {"e": [1, 3, 4], "p": [0, 3, 4], "t.0": [1, 5], "n": [2, 6, 7]}
LEFT = [1, 2, 5, 6, 7]


class Mixer(nn.Module):
    """Mixes 6 tokens of 8 channels; channels lie before tokens or behind them, and two other groups are as wide."""

    def __init__(self, first: bool, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first
        self.e, self.n, self.p, self.h = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = norm or nn.Identity()
        self.t = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))

    def start(self, x: Tensor) -> Tensor:
        x = self.p(torch.tanh(self.e(x)))
        return x.transpose(1, 2) if self.first else x

    def read(self, x: Tensor) -> Tensor:
        """What the layers along tokens read, `(batch, 8, 6)`."""
        return self.norm(x.transpose(1, 2) if self.first else x).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        x = (x + self.t(self.read(x))).transpose(1, 2) if self.first else x + self.t(self.read(x)).transpose(1, 2)
        return self.h(torch.tanh(self.n(x)).mean(1))


KINDS = {
    "tokens_first": lambda: Mixer(False),
    "channels_first": lambda: Mixer(True),
    "dead": lambda: Mixer(False),
    "norm": lambda: Mixer(False, nn.LayerNorm(8)),
}


def case(name: str) -> tuple[Mixer, nn.Module, list[Tensor]]:
    model = randomise(KINDS[name]())
    if name == "dead":  # nothing depends on the units of `e` that leave
        model.p.weight.data[:, GONE["e"]] = 0
    batches = data(12, 6, 5)
    return model, tp.apply(model, plan_without(tp.trace(model, batches[0]), GONE)), batches


def refit(layer: nn.Module, seen: Tensor, wanted: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of a layer along tokens, from `(batch, channels, tokens)`."""
    x, y = (value.reshape(-1, value.shape[-1]).numpy() for value in (seen, wanted))
    return ridge_refit(x, y, layer.weight.detach().numpy(), layer.bias.detach().numpy(), tp.Reconstruct().ridge, True)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sums", [False, True])
def test_a_layer_along_tokens_is_refitted_to_the_channels_that_are_left(name: str, sums: bool) -> None:
    model, small, batches = case(name)
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(sums=sums))
    x = torch.cat(batches)
    with torch.no_grad():
        begun, dense = found.start(x), model.start(x)
        seen = small.t[:2](small.read(begun))
        wanted = model.t(model.read(dense))[:, LEFT]
        if sums and model.first:  # what the stream lacks already
            wanted = wanted + dense[:, LEFT] - begun
    weight, bias = refit(small.t[2], seen, wanted)
    close(found.t[2].weight, weight)
    close(found.t[2].bias, bias)
    assert gap(found.t[2].weight, small.t[2].weight) > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_other_recoveries_take_such_layers_too(name: str) -> None:
    model, small, batches = case(name)
    x = torch.cat(batches)
    with torch.no_grad():
        read = model.read(model.start(x))
        hidden = model.t[:2](read)
        wanted = model.t(read)[:, LEFT]
        kept = [0, 2, 3, 4, 6]
        seen = hidden[:, LEFT][..., kept]
        lost = wanted - seen @ model.t[2].weight[:, kept].T - model.t[2].bias
    weight, bias = refit(small.t[2], seen, wanted)
    dense = tp.reconstruct(small, batches, model, tp.Reconstruct(inputs="dense"))
    close(dense.t[2].weight, weight)
    close(dense.t[2].bias, bias)
    folded = tp.fold_means(small, batches, model)
    close(folded.t[2].bias - small.t[2].bias, lost.mean((0, 1)).numpy())
    told: list[dict[str, float]] = []
    tp.refine(small, batches, model, tp.GaussNewton(steps=1, iterations=4), log=told.append)
    assert told[0]["after"] < told[0]["before"]


def test_a_layer_of_which_nobody_knows_what_is_left_keeps_its_weights(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:])

    model, batches = randomise(Mixer(False, Plain())), data(12, 6, 5)
    small = tp.apply(model, plan_without(tp.trace(model, batches[0]), GONE))
    for act in (tp.reconstruct, tp.fold_means):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found = act(small, batches, model)
        assert "t.2 gives another number of rows" in caplog.text
        assert_same_state(found.t.state_dict(), small.t.state_dict())
        assert gap(found.h.bias, small.h.bias) > 1e-3


def test_the_models_are_left_as_they_were() -> None:
    model, small, batches = case("norm")
    model.p.weight.requires_grad_(False)
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tp.reconstruct(small, batches, model)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert_same_state(model.state_dict(), state)
    assert not any(m._forward_hooks for m in model.modules())


def test_as_many_tokens_as_channels_are_left_are_no_channels() -> None:
    model, batches = randomise(Mixer(False)), data(12, 6, 5)
    small = tp.apply(model, plan_without(tp.trace(model, batches[0]), {"p": [0], "n": [2, 7]}))
    told: list[dict[str, float]] = []
    found = tp.refine(small, batches, model, tp.GaussNewton(steps=1, iterations=4), log=told.append)
    assert told[0]["after"] < told[0]["before"]
    assert outputs(found, batches[0]).shape == (12, 3)
