"""Refits of what a plan leaves while it is being made, and how far the model drifts that they give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn

from tpvprune.batches import Batch, Progress, inputs_of
from tpvprune.plan import Plan
from tpvprune.recovery.reconstruct import Reconstruct, reconstruct
from tpvprune.report import Answers, compare
from tpvprune.surgery.removal import apply, refitted


@dataclass(frozen=True)
class Refits:
    """What plans of a model leave, refitted from the dense weights each time.

    A refit of a refit moves away from them, and ends up no better.

    Attributes:
        dense: what the dense model answers.
        batches: unlabeled.
        settings: of the closed form.
        progress: called as `progress(stage, done, total)`.
    """

    dense: Answers
    batches: Iterable[Batch]
    settings: Reconstruct | None
    progress: Progress | None

    def __call__(self, plan: Plan) -> nn.Module:
        """What a plan leaves, refitted on all batches."""
        return self._refitted(apply(self.dense.model, plan), plan, self.batches)

    def drift(self, plan: Plan) -> float | None:
        """KL in nats to the dense model, of refits on each half of the samples, on the other half.

        A refit fits the samples it is made of: on them it drifts less than on others, the more so the fewer they are.
        That of half the samples is no better than that of all (two-fold cross-validation; Hastie, Tibshirani and
        Friedman 2009, section 7.10).

        Returns:
            None where there is a single sample, or the outputs are not `(batch, classes)`.
        """
        held = [inputs_of(batch) for batch in self.batches]  # once: a loader may shuffle
        halves = [[part for inputs in held if len(part := inputs[number::2])] for number in (0, 1)]
        if not all(halves):
            return None
        cut, total, samples = apply(self.dense.model, plan), 0.0, 0
        for mine, other in (halves, halves[::-1]):
            small = self._refitted(cut, plan, mine)
            metrics, count = compare(
                {"now": small},
                self.dense.model,
                other,
                output=self.dense.output,
                kept=self.dense,
                progress=self.progress,
            )
            if "kl" not in metrics["now"]:
                return None
            total, samples = total + metrics["now"]["kl"] * count, samples + count
        return total / samples

    def _refitted(self, cut: nn.Module, plan: Plan, batches: Iterable[Batch]) -> nn.Module:
        refit = partial(
            reconstruct, batches=batches, teacher=self.dense.model, settings=self.settings, progress=self.progress
        )
        return refitted(cut, self.dense.model, plan, refit)
