"""Labels beside the distillation: what cross-entropy can read, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests.helpers import assert_same_state, outputs, plan_without
from tests.recovery.test_finetune import cut

SETTINGS = tp.Finetune(epochs=1, lr=1e-2, label_weight=0.5)


def labelled(batches: list[Tensor], classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(x, torch.randint(classes, (len(x),), generator=generator)) for x in batches]


def classes_of(model: nn.Module, batches: list[Tensor]) -> int:
    return outputs(model, batches[0]).shape[1]


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16])
@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_whole_numbers_of_any_width_are_classes(kind: torch.dtype, mixup: float, monkeypatch) -> None:
    monkeypatch.setattr("numpy.random.beta", lambda a, b: 0.3)
    model, small, batches = cut("mlp")
    pairs = labelled(batches, classes_of(model, batches))
    settings = tp.Finetune(epochs=1, lr=1e-2, label_weight=0.5, mixup=mixup)
    wide = tp.finetune(small, pairs, model, settings, held_out=pairs)
    narrow = [(x, y.to(kind)) for x, y in pairs]
    found = tp.finetune(small, narrow, model, settings, held_out=narrow)
    assert_same_state(found.state_dict(), wide.state_dict())


def test_shares_of_classes_are_taken_as_they_are() -> None:
    model, small, batches = cut("mlp")
    classes = classes_of(model, batches)
    pairs = labelled(batches, classes)
    shares = [(x, F.one_hot(y, classes).float()) for x, y in pairs]
    wanted, found = (tp.finetune(small, given, model, SETTINGS) for given in (pairs, shares))
    for a, b in zip(wanted.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_maps_of_labels_go_with_maps_of_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    pairs = [(torch.randn(4, 3, 5, 5), torch.randint(4, (4, 5, 5)))]
    small = tp.apply(model, plan_without(tp.trace(model, pairs[0][0]), {"0": [1, 2]}))
    told: list[dict[str, float]] = []
    tp.finetune(small, pairs, model, tp.Finetune(epochs=1, label_weight=1.0), log=told.append)
    assert told[0]["loss"] == pytest.approx(float(F.cross_entropy(outputs(small, pairs[0][0]), pairs[0][1])), rel=1e-5)
    with pytest.raises(tp.DataError, match="one label a sample"):
        tp.finetune(small, pairs, model, tp.Finetune(epochs=1, label_weight=1.0, mixup=0.1))


WRONG: dict[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "float": (lambda y, classes: y.float(), r"of torch.float32, \(16,\)"),
    "one-hot": (lambda y, classes: F.one_hot(y, classes), "of one-hot rows"),
    "too large": (lambda y, classes: y + classes, "is none of the model's"),
    "too few": (lambda y, classes: y[:-1], r"\(15,\) for 16 inputs"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("place", ["training", "mixed", "held out"])
def test_other_labels_are_refused(name: str, place: str) -> None:
    model, small, batches = cut("mlp")
    classes = classes_of(model, batches)
    change, words = WRONG[name]
    pairs = labelled(batches, classes)
    wrong = [(x, change(y, classes)) for x, y in pairs]
    settings = tp.Finetune(epochs=1, label_weight=0.5, mixup=0.2 if place == "mixed" else 0.0)
    held = {"held_out": wrong} if place == "held out" else {}
    with pytest.raises(tp.DataError, match=words):
        tp.finetune(small, pairs if place == "held out" else wrong, model, settings, **held)
