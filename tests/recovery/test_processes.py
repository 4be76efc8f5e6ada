"""Two processes that share each batch learn what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.helpers import launch
from tests.recovery.test_finetune import cut

SUMS = 1e-4
"""Absolute, for float32 weights after a dozen steps whose gradients are sums in another order."""

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": "momentum", "lr": 0.05},
    "accumulated": {"optimizer": "momentum", "lr": 0.05, "accumulate": 2},
    "labels": {"optimizer": "momentum", "lr": 0.05, "label_weight": 0.5, "ema": 0.8},
    "mirrored": {"optimizer": "momentum", "lr": 0.05, "mirrored": True},
}


def data() -> list[Any]:
    """Batches of five, six, one: shared out unevenly, and one that a process gets nothing of."""
    _, _, batches = cut("conv_bn")
    generator = torch.Generator().manual_seed(3)
    return [(x[:n], torch.randint(4, (n,), generator=generator)) for x, n in zip(batches, (5, 6, 1, 16), strict=True)]


def losses_and_model(name: str, folder: Path | None) -> tuple[list[float], nn.Module]:
    model, small, _ = cut("conv_bn")
    losses: list[float] = []
    settings = tp.Finetune(epochs=3, norms="freeze", **SETTINGS[name])
    found = tp.finetune(small, data(), model, settings, save=folder, log=lambda told: losses.append(told["loss"]))
    return losses, found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    launch(Path(__file__).with_name("distilled.py"), folder)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_learn_what_one_does(name: str, together: Path) -> None:
    losses, model = losses_and_model(name, None)
    of_each = [json.loads((together / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    assert of_each[0] == of_each[1]
    assert losses == pytest.approx(of_each[0][0], rel=1e-4)
    assert losses[-1] < losses[0]
    for key, value in model.state_dict().items():
        wanted: Tensor = torch.tensor(of_each[0][1][key]).reshape(value.shape)
        torch.testing.assert_close(value.double(), wanted.double(), rtol=0, atol=SUMS)
    assert (together / name / "last.safetensors").is_file()


def test_the_first_process_alone_may_save(together: Path) -> None:
    assert (together / "first alone" / "last.safetensors").is_file()
