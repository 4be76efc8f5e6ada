"""The contract checks pass what is right and catch what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import tpvprune as tp
from tests.helpers import Built
from tpvprune.scoring.heads import HEADS
from tpvprune.testing import check_criterion, check_head


@pytest.mark.parametrize("name", sorted(HEADS))
def test_the_heads_keep_their_promise(name):
    torch.manual_seed(0)
    check_head(HEADS[name](), torch.randn(3, 4))


class Doubled(tp.Logits):
    def cotangent(self, output, generator):
        return 2 * super().cotangent(output, generator)


class SharedDraw(tp.Logits):
    def cotangent(self, output, generator):
        return super().cotangent(output[:1], generator).expand_as(output)


class IgnoresItsGenerator(tp.Logits):
    def cotangent(self, output, generator):
        return torch.randn_like(output)


@dataclass(frozen=True)
class Drawn(tp.Logits):
    """Numbers of unit variance, drawn in some way."""

    draw: Callable[[torch.Size, torch.Generator], Tensor]

    def cotangent(self, output, generator):
        return self.draw(output.shape, generator).to(output)


def signs(shape, generator):
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1


across = Drawn(lambda shape, generator: signs(shape[::-1], generator).T)
normal = Drawn(lambda shape, generator: torch.randn(shape, generator=generator))
backwards = Drawn(lambda shape, generator: signs(shape, generator).flip(0))


@pytest.mark.parametrize(
    ("head", "phrase"),
    [
        (Doubled(), "sums to"),
        (SharedDraw(), "correlated"),
        (IgnoresItsGenerator(), "same seed"),
        (across, "taken in parts"),
        (normal, "taken in parts"),
        (backwards, "taken in parts"),
    ],
)
@pytest.mark.parametrize("shape", [(3, 4), (2, 7), (5, 3)])
def test_wrong_heads_are_caught(head, phrase, shape):
    with pytest.raises(AssertionError, match=phrase):
        check_head(head, torch.randn(shape))


@pytest.mark.parametrize(
    "right",
    [
        signs,
        lambda shape, generator: (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * 3**0.5,
        lambda shape, generator: torch.cat([torch.randn(1, *shape[1:], generator=generator) for _ in range(shape[0])]),
    ],
)
@pytest.mark.parametrize("shape", [(1, 3), (3, 4), (2, 2, 3)])
def test_heads_that_draw_sample_after_sample_pass(right, shape):
    check_head(Drawn(right), torch.randn(shape))


def outputs():
    generator = torch.Generator().manual_seed(4)
    found = {"logits": torch.randn(3, 4, generator=generator), "boxes": torch.randn(3, 2, 2, generator=generator)}
    return found | {"label": torch.arange(3)}


def test_heads_of_several_outputs_keep_their_promise():
    check_head(tp.Several({"logits": "softmax", "boxes": "logits"}), outputs())
    check_head(tp.Function(lambda named: named["logits"][:, :2] * named["boxes"][:, 0], "logits"), without_labels())


def without_labels():
    return {name: value for name, value in outputs().items() if name != "label"}


class Forgets(tp.Several):
    def cotangent(self, output, generator):
        return {"logits": super().cotangent(output, generator)["logits"]}


class Turns(tp.Several):
    def exact(self, output):
        return (
            {name: value.mT if value.ndim == 2 else value for name, value in u.items()} for u in super().exact(output)
        )


class Together(tp.Several):
    """One sign for both outputs."""

    def cotangent(self, output, generator):
        drawn = super().cotangent(output, generator)
        return {**drawn, "boxes": drawn["logits"].reshape(drawn["boxes"].shape)}


@pytest.mark.parametrize(
    ("kind", "phrase"),
    [
        (Forgets, r"the cotangent is of the outputs \['logits'\], the model's are \['boxes', 'logits'\]"),
        (Turns, r"an exact cotangent of 'logits' is \(4, 3\), the output \(3, 4\)"),
        (Together, "sums to"),
    ],
)
def test_wrong_heads_of_several_outputs_are_caught(kind, phrase):
    with pytest.raises(AssertionError, match=phrase):
        check_head(kind({"logits": "logits", "boxes": "logits"}), without_labels())


def test_tpv_keeps_the_criterion_promise(mlp: Built):
    check_criterion(tp.TPV(), mlp.model, [mlp.inputs], mlp.graph)


@dataclass(frozen=True)
class LeavesTrainMode:
    def measure(self, model, batches, graph, progress=None):
        scores = tp.TPV().measure(model, batches, graph, progress)
        model.train()
        return scores


@dataclass(frozen=True)
class DrawsGlobally:
    def measure(self, model, batches, graph, progress=None):
        return tp.TPV(seed=int(torch.randint(0, 9, ()))).measure(model, batches, graph, progress)


@pytest.mark.parametrize(("criterion", "phrase"), [(LeavesTrainMode(), "modes"), (DrawsGlobally(), "random state")])
def test_wrong_criteria_are_caught(mlp: Built, criterion, phrase):
    with pytest.raises(AssertionError, match=phrase):
        check_criterion(criterion, mlp.model, [mlp.inputs], mlp.graph)
    mlp.model.eval()
