"""Criteria from the gradient of a loss: with labels, or with the dense model's own answers as labels.

Taylor and JBR square the gradient of a batch's mean loss; Fisher and Jacobian look at the gradient of each sample.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.batches import (
    Batch,
    Progress,
    Selector,
    evaluation_mode,
    finite_output,
    inputs_of,
    is_classifier,
    model_batches,
)
from tpvprune.errors import DataError, InputError, ModelError
from tpvprune.scores import Scores
from tpvprune.scoring.activations import Tapped, backward
from tpvprune.scoring.collect import collect
from tpvprune.scoring.engine import Parts, global_number, labels, stream, wide
from tpvprune.scoring.gradients import Side, only, sides
from tpvprune.scoring.perturb import Isotropic, Removal
from tpvprune.scoring.streaming import Observation
from tpvprune.scoring.weights import row_of
from tpvprune.tally import Tally
from tpvprune.types import Graph

logger = logging.getLogger(__name__)


def _logits(output: Tensor, name: str) -> Tensor:
    if not is_classifier(output):
        raise ModelError(f"criterion {name} needs logits (batch, classes), not {tuple(output.shape)}")
    return output


def _labels(batch: Batch, output: Tensor, part: slice, name: str) -> Tensor:
    """Labels of a part of a batch, on the output's device."""
    found = labels(batch, name)
    if len(found) != len(inputs_of(batch)) or bool((found >= output.shape[1]).any()):
        raise DataError(f"criterion {name}: the labels do not fit outputs of shape {tuple(output.shape)}")
    return found[part].to(output.device).long()


class _FromLoss:
    """What the criteria of this file share."""

    probes: int = 1
    seed: int = 0
    labelled = False

    @property
    def label(self) -> str:
        """The criterion in words."""
        return type(self).__name__.lower()

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, progress: Progress | None = None
    ) -> Scores:
        """Score every unit in one pass over the batches."""
        return collect(self, model, batches, graph, progress=progress)  # type: ignore[arg-type]

    def summarise(self, means: Mapping[str, Tensor], model: nn.Module, graph: Graph) -> Mapping[str, Tensor]:
        """The means themselves."""
        return means


class _BatchLoss(_FromLoss):
    """Squares of the gradient of a batch's mean loss, summed over members; biases are left out."""

    def _targets(self, model: nn.Module, batch: Batch, inputs: Tensor, output: Tensor, part: slice) -> Tensor:
        """Class of every sample `(batch,)`, -100 for those left out."""
        raise NotImplementedError

    def observe(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, first: int, progress: Progress | None
    ) -> Iterator[Observation]:
        """One observation a batch."""
        members = sides(model, graph, Removal(), "all")
        members = {name: own for name, own in members.items() if name.rpartition(".")[2] != "bias"}
        names, parts = list(members), Parts()
        for inputs, batch in model_batches(model, batches, "score", progress):

            def run(part: slice, inputs: Tensor = inputs, batch: Batch = batch) -> tuple[dict[str, Tensor], int]:
                with only(model, names) as wanted, torch.enable_grad():
                    made = finite_output(model, inputs[part], self.output)  # type: ignore[attr-defined]
                    output = wide(_logits(made, self.label))
                    targets = self._targets(model, batch, inputs[part], output.detach(), part)
                    used = int((targets >= 0).sum())
                    loss = F.cross_entropy(output, targets, reduction="sum") if used else 0 * output.sum()
                    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
                return {name: gradient.detach()[None] for name, gradient in zip(names, found, strict=True)}, used

            done = parts(len(inputs), run)
            used = sum(count for _, count in done)
            if not used:  # nothing was seen, which is not the same as a gradient of zero
                yield Observation(Tally(batches=1))
                continue
            rows = row_of([one for one, _ in done], members, coherent=False, shared=used)
            yield Observation(Tally.of_rows(rows, stands_for=len(inputs)))


@dataclass(frozen=True)
class Taylor(_BatchLoss):
    """Square of weight times gradient of the labelled loss (Molchanov 2019, arXiv 1906.10771). Needs labels.

    The gradient of the batch's mean loss, times the weight, is summed over a unit's slice of a member and squared;
    members are added up, without biases, and batches averaged by their samples.

    Attributes:
        output: which part of what the model returns is the logits.
    """

    output: Selector = None
    labelled = True

    def _targets(self, model: nn.Module, batch: Batch, inputs: Tensor, output: Tensor, part: slice) -> Tensor:
        return _labels(batch, output, part, self.label)


@dataclass(frozen=True)
class JBR(_BatchLoss):
    """The pruning criterion of the TPV paper (Arpit 2026, arXiv 2512.11089): no labels needed.

    The dense model's answers, frozen, are the labels; samples it gives no more than `confidence` are left out. The
    gradient of the batch's mean loss, times the weight, is summed over a unit's slice of a member and squared;
    members are added up, without biases, and batches averaged by their samples. Nothing is normalised. A batch of
    which no sample is left counts nothing.

    Attributes:
        reference: the dense model, where a pruned one is scored.
        confidence: probability that the top class must exceed.
        output: which part of what the model returns is the logits.
    """

    reference: nn.Module | None = None
    confidence: float = 0.9
    output: Selector = None

    def __post_init__(self) -> None:
        if not 0 <= self.confidence < 1:
            raise InputError(f"confidence={self.confidence} must lie in [0, 1)")

    def _targets(self, model: nn.Module, batch: Batch, inputs: Tensor, output: Tensor, part: slice) -> Tensor:
        if self.reference is not None:
            with evaluation_mode(self.reference), torch.no_grad():
                output = _logits(finite_output(self.reference, inputs, self.output), self.label)
        most, top = wide(output).softmax(1).max(1)
        return torch.where(most > self.confidence, top, -100)


@dataclass(frozen=True)
class Fisher(_FromLoss):
    """Squared weight times the labelled loss's squared gradient per sample: OBD with the Fisher diagonal.

    LeCun 1990 with the empirical Fisher information for the Hessian, as Theis 2018 (arXiv 1801.05787). The squares of
    single samples are estimated by one gradient with a random sign on each sample's loss. Summed over all members;
    biases are left out. Needs labels.

    Attributes:
        seed: of the signs.
        output: which part of what the model returns is the logits.
    """

    seed: int = 0
    output: Selector = None
    labelled = True

    def observe(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, first: int, progress: Progress | None
    ) -> Iterator[Observation]:
        """One observation a batch."""
        shaped = sides(model, graph, Isotropic(1.0), "all")
        parameters = dict(model.named_parameters())
        members = {
            name: [
                Side(s.group, s.units, s.member, s.ndim, None, wide(parameters[name].detach()).square()) for s in own
            ]
            for name, own in shaped.items()
            if name.rpartition(".")[2] != "bias"
        }
        names, parts = list(members), Parts()
        for local, (inputs, batch) in enumerate(model_batches(model, batches, "score", progress)):
            generator = stream(self.seed, global_number(first + local), 0)

            def run(
                part: slice, inputs: Tensor = inputs, batch: Batch = batch, generator: torch.Generator = generator
            ) -> dict[str, Tensor]:
                with only(model, names) as wanted, torch.enable_grad():
                    output = _logits(finite_output(model, inputs[part], self.output), self.label)
                    slope = _loss_slope(output.detach(), _labels(batch, output, part, self.label))
                    signs = torch.randint(0, 2, (len(slope), 1), generator=generator).to(slope) * 2 - 1
                    found = backward(output, slope * signs, wanted, keep_graph=False)
                return {
                    n: torch.zeros_like(p)[None] if g is None else g[None]
                    for n, p, g in zip(names, wanted, found, strict=True)
                }

            done = parts(len(inputs), run, [generator])
            rows = {name: v / len(inputs) for name, v in row_of(done, members, coherent=False).items()}
            yield Observation(Tally.of_rows(rows, stands_for=len(inputs)))


@dataclass(frozen=True)
class Jacobian(_FromLoss):
    """Square of weight times the labelled loss's gradient, coherent over members, per sample. Needs labels.

    The Jacobian criterion of Optimal Brain Connection (Chen 2025, arXiv 2508.05521): what all weights of a unit, in
    every layer that holds them, do together to the loss of one sample, squared and averaged over samples; biases too.

    Attributes:
        output: which part of what the model returns is the logits.
        over: "all" members, or those that "consume" the unit.
    """

    output: Selector = None
    over: Literal["consume", "all"] = "all"
    labelled = True

    def __post_init__(self) -> None:
        if self.over not in ("consume", "all"):
            raise InputError(f"over={self.over!r} must be 'consume' or 'all'")

    def observe(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, first: int, progress: Progress | None
    ) -> Iterator[Observation]:
        """One observation a batch."""
        loose = next((group.id for group in graph.groups if group.kind == "weight"), None)
        if loose is not None:
            raise InputError(
                f"criterion jacobian scores channels and heads, not single weights ({loose!r}); use fisher"
            )
        tapped, parts = Tapped(model, graph, self.over), Parts()
        if tapped.left_out:
            logger.warning("jacobian leaves out %s: used outside layers", ", ".join(sorted(tapped.left_out)))
        sizes = {group.id: group.units for group in graph.groups}
        for inputs, batch in model_batches(model, batches, "score", progress):

            def run(part: slice, inputs: Tensor = inputs, batch: Batch = batch) -> Tensor:
                def slopes(taps: Tapped) -> dict[str, list[Tensor]]:
                    output = taps.forward(inputs[part], self.output)
                    if isinstance(output, dict):
                        raise ModelError(f"criterion {self.label} needs one output; name it with output='key'")
                    slope = _loss_slope(_logits(output.detach(), self.label), _labels(batch, output, part, self.label))
                    return taps.backward(output, slope, keep_graph=False)

                found = tapped.run(slopes)
                return torch.cat([torch.stack(own).double().sum(0) for own in found.values()], 1).square()

            yield Observation(Tally.of_units(torch.cat(parts(len(inputs), run)), sizes))


def _loss_slope(output: Tensor, targets: Tensor) -> Tensor:
    """Gradient of each sample's cross-entropy in its logits."""
    wide = output if output.dtype == torch.float64 else output.float()
    return (wide.softmax(1) - F.one_hot(targets, output.shape[1])).to(output.dtype)
