"""Networks that find things in images: regions of feature maps, rows put into place, outputs that may be empty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import gap, plan_without, random_gone

ops = pytest.importorskip("torchvision.ops")


class Regions(nn.Module):
    """Pools regions of two levels, puts them together, and classifies each."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.first, self.small, self.large = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 2, 2)
        self.fc, self.last, self.fixed = nn.Linear(6 * 4, 10), nn.Linear(10, 3), fixed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        levels = self.small(x), self.large(x)
        boxes = x.new_tensor([[0, 1, 1, 7, 7], [0, 0, 2, 5, 9], [1, 2, 2, 8, 6]])
        pooled = x.new_zeros((3, 6 if self.fixed else levels[0].shape[1], 2, 2))
        for number, (level, rows) in enumerate(zip(levels, ([0, 2], [1]), strict=True)):
            rows = torch.tensor(rows)
            pooled[rows] = ops.roi_align(level.float(), boxes[rows].float(), 2, 0.5**number, 2).to(x.dtype)
        return self.last(self.fc(pooled.flatten(1)).relu())


def test_regions_are_followed_to_what_reads_them() -> None:
    net, inputs = randomise(Regions()), example(2, 3, 10, 10)
    graph = tp.trace(net, inputs)
    assert {group.id: group.units for group in graph.groups} == {"first": 8, "small": 6, "fc": 10}
    assert {"small", "large", "fc"} == set(graph["small"].layers)
    for seed in range(3):
        plan = plan_without(graph, random_gone(graph, seed))
        small = tp.apply(net, plan)
        assert sum(p.numel() for p in small.parameters()) == graph.params(plan.keep)
        assert gap(small(inputs), tp.mask(net, plan)(inputs)) < 1e-6  # regions are pooled in float32


def test_room_of_a_fixed_width_keeps_what_is_put_there() -> None:
    graph = tp.trace(randomise(Regions(fixed=True)), example(2, 3, 10, 10))
    assert {group.id: group.units for group in graph.groups} == {"first": 8, "fc": 10}
    assert "cannot do without them" in graph.skipped["small"]


class Masked(nn.Module):
    """Puts what one layer makes of some tokens in the place of what another made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, some = self.first(x), torch.arange(x.shape[1]) % 2 == 0
        mask = some.expand(x.shape[:2])
        y[mask] = self.other(x)[mask]
        return self.last(y.relu())


def test_rows_that_a_mask_tells_are_tied_to_those_around_them() -> None:
    net, inputs = randomise(Masked()), example(2, 7, 5)
    graph = tp.trace(net, inputs)
    assert [(group.id, set(group.layers)) for group in graph.groups] == [("first", {"first", "other", "last"})]
    plan = plan_without(graph, {"first": [1, 4, 7]})
    assert gap(tp.apply(net, plan)(inputs), tp.mask(net, plan)(inputs)) < tolerances.SAME_FUNCTION


class Found(nn.Module):
    """Gives what it is sure of, which may be nothing."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.first, self.last, self.sure = nn.Linear(5, 8), nn.Linear(8, 3), sure

    def forward(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        found = [self.last(self.first(image).relu()) for image in images]
        return [scores[scores.sigmoid().amax(-1) > self.sure] for scores in found]


def test_outputs_may_be_empty() -> None:
    graph = tp.trace(randomise(Found(1.0)), example(2, 7, 5))
    assert {group.id: group.units for group in graph.groups} == {"first": 8}


def test_a_list_of_images_is_refused_with_the_next_step() -> None:
    images = list(example(2, 7, 5))
    with pytest.raises(
        tp.errors.ModelError, match="put Found into a module that takes one batch and calls it on a list"
    ):
        tp.trace(randomise(Found(0.0)), (images,))
    with pytest.raises(tp.errors.ModelError, match=r"no tensor with a batch dimension$"):
        tp.trace(randomise(Found(0.0)), (1,))


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_are_refused_with_the_next_step() -> None:
    net = nn.Sequential(nn.Linear(5, 8), torch.ao.nn.quantized.Linear(8, 3))
    with pytest.raises(tp.errors.ModelError, match=r"'1' is a quantized Linear.* prune the floating model"):
        tp.trace(net, example(2, 5))
