"""Settings of the Gauss-Newton refit and of the distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tpvprune.errors import InputError

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class GaussNewton:
    """Settings of the Gauss-Newton refit.

    Attributes:
        steps: linearisations.
        iterations: of conjugate gradients in each.
        damping: pull toward the weights at hand, as a share of the mean curvature of each tensor.
        positions: of a sample's positions (pixels, tokens) of a layer, at most so many enter the preconditioner.
    """

    steps: int = 3
    iterations: int = 6
    damping: float = 1e-4
    positions: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "iterations", "positions"):
            value = getattr(self, name)
            if not _whole(value):
                raise InputError(f"{name}={value!r} must be a whole number from 1")
        if not (_number(self.damping) and self.damping > 0):
            raise InputError(f"damping={self.damping} must be a number above zero")


@dataclass(frozen=True)
class Finetune:
    """Settings of the distillation.

    Attributes:
        epochs: passes over the batches.
        lr: peak learning rate.
        optimizer: a timm optimiser name.
        weight_decay: decoupled where the optimiser decouples it.
        temperature: softening of both outputs.
        label_weight: share of cross-entropy on labels in the loss; 0 looks at no label.
        features: names of modules whose outputs are compared too, the channels that are left of them.
        feature_weight: of the features' distance, as a share of the dense model's mean square, beside the loss.
        schedule: of the learning rate: timm's "cosine", "tanh", "step", "multistep" or "poly", or "constant".
        warmup: share of the steps with a rising learning rate.
        clip: largest gradient norm.
        ema: decay of a moving average of the weights, which is then what comes out; None keeps none.
        mixup: strength of mixing pairs of images, 0 for none; the teacher answers for the mixture.
        cutmix: strength of pasting images into each other, likewise.
        mirrored: the teacher's logits are the mean of those for an image and for its mirror image (Radosavovic 2018,
            arXiv 1712.04440), for tasks where left and right do not matter. Held-out batches and `patience` go by
            the answers to the image alone.
        norms: "freeze" keeps batch-norm statistics, which a closed form has fitted the weights to; "train" takes those
            of each batch and updates them, which is for models that were not refitted. A single sample keeps them.
        precision: Accelerate's mixed precision, for both models.
        accumulate: batches per optimiser step.
        patience: epochs that come no closer to the dense model on held-out images than one before, after which it ends.
    """

    epochs: int = 5
    lr: float = 2e-4
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    temperature: float = 2.0
    label_weight: float = 0.0
    features: tuple[str, ...] = ()
    feature_weight: float = 0.0
    schedule: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = "cosine"
    warmup: float = 0.1
    clip: float = 1.0
    ema: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mirrored: bool = False
    norms: Literal["train", "freeze"] = "freeze"
    precision: Literal["no", "fp16", "bf16"] = "no"
    accumulate: int = 1
    patience: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "lr": _number(self.lr) and self.lr > 0,
            "optimizer": isinstance(self.optimizer, str),
            "weight_decay": _number(self.weight_decay) and self.weight_decay >= 0,
            "temperature": _number(self.temperature) and self.temperature > 0,
            "label_weight": _number(self.label_weight) and 0 <= self.label_weight <= 1,
            "feature_weight": _number(self.feature_weight) and self.feature_weight >= 0,
            "features": bool(self.features) or self.feature_weight == 0,
            "schedule": self.schedule in SCHEDULES,
            "warmup": _number(self.warmup) and 0 <= self.warmup < 1,
            "clip": isinstance(self.clip, (int, float)) and self.clip > 0,  # infinity clips nothing
            "ema": self.ema is None or (_number(self.ema) and 0 < self.ema < 1),
            "mixup": _number(self.mixup) and self.mixup >= 0,
            "cutmix": _number(self.cutmix) and self.cutmix >= 0,
            "norms": self.norms in ("train", "freeze"),
            "precision": self.precision in ("no", "fp16", "bf16"),
        }
        if isinstance(self.features, str):  # type: ignore[unreachable]  # the type says so, a caller may not
            raise InputError(f"finetune: features={self.features!r} is one string; give a tuple of names")
        object.__setattr__(self, "features", tuple(self.features))
        for name in ("epochs", "accumulate", "patience"):
            value = getattr(self, name)
            if not (_whole(value) or (name == "patience" and value is None)):
                raise InputError(f"finetune: {name}={value!r} must be a whole number from 1")
        for name, good in checks.items():
            if not good:
                raise InputError(f"finetune: {name}={getattr(self, name)!r} is out of range")
