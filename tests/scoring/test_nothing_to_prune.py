"""A model of which nothing can leave is refused by all criteria in the same words, which say why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import tpvprune as tp
from tests.cases import example, randomise
from tpvprune.scoring.registry import CRITERIA


def tied() -> nn.Module:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return randomise(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(5, 3)))


def normed() -> nn.Module:
    return randomise(nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3)))


@pytest.mark.parametrize("criterion", [None, *sorted(CRITERIA)])
@pytest.mark.parametrize(
    ("make", "why"),
    [(tied, "'0' shares a parameter with another layer"), (normed, "'0': ")],
)
def test_the_reasons_are_told(make, why: str, criterion: str | None) -> None:
    model, inputs = make(), example(4, 5)
    graph = tp.trace(model, inputs)
    assert graph.groups == ()
    with pytest.raises(tp.PlanError, match=r"nothing of this model can be pruned.*see graph\.skipped") as caught:
        tp.score(model, [inputs], graph, None if criterion is None else CRITERIA[criterion]())
    assert why in str(caught.value)
    assert next(iter(graph.skipped.values())) in str(caught.value)


def test_alike_reasons_are_told_once_and_few_of_them() -> None:
    skipped = {"a": "one", "b": "one", "c": "two", "d": "three", "e": "four"}
    model = nn.Linear(2, 2)
    empty = tp.trace(model, torch.randn(1, 2))
    graph = tp.Graph((), empty.shapes, empty.reuse, empty.model_id, skipped)
    with pytest.raises(tp.PlanError, match=r"\('a': one; 'c': two; 'd': three\)$"):
        tp.score(model, [torch.randn(1, 2)], graph)
    with pytest.raises(tp.PlanError, match=r"\(it has no layer that could be\)$"):
        tp.score(model, [torch.randn(1, 2)], tp.Graph((), empty.shapes, empty.reuse, empty.model_id, {}))
