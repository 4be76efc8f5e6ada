"""A teacher that answers for an image and its mirror image."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.helpers import assert_same_state, gap, outputs, plan_without
from tests.recovery.test_finetune import cut, kl
from tpvprune.recovery.teacher import Teacher

BOTH = tp.Finetune(epochs=3, lr=1e-2, mirrored=True)


class Mean(nn.Module):
    """The mean answer to an image and to its columns in the opposite order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        columns = torch.arange(x.shape[3] - 1, -1, -1)
        return torch.stack([self.model(x), self.model(x[:, :, :, columns])]).mean(0)


def test_the_mean_answer_is_learnt_and_the_answer_itself_judged_by() -> None:
    model, small, batches = (part if isinstance(part, list) else part.eval() for part in cut("conv_bn"))
    held = [batches.pop()]
    told: dict[str, list[dict[str, float]]] = {"both": [], "mean": [], "held": []}
    found = tp.finetune(small, batches, model, BOTH, log=told["both"].append)
    plain = tp.Finetune(epochs=3, lr=1e-2)
    expected = tp.finetune(small, batches, Mean(model), plain, log=told["mean"].append)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=1e-5)
    alone = tp.finetune(small, batches, model, plain)
    assert gap(outputs(alone, held[0]), outputs(found, held[0])) > 1e-3
    judged = tp.finetune(small, batches, model, BOTH, held_out=held, log=told["held"].append)
    for got, mean, same in zip(told["both"], told["mean"], told["held"], strict=True):
        assert got["loss"] == pytest.approx(mean["loss"], rel=1e-4)
        assert got["loss"] == pytest.approx(same["loss"], rel=1e-4)
    before = told["held"][0]["held_out_before"]
    assert before == pytest.approx(kl(small, model, held), rel=1e-4)
    assert before != pytest.approx(kl(small, Mean(model), held), rel=1e-3)
    assert told["held"][-1]["held_out"] == pytest.approx(kl(found, model, held), rel=1e-4)
    best = min(before, *(epoch["held_out"] for epoch in told["held"]))
    assert kl(judged, model, held) == pytest.approx(best, rel=1e-4)
    copied = tp.apply(model, plan_without(tp.trace(model, batches[0]), {}))
    back = tp.finetune(copied, batches, model, BOTH, held_out=held)  # nothing is closer to a model than itself
    assert_same_state(back.state_dict(), copied.state_dict())


def test_mixed_images_are_mirrored_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, batches = cut("conv_bn")
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    monkeypatch.setattr("numpy.random.beta", lambda a, b: 0.25)
    tp.finetune(small, batches, model, tp.Finetune(epochs=1, mixup=1.0, mirrored=True))
    mixed = [s for s in seen if len(s) > 1]
    for number, plain in enumerate(batches):
        wanted = 0.25 * plain + 0.75 * plain.flip(0)
        torch.testing.assert_close(mixed[2 * number], wanted.flip(-1))
        torch.testing.assert_close(mixed[2 * number + 1], wanted)


def test_features_are_those_of_the_image_itself() -> None:
    model, _, batches = cut("conv_bn")
    same = tp.apply(model, plan_without(tp.trace(model, batches[0]), {}))
    losses: list[float] = []
    for weight in (0.0, 1.0):
        settings = tp.Finetune(
            epochs=1, lr=1e-9, mirrored=True, features=("conv2",) if weight else (), feature_weight=weight
        )
        tp.finetune(same, batches, model, settings, log=lambda told: losses.append(told["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] > 1e-4  # an unsymmetrical network is no copy of its mean


def test_answers_in_half_precision_are_not_rounded_once_more() -> None:
    model, _, batches = cut("conv_bn")
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answers = [model(x) for x in (batches[0], batches[0].flip(-1))]
    assert answers[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = Teacher(model, None, mirrored=True)(batches[0])
    assert torch.equal(found.double(), (answers[0].double() + answers[1].double()) / 2)


class Places(nn.Module):
    """Scores of every place of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 6), r"wants images .* inputs are \(5, 6\)"),
        (Places(), (5, 3, 8, 8), r"wants logits .* outputs are \(5, 4, 8, 8\)"),
    ],
    ids=["inputs", "outputs"],
)
def test_what_has_no_mirror_image_is_refused(model: nn.Module, shape: Any, said: str) -> None:
    model = model.eval()
    batches = [torch.randn(*shape)]
    layer = next(name for name, _ in model.named_children())
    small = tp.apply(model, plan_without(tp.trace(model, batches[0]), {layer: [0]}))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tp.InputError, match=f"mirrored=True {said}; set mirrored=False"):
        tp.finetune(small, batches, model, BOTH)
    assert_same_state(model.state_dict(), before)
