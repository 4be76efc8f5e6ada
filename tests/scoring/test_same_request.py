"""Scores on disk are gone on with for the same request alone: units, settings, labels, what compensates."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.helpers import assert_same_state, built
from tpvprune.analysis import Diagonal
from tpvprune.scoring import moments
from tpvprune.scoring.settings import settings_of

WEIGHT = "2.weight"


def data(count: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.randint(4, (5,), generator=generator))
        for _ in range(count)
    ]


class Two(nn.Module):
    """Two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = built("mlp").model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.inner(x)
        return {"a": found, "b": 2 * found}


class Own:
    """A perturbation that is no dataclass."""

    def __init__(self, size: float) -> None:
        self.size = size

    def moments(self, name: str, weight: Tensor) -> tuple[None, Tensor]:
        return None, torch.full_like(weight, self.size)


class Slotted:
    """The same without a dictionary of attributes."""

    __slots__ = ("size",)

    def __init__(self, size: float) -> None:
        self.size = size

    def moments(self, name: str, weight: Tensor) -> tuple[None, Tensor]:
        return None, torch.full_like(weight, self.size)


class Chosen:
    """Has a method that chooses."""

    def __init__(self, times: float) -> None:
        self.times = times

    def choose(self, output: Tensor) -> Tensor:
        return self.times * output


def once(output: Tensor) -> Tensor:
    return output.clone()


def twice(output: Tensor) -> Tensor:
    return 2 * output


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda output: factor * output


def scaled(output: Tensor, factor: float) -> Tensor:
    return factor * output


def variances(size: float) -> dict[str, Tensor]:
    return {WEIGHT: torch.full((7, 8), size, dtype=torch.float64)}


# Made by one number: another number is another setting.
SETTINGS: dict[str, Callable[[int], Any]] = {
    "head of a function": lambda n: tp.TPV(head=tp.Function((once, twice)[n])),
    "head's own head": lambda n: tp.TPV(head=tp.Function(once, ("logits", "softmax")[n])),
    "output": lambda n: tp.TPV(output=(once, twice)[n]),
    "output by a closure": lambda n: tp.TPV(output=times(n + 1.0)),
    "output by a lambda": lambda n: tp.TPV(output=(lambda o: o * 2, lambda o: o * 3)[n]),
    "output by a partial": lambda n: tp.TPV(output=functools.partial(scaled, factor=n + 1.0)),
    "output by a method": lambda n: tp.TPV(output=Chosen(n + 1.0).choose),
    "output by a module": lambda n: tp.TPV(output=(nn.Sigmoid(), nn.Tanh())[n]),
    "perturbation": lambda n: tp.TPV(perturbation=Own(n + 1.0)),
    "perturbation with slots": lambda n: tp.TPV(perturbation=Slotted(n + 1.0)),
    "variances": lambda n: tp.TPV(perturbation=Diagonal(variances(n + 1.0))),
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("how", ["start", "save"])
def test_scores_of_other_settings_are_refused(kind: str, how: str, tmp_path: Path) -> None:
    model, graph, make = built("mlp").model, built("mlp").graph, SETTINGS[kind]
    first = tp.score(model, data(), graph, make(0))
    first.save(tmp_path / "s", exact=True)
    given: dict[str, Any] = {"start": first} if how == "start" else {"save": tmp_path / "s"}
    with pytest.raises(tp.PlanError, match=r"the scores were made with .*; score anew"):
        tp.score(model, data(4), graph, make(1), **given)
    more = data(4) if how == "save" else data(4)[3:]
    assert_same_state(
        tp.score(model, more, graph, make(0), **given).values, tp.score(model, data(4), graph, make(0)).values
    )


@pytest.mark.parametrize("heads", [{"a": "logits"}, {"b": "logits", "a": "softmax"}, {"a": "softmax", "b": "softmax"}])
def test_scores_of_other_heads_are_refused(heads: dict[str, str], tmp_path: Path) -> None:
    model = Two()
    graph = tp.trace(model, data()[0][0])
    made = tp.TPV(head=tp.Several({"a": "softmax", "b": "logits"}))
    first = tp.score(model, data(), graph, made, save=tmp_path / "s")
    with pytest.raises(tp.PlanError, match=r"head\.heads=.*; score anew"):
        tp.score(model, data(), graph, tp.TPV(head=tp.Several(heads)), save=tmp_path / "s")
    same = tp.TPV(head=tp.Several({"a": tp.Softmax(), "b": tp.Logits()}))
    again = tp.score(model, data(), graph, same, save=tmp_path / "s")
    assert_same_state(again.values, first.values)


def written() -> str:
    """All the settings above, as JSON."""
    several = {"several": tp.TPV(head=tp.Several({"a": "softmax", "b": tp.Function(lambda o: o["a"] in {"x", "y"})}))}
    made = {kind: make(1) for kind, make in SETTINGS.items()} | several
    return json.dumps({kind: settings_of(criterion) for kind, criterion in made.items()})


def test_another_process_writes_settings_down_alike() -> None:
    words = [sys.executable, "-c", "from tests.scoring import test_same_request as t; print(t.written())"]
    root = Path(__file__).parents[2]
    environ = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(root)}
    told = subprocess.run(words, capture_output=True, text=True, check=True, cwd=root, env=environ).stdout
    assert told.strip() == written()


# Units


def test_scores_of_other_units_are_refused(tmp_path: Path) -> None:
    model, whole = built("mlp").model, built("mlp").graph
    blocks = [tp.weight_graph(model, block=block, layers=("2",)) for block in ((1, 2), (7, 4), (1, 1), (7, 2))]
    other = tp.weight_graph(model, block=(1, 8), layers=("2",)), tp.weight_graph(model, layers=("0",))
    tall = tp.weight_graph(model, block=(1, 2), layers=("0", "2"))
    found = [*blocks, *other, tall]
    for number, graph in enumerate(found):
        criterion = tp.TPV(engine="batched")
        save = tmp_path / f"{number}"
        first = tp.score(model, data(), graph, criterion, save=save)
        before = save.read_bytes()
        for asked in [one for one in (*found, whole) if one is not graph]:
            for batches in (data(), data(4)):
                with pytest.raises(tp.PlanError, match=r"units of group|other units of them"):
                    tp.score(model, batches, asked, criterion, save=save)
                with pytest.raises(tp.PlanError, match=r"units of group|other units of them"):
                    tp.score(model, batches, asked, criterion, start=first)
        assert save.read_bytes() == before
        again = tp.score(model, data(), tp.Graph.from_json(graph.to_json()), criterion, save=save)
        assert_same_state(again.values, first.values)


def test_blocks_of_another_shape_are_as_many(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    square, flat = (tp.weight_graph(model, block=block, layers=("2",)) for block in ((2, 2), (4, 1)))
    inputs = [torch.randn(8, 5, dtype=torch.float64)]
    assert square.units == flat.units
    tp.score(model, inputs, square, save=tmp_path / "s")
    with pytest.raises(tp.PlanError, match="other units of them; score anew"):
        tp.score(model, inputs, flat, save=tmp_path / "s")


# Sensitivities


def test_more_sensitivities_than_were_kept_are_refused(tmp_path: Path) -> None:
    model, graph = built("mlp").model, built("mlp").graph
    for kept, asked in ((0, None), (0, 1280), (0, 1), (7, 8), (7, None)):
        save = tmp_path / f"{kept}"
        first = tp.score(model, data(), graph, tp.TPV(sensitivities=kept), save=save)
        for given in ({"save": save}, {"start": first}):
            with pytest.raises(tp.PlanError, match=f"effects of {kept} of 15 samples.*score anew"):
                tp.score(model, data(), graph, tp.TPV(sensitivities=asked), **given)
    tp.score(model, data(), graph, tp.TPV(sensitivities=20), save=tmp_path / "all")
    more = tp.score(model, data(5), graph, tp.TPV(), save=tmp_path / "all")  # all that were seen
    assert more.sensitivities is not None
    assert more.sensitivities.samples == 25


def test_scores_that_can_keep_no_sensitivities_need_none(tmp_path: Path) -> None:
    model = built("mlp").model
    channels, weights = built("mlp").graph, tp.weight_graph(model)
    for number, (graph, criterion) in enumerate(
        [
            (weights, tp.TPV()),
            (channels, tp.TPV(engine="batched")),
            (channels, tp.TPV(perturbation="rounding")),
            (channels, tp.TPV(compensated=True)),
            (channels, tp.JBR(confidence=0.3)),
        ]
    ):
        for _ in range(2):
            assert tp.score(model, data(), graph, criterion, save=tmp_path / f"{number}").sensitivities is None


# Labels


@pytest.mark.parametrize("criterion", [tp.Taylor(), tp.Fisher(), tp.Jacobian()])
def test_other_labels_are_other_batches_to_what_reads_them(criterion: Any, tmp_path: Path) -> None:
    model, graph = built("mlp").model, built("mlp").graph
    first = tp.score(model, data(), graph, criterion, save=tmp_path / "s")
    other = [(x, (y + 1) % 4) for x, y in data()]
    for batches in (other, [*data()[:2], other[2], *data(4)[3:]]):
        with pytest.raises(tp.DataError, match="or labels, other than"):
            tp.score(model, batches, graph, criterion, save=tmp_path / "s")
    assert_same_state(tp.score(model, data(), graph, criterion, save=tmp_path / "s").values, first.values)


@pytest.mark.parametrize("criterion", [tp.TPV(), tp.JBR(confidence=0.3), tp.Variance(), tp.TPV(compensated=True)])
def test_labels_that_are_not_read_do_not_matter(criterion: Any, tmp_path: Path) -> None:
    model, graph = built("mlp").model, built("mlp").graph
    first = tp.score(model, data(), graph, criterion, save=tmp_path / "s")
    for batches in ([x for x, _ in data()], [(x, y + 9) for x, y in data()]):
        again = tp.score(model, batches, graph, criterion, save=tmp_path / "s")
        assert_same_state(again.values, first.values)


# What compensates


def graphs() -> dict[str, tp.Graph]:
    return {"channels": built("mlp").graph, "weights": tp.weight_graph(built("mlp").model)}


@pytest.mark.parametrize("units", ["channels", "weights"])
def test_compensated_scores_are_not_added_to(units: str, tmp_path: Path) -> None:
    model, graph, criterion = built("mlp").model, graphs()[units], tp.TPV(compensated=True)
    tp.score(model, data(1), graph, criterion, save=tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(tp.InputError, match="what compensates what would change; score anew"):
        tp.score(model, data(3), graph, criterion, save=tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before


@pytest.mark.parametrize("units", ["channels", "weights"])
def test_compensated_scores_that_were_stopped_go_on(units: str, tmp_path: Path) -> None:
    model, graph, criterion = built("mlp").model, graphs()[units], tp.TPV(compensated=True)
    whole = tp.score(model, data(), graph, criterion)

    def stop(stage: str, done: int, total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.score(model, data(), graph, criterion, save=tmp_path / "s", progress=stop)
    assert tp.Scores.load(tmp_path / "s").tally.batches in (1, 2)
    done = tp.score(model, data(), graph, criterion, save=tmp_path / "s")
    assert done.samples == 15
    assert done.manifest == whole.manifest
    assert_same_state(done.values, whole.values)
    assert tp.score(model, data(), graph, criterion, save=tmp_path / "s").samples == 15


@pytest.mark.parametrize("units", ["channels", "weights"])
def test_batches_past_those_that_say_what_compensates_are_added(
    units: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "SAMPLES", 10)
    model, graph, criterion = built("mlp").model, graphs()[units], tp.TPV(compensated=True)
    tp.score(model, data(2), graph, criterion, save=tmp_path / "s")
    done = tp.score(model, data(4), graph, criterion, save=tmp_path / "s")
    assert_same_state(done.values, tp.score(model, data(4), graph, criterion).values)


# The same batches once more


def test_batches_that_are_added_twice_are_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, graph = built("mlp").model, built("mlp").graph
    first = tp.score(model, data(3), graph, save=tmp_path / "s")
    for start in (first, tp.Scores.load(tmp_path / "s")):
        for batches, told in ((data(3), 1), (data(5), 1), (data(2), 0), (data(5)[3:], 0)):
            caplog.clear()
            assert tp.score(model, batches, graph, start=start).tally.batches == 3 + len(batches)
            found = [record.getMessage() for record in caplog.records]
            assert sum("the first 3 of these batches, which now count twice" in one for one in found) == told
    caplog.clear()
    tp.score(model, data(5), graph, save=tmp_path / "s")
    assert not caplog.records


class Knows:
    """Things that know each other, each by a list of its own."""

    def __init__(self) -> None:
        self.others: list[Any] = []


@pytest.mark.parametrize("count", [12, 400])
def test_what_a_function_closes_over_is_walked_once(count: int) -> None:
    things = [Knows() for _ in range(count)]
    for number, thing in enumerate(things):
        thing.others = things[:] if count < 100 else things[number + 1 : number + 2]

    def select(output: Tensor) -> Tensor:
        return output if things else output[:, :1]

    told = settings_of(tp.TPV(output=select))
    assert told == settings_of(tp.TPV(output=select))
    things[1].others = []
    assert told != settings_of(tp.TPV(output=select))
