"""A distillation's folder gives back what it was begun with, and nothing else."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tpvprune as tp
from tests.helpers import assert_same_state, plan_without
from tests.recovery.test_training import noisy
from tpvprune.errors import CheckpointError
from tpvprune.plan import plan_of
from tpvprune.recovery.origin import began_with


def mlp_plan(model: nn.Module, graph: tp.Graph, kept: int) -> tp.Plan:
    weights = torch.zeros_like(model[0].weight, dtype=torch.bool)
    weights.view(-1)[kept::2] = True
    return tp.Plan({}, graph, weights={"0.weight": weights})


def other_run(name: str, model: nn.Module, graph: tp.Graph, batches: list[Tensor]) -> tuple[nn.Module, nn.Module]:
    """(pruned, dense) that differ in one thing from those of the first run, and in no count of units."""
    dense, units = copy.deepcopy(model), [0, 2] if name == "units" else [1, 5]
    if name == "teacher":
        with torch.no_grad():
            dense[2].bias[3] += 1e-3
    small = tp.apply(model, plan_without(graph, {"0": units}))
    if name == "start":
        small = tp.reconstruct(small, batches, model)
    if name == "frozen":
        small[2].bias.requires_grad_(False)
    return small, dense


WORDS = {"units": "another plan", "start": "other weights", "frozen": "other frozen parameters", "teacher": "teacher"}


@pytest.mark.parametrize("name", WORDS)
def test_a_folder_gives_no_weights_of_another_run(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(16, 6) for _ in range(3)]
    graph = tp.trace(model, batches[0])
    settings = tp.Finetune(epochs=1, lr=1e-2)
    small, dense = other_run("same", model, graph, batches)
    first = tp.finetune(small, batches, dense, settings, save=tmp_path)
    assert_same_state(tp.finetune(small, batches, dense, settings, save=tmp_path).state_dict(), first.state_dict())
    small, dense = other_run(name, model, graph, batches)
    with pytest.raises(CheckpointError, match=WORDS[name]):
        tp.finetune(small, batches, dense, settings, save=tmp_path)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(self.body(x).relu()), "b": self.b(self.body(x).relu())}


def test_a_folder_gives_no_weights_that_another_output_was_distilled_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Both().eval(), [torch.randn(16, 6) for _ in range(3)]
    small = tp.apply(model, plan_without(tp.trace(model, batches[0]), {"body": [1, 5]}))
    settings = tp.Finetune(epochs=1, lr=1e-2)
    tp.finetune(small, batches, model, settings, output="a", save=tmp_path)
    with pytest.raises(CheckpointError, match="another part of what the models return"):
        tp.finetune(small, batches, model, settings, output="b", save=tmp_path)


def test_a_folder_gives_no_weights_that_another_plan_holds_at_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(16, 6) for _ in range(3)]
    graph, settings = tp.weight_graph(model), tp.Finetune(epochs=1, lr=1e-2)
    even, odd = (tp.apply(model, mlp_plan(model, graph, kept)) for kept in (0, 1))
    tp.finetune(even, batches, model, settings, save=tmp_path)
    with pytest.raises(CheckpointError, match="another plan"):
        tp.finetune(odd, batches, model, settings, save=tmp_path)


def test_plans_inside_tell_runs_apart_as_well() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    graph = tp.weight_graph(model)
    even, odd = (tp.apply(model, mlp_plan(model, graph, kept)) for kept in (0, 1))
    odd.load_state_dict(even.state_dict())
    begun = [began_with(nn.Sequential(part), model) for part in (even, odd, copy.deepcopy(even))]
    assert begun[0]["start"] == begun[1]["start"]
    assert begun[0]["plan"] != begun[1]["plan"]
    assert begun[0] == begun[2]


def test_how_a_plan_was_made_does_not_part_a_run_from_its_folder(tmp_path: Path) -> None:
    model, small, batches = noisy()
    settings, plan = tp.Finetune(epochs=1), plan_of(small)
    first = tp.finetune(small, batches, model, settings, save=tmp_path / "state")
    tp.save(tp.apply(model, tp.Plan(plan.keep, plan.graph, {"scores": 0.1})), tmp_path / "model")
    again = tp.finetune(tp.load(tmp_path / "model", skeleton=model), batches, model, settings, save=tmp_path / "state")
    assert_same_state(again.state_dict(), first.state_dict())


def test_a_refit_is_not_made_anew_where_a_distillation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches, settings = [torch.randn(16, 6) for _ in range(3)], tp.Finetune(epochs=1, lr=1e-2)
    graph = tp.trace(model, batches[0])
    small, other = (tp.apply(model, plan_without(graph, {"0": units})) for units in ([1, 5], [0, 2]))
    first = tp.recover(small, batches, teacher=model, finetune_with=settings, save=tmp_path)
    wanted = tp.finetune(tp.reconstruct(small, batches, model), batches, model, settings)
    assert_same_state(first.state_dict(), wanted.state_dict())

    def never(*args: object, **kwargs: object) -> nn.Module:
        raise AssertionError("refitted again")

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("tpvprune.recovery.recover"), "reconstruct", never)
        again = tp.recover(small, batches, teacher=model, finetune_with=settings, save=tmp_path)
        assert_same_state(again.state_dict(), first.state_dict())
        for changed in ({"model": other}, {"reconstruct_with": tp.Reconstruct(ridge=1.0)}):
            given = {"model": small, "teacher": model, "finetune_with": settings, "save": tmp_path} | changed
            with pytest.raises(AssertionError, match="refitted again"):
                tp.recover(batches=batches, **given)
    with pytest.raises(CheckpointError, match="another plan"):
        tp.recover(other, batches, teacher=model, finetune_with=settings, save=tmp_path)


class Redrawn:
    """Batches that are other ones each time, as augmentation makes them."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter([batch + 0.1 * torch.randn(()) for batch in self.batches])


@pytest.mark.parametrize("refits", [{}, {"refine_with": tp.GaussNewton(steps=1, iterations=2)}, {"batchnorm": True}])
@pytest.mark.parametrize("settings", [None, tp.Finetune(epochs=1, lr=1e-2)])
def test_refits_are_kept_and_are_of_the_images_that_are_given(
    settings: tp.Finetune | None, refits: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).eval()
    one, other = ([torch.randn(16, 6) for _ in range(3)] for _ in range(2))
    small = tp.apply(model, plan_without(tp.trace(model, one[0]), {"0": [1, 5]}))
    given = {"teacher": model, "finetune_with": settings, **refits}
    first = tp.recover(small, one, save=tmp_path, **given)
    assert_same_state(first.state_dict(), tp.recover(small, one, **given).state_dict())
    assert (tmp_path / "refitted.safetensors").is_file()
    with pytest.raises(CheckpointError, match="refitted on other images; give another folder"):
        tp.recover(small, other, save=tmp_path, **given)

    def never(*args: object, **kwargs: object) -> nn.Module:
        raise AssertionError("refitted again")

    for verb in ("reconstruct", "refine", "reestimate_batchnorm"):
        monkeypatch.setattr(importlib.import_module("tpvprune.recovery.recover"), verb, never)
    again = tp.recover(small, one[::-1] if settings is None else one, save=tmp_path, **given)
    assert_same_state(again.state_dict(), first.state_dict())


def test_images_that_are_others_each_time_are_not_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(16, 6) for _ in range(3)]
    small = tp.apply(model, plan_without(tp.trace(model, batches[0]), {"0": [1, 5]}))
    first, again = (
        tp.recover(small, Redrawn(batches), teacher=model, finetune_with=None, save=tmp_path) for _ in range(2)
    )
    assert_same_state(again.state_dict(), first.state_dict())
    with pytest.raises(CheckpointError, match="refitted on other images"):
        tp.recover(small, batches, teacher=model, finetune_with=None, save=tmp_path)


def test_comparing_images_draws_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    data = TensorDataset(torch.randn(48, 6))
    small = tp.apply(model, plan_without(tp.trace(model, data[:16][0]), {"0": [1, 5]}))
    found = []
    for save in (None, tmp_path):
        torch.manual_seed(1)
        read = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(2))
        small_again = tp.recover(small, read, teacher=model, finetune_with=tp.Finetune(epochs=2), save=save)
        found.append((small_again, torch.rand(1)))
    assert_same_state(found[0][0].state_dict(), found[1][0].state_dict())
    assert torch.equal(found[0][1], found[1][1])
