"""Criteria: frozen dataclasses with one method that turns batches into `Scores`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Progress, model_inputs
from tpvprune.errors import InputError, PlanError
from tpvprune.plan import Plan
from tpvprune.scores import Scores
from tpvprune.scoring.activations import Tapped
from tpvprune.scoring.heads import Head, head_named
from tpvprune.types import Graph, fingerprint

logger = logging.getLogger(__name__)


class Criterion(Protocol):
    """What a criterion offers; `testing.check_criterion` checks one of your own."""

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, progress: Progress | None = None
    ) -> Scores:
        """Score every unit of every group, leaving the model as it was."""
        ...


@dataclass(frozen=True)
class TPV:
    """Test prediction variance of removing each unit alone (Arpit 2026, arXiv 2512.11089).

    The score of unit i is `E_x[ d_i^T J^T M J d_i ]` with `d_i` minus the weights that read the unit: how far
    the outputs move, to first order, when it leaves. No label enters.

    Attributes:
        head: the metric `M`: "softmax" (nats: half the score is KL), "logits", or a `Head`.
        probes: random cotangents per sample, or "exact" for the sum over all outputs.
        over: "consume" perturbs what reads the unit, once; "all" sums the squares of what writes, scales
            and reads it, as the paper's pruning criterion does.
        seed: seed of the cotangents.
    """

    head: str | Head = "softmax"
    probes: int | Literal["exact"] = 1
    over: Literal["consume", "all"] = "consume"
    seed: int = 0

    def __post_init__(self) -> None:
        head_named(self.head)
        if self.probes != "exact" and (not isinstance(self.probes, int) or self.probes < 1):
            raise InputError(f"probes={self.probes!r} must be a whole number from 1, or 'exact'")
        if self.over not in ("consume", "all"):
            raise InputError(f"over={self.over!r} must be 'consume' or 'all'")

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, progress: Progress | None = None
    ) -> Scores:
        """Score every unit in one pass over the batches; memory does not grow with their number."""

        def squared(sensitivities: dict[str, list[Tensor]]) -> dict[str, Tensor]:
            return {name: torch.stack(parts).double().square().sum(0) for name, parts in sensitivities.items()}

        sums = {g.id: torch.zeros(g.units, dtype=torch.float64) for g in graph.groups}
        squares = {name: value.clone() for name, value in sums.items()}
        samples = 0
        for scores in self._per_batch(model, batches, graph, squared, progress):
            for name, value in scores.items():
                sums[name] += value.sum(0)
                squares[name] += value.square().sum(0)
            samples += len(next(iter(scores.values()), ()))
        values = {name: total / samples for name, total in sums.items()}
        stderr = None
        if samples > 1:
            stderr = {
                name: ((squares[name] / samples - values[name] ** 2).clamp(min=0) / (samples - 1)).sqrt()
                for name in values
            }
        return Scores(
            values=values,
            stderr=stderr,
            criterion=f"tpv(head={self._head_name()}, over={self.over})",
            samples=samples,
            probes=self.probes,
            seed=self.seed,
            model_id=graph.model_id,
        )

    def drift(
        self, model: nn.Module, batches: Iterable[Batch], plan: Plan, progress: Progress | None = None
    ) -> tuple[float, float]:
        """First-order TPV of a whole plan, covariances between its units included.

        The units of a plan leave together, so their per-sample effects add up before they are squared.
        With the softmax head half of the value predicts KL(dense || pruned) in nats while it is small.

        Returns:
            The value and its standard error.
        """
        gone = {name: ~mask for name, mask in plan.keep.items() if not bool(mask.all())}

        def moved(sensitivities: dict[str, list[Tensor]]) -> dict[str, Tensor]:
            effects = [sensitivities[n][0][:, mask.to(sensitivities[n][0].device)] for n, mask in gone.items()]
            return {"plan": torch.cat(effects, dim=1).double().sum(1).square()}

        if not gone:
            return 0.0, 0.0
        coherent = replace(self, over="consume")
        values = torch.cat([b["plan"] for b in coherent._per_batch(model, batches, plan.graph, moved, progress)])
        error = float(values.std() / values.numel() ** 0.5) if values.numel() > 1 else float("nan")
        return float(values.mean()), error

    def _per_batch(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        graph: Graph,
        fold: Callable[[dict[str, list[Tensor]]], dict[str, Tensor]],
        progress: Progress | None,
    ) -> Iterator[dict[str, Tensor]]:
        """Per batch, the mean over probes (the sum, if exact) of what `fold` makes of the sensitivities."""
        head = head_named(self.head)
        generator = torch.Generator().manual_seed(self.seed)
        tapped = Tapped(model, graph, self.over)
        if tapped.left_out:
            logger.warning("over='all' leaves out %s: used outside layers", ", ".join(sorted(tapped.left_out)))
        for inputs in model_inputs(model, batches, "score", progress):
            totals: dict[str, Tensor] = {}
            with tapped() as taps:
                output = taps.forward(inputs)
                fixed = output.detach()
                if self.probes == "exact":
                    cotangents, count = head.exact(fixed), 1
                else:
                    count = self.probes
                    cotangents = (head.cotangent(fixed, generator) for _ in range(count))
                for number, cotangent in enumerate(cotangents, 1):
                    last = self.probes == number
                    for name, value in fold(taps.backward(output, cotangent, keep_graph=not last)).items():
                        totals[name] = totals[name] + value if name in totals else value
            yield {name: (total / count).cpu() for name, total in totals.items()}

    def _head_name(self) -> str:
        return self.head if isinstance(self.head, str) else type(self.head).__name__.lower()


def score(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    criterion: Criterion | None = None,
    *,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit of a graph from unlabeled batches.

    Args:
        model: the model `graph` was traced from. It is left as it was.
        batches: any iterable of input tensors `(batch, ...)`, of tuples or dicts whose first item is the
            input, or a DataLoader. Labels are not looked at.
        graph: from `trace`.
        criterion: how to score; `TPV()` by default.
        progress: called as `progress("score", batches_done, batches_to_do)`.

    Raises:
        PlanError: the graph was traced from another model.
        DataError: there is no batch, or one holds no tensor.
        NonFiniteError: the model gives NaN or infinity.
    """
    check_model(model, graph)
    return (criterion or TPV()).measure(model, batches, graph, progress)


def check_model(model: nn.Module, graph: Graph) -> None:
    """Refuse a model that is not the one a graph was traced from.

    Raises:
        PlanError: names or shapes differ.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = fingerprint((name, tuple(tensor.shape)) for name, tensor in tensors)
    if found != graph.model_id:
        have = {name: tuple(tensor.shape) for name, tensor in tensors}
        wrong = next((n for n, s in graph.shapes.items() if "#" not in n and have.get(n) != s), None)
        detail = f": {wrong!r} is {have.get(wrong)}, the graph says {graph.shapes[wrong]}" if wrong else ""
        raise PlanError(f"the graph was traced from another {type(model).__name__}{detail}; trace this model first")
