"""The contract checks pass what is right and catch what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

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


@pytest.mark.parametrize(
    ("head", "phrase"), [(Doubled(), "sums to"), (SharedDraw(), "correlated"), (IgnoresItsGenerator(), "same seed")]
)
def test_wrong_heads_are_caught(head, phrase):
    with pytest.raises(AssertionError, match=phrase):
        check_head(head, torch.randn(3, 4))


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
