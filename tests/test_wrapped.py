"""Models in the wrappers that people put around them: compiled, traced, parallel, in half precision inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.cases import example
from tests.helpers import gap, outputs

REFITS = {"reconstruct_with": tp.Reconstruct(), "refine_with": tp.GaussNewton(steps=1, iterations=3)}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), *head).eval()


def batches() -> list[Tensor]:
    return list(example(16, 3, 8, 8).float().split(8))


class Halved(nn.Module):
    """Runs in bfloat16 by its own decision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = self.net(x)
        return found.float()


def compiled() -> nn.Module:
    found = torch.compile(net(), backend="eager")
    found(batches()[0])  # from here on compiled code runs, which calls no hooks that come later
    assert isinstance(found, nn.Module)
    return found


def compiled_in_place() -> nn.Module:
    found = net()
    found.compile(backend="eager")
    found(batches()[0])
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [compiled, compiled_in_place, lambda: torch.fx.symbolic_trace(net())])
def test_wrapped_models_are_pruned_refitted_and_saved_as_what_is_inside(
    made: Callable[[], nn.Module], tmp_path: Path
) -> None:
    wanted = tp.prune(net(), batches(), tp.Budget(macs=0.6), **REFITS).model
    found = tp.prune(made(), batches(), tp.Budget(macs=0.6), **REFITS).model
    assert gap(outputs(found, batches()[0]), outputs(wanted, batches()[0])) <= 1e-5
    tp.save(found, tmp_path)
    again = tp.load(tmp_path, skeleton=made())
    assert torch.equal(outputs(again, batches()[0]), outputs(found, batches()[0]))


def test_models_in_half_precision_inside_are_refitted() -> None:
    dense = Halved().eval()
    graph = tp.trace(dense, batches()[0][:1])
    plan = tp.allocate(tp.score(dense, batches(), graph), graph, tp.Budget(macs=0.5))
    cut = tp.apply(dense, plan)
    small = tp.recover(cut, batches(), teacher=dense, finetune_with=None, **REFITS)
    before, after = (
        sum(float((outputs(m, b) - outputs(dense, b)).square().sum()) for b in batches()) for m in (cut, small)
    )
    assert after < 0.5 * before


def test_parallel_wrappers_are_told_to_be_taken_off() -> None:
    dense = nn.DataParallel(net())
    graph = tp.trace(dense, batches()[0][:1])
    cut = tp.apply(dense, tp.allocate(tp.score(dense, batches(), graph), graph, tp.Budget(macs=0.5)))
    tp.reconstruct(cut, batches(), dense)
    for run in (
        lambda: tp.refine(cut, batches(), dense),
        lambda: tp.finetune(cut, batches(), dense),
        lambda: tp.recover(cut, batches(), teacher=dense),
    ):
        with pytest.raises(tp.ModelError, match=r"inside of DataParallel; give model\.module"):
            run()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused() -> None:
    with pytest.raises(tp.ModelError, match=r"is TorchScript.*give the module that it was made of"):
        tp.trace(torch.jit.script(net()), batches()[0][:1])


class Two(nn.Module):
    """Logits and a map of features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x)
        return {"logits": self.last(self.second(hidden.relu()).relu().mean((2, 3))), "map": hidden}


def test_what_is_not_predicted_is_left_out_of_the_report() -> None:
    told = tp.prune(Two().eval(), batches(), tp.Budget(macs=0.9), criterion=tp.L2(), output="logits").report
    assert told.drift["predicted_kl"] is not None
    assert told.drift["predicted_kl"] > 0
    segments = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    assert tp.prune(segments, batches(), tp.Budget(macs=0.9), criterion=tp.L2()).report.drift["predicted_kl"] is None
