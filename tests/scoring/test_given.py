"""What is given to `tp.score`: what it cannot score is refused in plain words, what was made elsewhere is scored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.helpers import assert_same_state, built

CRITERIA = [
    tp.TPV(),
    tp.TPV(engine="batched"),
    tp.TPV(compensated=True),
    tp.JBR(confidence=0.0),
    tp.Taylor(),
    tp.Fisher(),
    tp.Jacobian(),
    tp.Wanda(),
]


def name(criterion: Any) -> str:
    return criterion.label


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.randint(4, (5,), generator=generator))
        for _ in range(3)
    ]


@pytest.mark.parametrize("criterion", CRITERIA, ids=name)
def test_a_batch_without_a_sample_is_refused(criterion: Any, tmp_path) -> None:
    empty = (data()[0][0][:0], data()[0][1][:0])
    for place in (0, 2):
        batches = [*data()[:place], empty, *data()[place:]]
        with pytest.raises(tp.DataError, match=rf"batch {place} \(from 0\) holds no sample"):
            tp.score(built("mlp").model, batches, built("mlp").graph, criterion)
    tp.score(built("mlp").model, data(), built("mlp").graph, tp.TPV(), save=tmp_path / "s")
    with pytest.raises(tp.DataError, match="batch 3 "):  # of all, also where those before it are done
        tp.score(built("mlp").model, [*data(), empty], built("mlp").graph, tp.TPV(), save=tmp_path / "s")


@pytest.mark.parametrize(
    "given", [tp.TPV, tp.L1, "tpv", 7, object()], ids=lambda given: getattr(given, "__name__", type(given).__name__)
)
def test_what_is_no_criterion_is_refused(given: Any) -> None:
    with pytest.raises(tp.InputError, match=r"is no criterion; give one that is made, as tp.TPV\(\)"):
        tp.score(built("mlp").model, data(), built("mlp").graph, given)


class Sum(nn.Module):
    """Takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last((self.first(x) + self.first(y)).relu())


@pytest.mark.parametrize("criterion", CRITERIA, ids=name)
def test_a_model_of_two_arguments_is_refused(criterion: Any) -> None:
    model, inputs = Sum().double(), data()[0][0]
    graph = tp.trace(model, (inputs, inputs))
    with pytest.raises(tp.ModelError, match=r"Sum is not called on one tensor.*'y'"):
        tp.score(model, data(), graph, criterion)
    assert tp.score(model, data(), graph, tp.L1()).values  # does not call it


def test_an_error_of_the_model_itself_is_left_as_it_is() -> None:
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise TypeError("of its own")

    model = Broken(*built("mlp").model)
    with pytest.raises(TypeError, match="of its own"):
        tp.score(model, data(), built("mlp").graph)


@pytest.mark.parametrize("criterion", CRITERIA, ids=name)
def test_inference_mode_changes_nothing(criterion: Any) -> None:
    model, graph = built("mlp").model, built("mlp").graph
    wanted = tp.score(model, data(), graph, criterion)
    with torch.inference_mode():
        made = [(x.clone(), y.clone()) for x, y in data()]
        assert made[0][0].is_inference()
        inside = [tp.score(model, batches, graph, criterion) for batches in (data(), made)]
    for scores in (*inside, tp.score(model, made, graph, criterion)):
        assert_same_state(scores.values, wanted.values)
        assert not any(value.is_inference() for value in scores.values.values())


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = copy.deepcopy(built("mlp").model)
    for criterion in (tp.TPV(), tp.JBR(confidence=0.0)):
        with pytest.raises(tp.ModelError, match=r"'0.weight' of Sequential was made inside torch.inference_mode\(\)"):
            tp.score(model, data(), built("mlp").graph, criterion)
    assert tp.score(model, data(), built("mlp").graph, tp.Wanda()).values
