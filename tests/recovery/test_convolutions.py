"""Refits of convolutions of all kinds against least squares over the layer's own matrix, one weight after the other."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import assert_same_state, gap, outputs, plan_without
from tests.recovery.test_reconstruct import close, data
from tests.reference import ridge_refit
from tpvprune.patches import patches

KINDS = {
    "conv3d": (nn.Conv3d, {"kernel_size": (2, 3, 1), "padding": (1, 1, 0), "stride": (1, 2, 1)}),
    "conv3d_dilated": (nn.Conv3d, {"kernel_size": 2, "dilation": (1, 2, 1), "padding": 1}),
    "conv3d_same": (nn.Conv3d, {"kernel_size": (1, 3, 3), "padding": "same"}),
    "transposed1d": (nn.ConvTranspose1d, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}),
    "transposed2d": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2}),
    "transposed2d_overlapping": (nn.ConvTranspose2d, {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (0, 1)}),
    "transposed2d_with_gaps": (nn.ConvTranspose2d, {"kernel_size": 1, "stride": (3, 2), "output_padding": (2, 0)}),
    "transposed2d_cropped": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2, "padding": 3}),
    "transposed3d": (nn.ConvTranspose3d, {"kernel_size": (1, 2, 3), "stride": (1, 1, 2), "padding": (0, 0, 1)}),
}
FIRST = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = (5, 4, 3)


def dims(layer: nn.Module) -> int:
    return layer.weight.ndim - 2


class Net(nn.Module):
    """What is refitted between two others; a size that is asked for goes to it."""

    def __init__(self, layer: nn.Module, size: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.first = FIRST[dims(layer)](2, layer.in_channels, 1)
        self.layer, self.size = layer, size
        self.last = FIRST[dims(layer)](layer.out_channels, 2, 1)

    def read(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x))

    def given(self, x: Tensor) -> Tensor:
        value = self.read(x)
        return self.layer(value) if self.size is None else self.layer(value, output_size=self.size)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.given(x))).flatten(2).mean(2)


def columns(model: Net, x: Tensor, out: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """What output channel `out` gives for each single weight of its own, `(rows, weights)`, and where those stand."""
    layer = model.layer
    weight, bias = layer.weight.detach().clone(), layer.bias
    layer.bias, found, places = None, [], []
    with torch.no_grad():
        for place in np.ndindex(*weight.shape):
            layer.weight.zero_()
            layer.weight[place] = 1
            given = model.given(x)
            own = place[1] if layer.transposed else place[0]
            mine = own == out % weight.shape[1] if layer.transposed else own == out
            if layer.transposed and layer.groups > 1:
                mine &= place[0] // (layer.in_channels // layer.groups) == out // weight.shape[1]
            if mine:
                places.append(place)
                found.append(given[:, out].flatten().numpy())
        layer.weight.copy_(weight)
    layer.bias = bias
    return np.stack(found, 1), tuple(np.array(places).T)


def refitted(small: Net, wanted: list[Tensor], batches: list[Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    """The weights and biases of least squares."""
    weight, bias = small.layer.weight.detach().clone(), small.layer.bias.detach().clone()
    for out in range(len(bias)):
        read = [columns(small, batch, out) for batch in batches]
        x, places = np.concatenate([r[0] for r in read]), read[0][1]
        y = np.concatenate([w[:, out].flatten().numpy() for w in wanted])[:, None]
        old = weight[places].numpy()[None]
        new, shift = ridge_refit(x, y, old, bias[out : out + 1].numpy(), ridge, True)
        weight[places] = torch.from_numpy(new[0])
        bias[out] = shift[0]
    return weight, bias


def cut(model: Net, x: Tensor, gone: dict[str, list[int]]) -> Net:
    return tp.apply(model, plan_without(tp.trace(model, x), gone))


def case(name: str) -> tuple[Net, list[Tensor]]:
    kind, settings = KINDS[name]
    model = randomise(Net(kind(5, 4, **settings)))
    return model, data(3, 2, *SIZES[: dims(model.layer)], batches=2)


@pytest.mark.parametrize("ridge", [1e-2, 0.5])
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_solves_its_ridge_problem(name: str, ridge: float) -> None:
    model, batches = case(name)
    small = cut(model, batches[0], {"first": [1, 3], "layer": [2]})
    told: list[dict[str, float]] = []
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=ridge), log=told.append)
    assert told[0]["layers"] == 2
    with torch.no_grad():
        wanted = [model.given(batch)[:, [0, 1, 3]] for batch in batches]
    weight, bias = refitted(small, wanted, batches, ridge)
    close(found.layer.weight, weight.numpy())
    close(found.layer.bias, bias.numpy())
    assert gap(found.layer.weight, small.layer.weight) > 1e-3


def test_a_size_that_a_transposed_convolution_is_asked_for_is_kept_to() -> None:
    model = randomise(Net(nn.ConvTranspose2d(5, 4, 3, stride=3), size=(17, 14)))
    batches = data(3, 2, 5, 4)
    small = cut(model, batches[0], {"first": [1, 3]})
    found = tp.reconstruct(small, batches, model)
    with torch.no_grad():
        weight, bias = refitted(small, [model.given(batch) for batch in batches], batches, tp.Reconstruct().ridge)
    close(found.layer.weight, weight.numpy())
    close(found.layer.bias, bias.numpy())


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d])
def test_grouped_ones_behind_the_first_solve_theirs(kind: type[nn.Module]) -> None:
    layer = kind(4, 6, 2, groups=2)
    net = randomise(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3), Net(layer)))
    batches = data(3, 2, *SIZES[-dims(layer) :], batches=2)
    small = tp.apply(net, plan_without(tp.trace(net, batches[0]), {"0": [1, 4]}))
    found = tp.reconstruct(small, batches, net, tp.Reconstruct(every=True))
    with torch.no_grad():
        wanted = [net[3].given(net[:3](batch)) for batch in batches]
        seen = [found[:3](batch) for batch in batches]
    start = small[3]
    start.first.load_state_dict(found[3].first.state_dict())
    weight, bias = refitted(start, wanted, seen, tp.Reconstruct().ridge)
    close(found[3].layer.weight, weight.numpy())
    close(found[3].layer.bias, bias.numpy())


@pytest.mark.parametrize("name", KINDS)
def test_dense_inputs_folds_and_steps_take_them_too(name: str) -> None:
    model, batches = case(name)
    batches = [torch.cat([batch] * 3) for batch in batches]
    small = cut(model, batches[0], {"first": [1, 3], "layer": [2]})
    before = apart(small, model, batches)
    assert apart(tp.reconstruct(small, batches, model, tp.Reconstruct(inputs="dense")), model, batches) < before
    folded = tp.fold_means(small, batches, model)
    with torch.no_grad():
        lost = [model.given(b)[:, [0, 1, 3]] - without(model, b, [1, 3])[:, [0, 1, 3]] for b in batches]
    mean = torch.cat(lost).transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(folded.layer.bias - small.layer.bias, mean, rtol=tolerances.SOLVE, atol=1e-12)
    told: list[dict[str, float]] = []
    tp.refine(small, batches, model, tp.GaussNewton(steps=1, iterations=4), log=told.append)
    assert told[0]["after"] < 0.9 * told[0]["before"]


def apart(small: nn.Module, model: nn.Module, batches: list[Tensor]) -> float:
    return sum(float((outputs(small, b) - outputs(model, b)).square().sum()) for b in batches)


def without(model: Net, x: Tensor, gone: list[int]) -> Tensor:
    value = model.read(x)
    value[:, gone] = 0
    return model.layer(value)


def test_masked_weights_of_a_transposed_convolution_stay_zero_and_the_rest_is_refitted() -> None:
    model = randomise(Net(nn.ConvTranspose2d(4, 3, 2, stride=2)))
    batches = data(4, 2, 4, 3)
    mask = torch.rand(model.layer.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.4
    small = tp.apply(model, tp.Plan({}, tp.trace(model, batches[0]), {}, {"layer.weight": mask}))
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0))
    assert torch.equal(found.layer.weight == 0, ~mask)
    with torch.no_grad():
        wanted = [model.given(batch) for batch in batches]
    for out in range(3):
        read = [columns(small, batch, out) for batch in batches]
        free = mask[read[0][1]].numpy()
        x = np.concatenate([r[0] for r in read])[:, free]
        y = np.concatenate([w[:, out].flatten().numpy() for w in wanted])
        x, y = np.column_stack([x, np.ones(len(x))]), y
        best = np.linalg.lstsq(x, y, rcond=None)[0]
        close(found.layer.weight[read[0][1]][torch.from_numpy(free)], best[:-1])
        close(found.layer.bias[out], best[-1])


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_columns_times_weights_are_the_outputs(kind: type[nn.Module], groups: int) -> None:
    layer = kind(4, 6, (2, 3, 1)[-dims(kind(1, 1, 1)) :], stride=2, padding=1, groups=groups, bias=False).double()
    x = data(2, 4, *SIZES[: dims(layer)], batches=1)[0]
    given = outputs(layer, x)
    weight = layer.weight.detach()
    if layer.transposed:
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    rows = weight.reshape(groups, 6 // groups, -1)
    got = torch.einsum("goi,bgip->bgop", rows, patches(layer, x, tuple(given.shape[2:])))
    assert gap(got.reshape(given.shape), given) < tolerances.SAME_FUNCTION


class Raw(nn.Module):
    """A recurrent layer and a bare parameter read pruned units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(3, 6)
        self.lstm, self.bare = nn.LSTM(8, 4, batch_first=True), nn.Parameter(torch.randn(2, 6))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.relu(self.b(x)).mean(1)
        return self.last(self.lstm(torch.relu(self.a(x)))[0].mean(1)) + kept @ self.bare.T


def test_what_is_not_refitted_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = randomise(Raw())
    batches = data(6, 4, 3)
    graph = tp.trace(model, batches[0])
    assert {"lstm", ""} <= {m.layer for group in graph.groups for m in group.of_role("consume")}
    small = tp.apply(model, plan_without(graph, {"a": [0], "b": [0]}))
    for act in (tp.reconstruct, tp.fold_means):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert_same_state(act(small, batches, model).state_dict(), small.state_dict())
        (told,) = caplog.messages
        assert "'lstm', the model itself" in told
        assert "'last'" not in told


def test_features_of_a_transposed_convolution_are_compared_channel_by_channel() -> None:
    model, batches = case("transposed2d")
    small = cut(model, batches[0], {"layer": [2]})
    settings = tp.Finetune(epochs=1, lr=1e-12, features=("layer",), feature_weight=1e6)
    told: list[dict[str, float]] = []
    tp.finetune(small, batches, model, settings, log=told.append)
    assert told[0]["loss"] < 1  # what is left of the layer gives what it gave
