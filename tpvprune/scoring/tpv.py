"""Test prediction variance as a criterion (Arpit 2026, arXiv 2512.11089)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Progress, Selector, device_of, inputs_of, repeatable
from tpvprune.budget import n_of_m
from tpvprune.errors import InputError, PlanError, UnseenError
from tpvprune.plan import Plan
from tpvprune.processes import of_all
from tpvprune.scores import Scores
from tpvprune.scoring.activations import Tapped
from tpvprune.scoring.blocks import left_over
from tpvprune.scoring.collect import collect
from tpvprune.scoring.compensation import Residual, left_later, residuals
from tpvprune.scoring.effects import effects
from tpvprune.scoring.engine import Watched
from tpvprune.scoring.heads import Head, head_named
from tpvprune.scoring.perturb import Perturbation, Removal, perturbation_named
from tpvprune.scoring.probing import Probing
from tpvprune.scoring.rowwise import Part, parts_of_inputs, rows_in_turn
from tpvprune.scoring.streaming import Later, Observation
from tpvprune.scoring.weights import factored_scores, gradient_observations
from tpvprune.tally import Tally
from tpvprune.types import Graph

logger = logging.getLogger(__name__)
Engine = Literal["auto", "activations", "batched", "per_sample", "factored"]
SENSITIVITIES = 1280  # samples whose effects are kept
RIDGES = (1e-2, 1e-1, 1.0)  # of the covariances behind compensated scores, as shares of their mean variance
ENGINES = ("auto", "activations", "batched", "per_sample", "factored")


@dataclass(frozen=True)
class TPV:
    """Test prediction variance of perturbing each unit alone (Arpit 2026, arXiv 2512.11089).

    The score of unit i is `E_x[ d_i^T J^T M J d_i ]` with `d_i` its perturbation; for removal, minus the weights
    that read the unit: how far the outputs move, to first order, when it leaves. No label enters.

    Attributes:
        head: the metric `M`: "softmax" (nats: half the score is KL), "logits" or "features", "probabilities",
            "margin", "cosine", or a `Head`.
        probes: random cotangents per sample, or "exact" for the sum over all outputs; by the engine "batched" with a
            random sign a sample, which makes them exact on average over batches only.
        over: "consume" perturbs what reads the unit, once; "all" sums the squares of what writes, scales
            and reads it, as the paper's pruning criterion does.
        seed: seed of the cotangents.
        output: which part of what the model returns counts: a key, attribute or index, or a function.
        perturbation: "removal", "rounding", "isotropic", or a `Perturbation`.
        engine: "activations" (removal of channels and heads; exact per sample, no weight gradient), or over
            weight gradients "batched", "per_sample" or "factored" (an approximation); "auto" takes the first where
            it can, "factored" for compensated single weights and "batched" elsewhere, also for a model whose layers do
            not show what units do (a warning says so).
        sensitivities: keep the per-sample effects of at most this many samples, which a plan is judged by as a
            whole; 0 keeps none. None: 1280 where they can be kept (removal of channels and heads), else none.
        reference: the model that drift is measured from, where that is not the one scored: the dense original,
            when a pruned model is scored again. Adds the linear term of drift to the sensitivities.
        compensated: score of each channel only what the layers that read it cannot predict from their other inputs,
            of each single weight only what the others of its row cannot make up for: for a plan that is refitted
            afterwards. Those others are the ones that are left when its turn comes, the cheapest leaving first;
            "alone" takes all of them. "2:4" or any N:M is for single weights, of which those leave first that such a
            pattern takes. Takes a forward pass more; the batches must be readable twice. Residual blocks
            are scored as they are: what replaces one is not predicted.
    """

    head: str | Head = "softmax"
    probes: int | Literal["exact"] = 1
    over: Literal["consume", "all"] = "consume"
    seed: int = 0
    output: Selector = None
    perturbation: str | Perturbation = "removal"
    engine: Engine = "auto"
    sensitivities: int | None = None
    reference: nn.Module | None = None
    compensated: bool | str = False

    def __post_init__(self) -> None:
        head_named(self.head)
        perturbation_named(self.perturbation)
        if self.probes != "exact" and (not isinstance(self.probes, int) or self.probes < 1):
            raise InputError(f"probes={self.probes!r} must be a whole number from 1, or 'exact'")
        if self.over not in ("consume", "all"):
            raise InputError(f"over={self.over!r} must be 'consume' or 'all'")
        if self.engine not in ENGINES:
            raise InputError(f"engine={self.engine!r} must be one of {', '.join(ENGINES)}")
        if self.sensitivities is not None and (not isinstance(self.sensitivities, int) or self.sensitivities < 0):
            raise InputError(f"sensitivities={self.sensitivities!r} must be a number of samples, 0 or more")
        if self.sensitivities and (self.over != "consume" or self.engine not in ("auto", "activations")):
            raise InputError("sensitivities are kept for over='consume' and engine='activations' alone")
        if self.compensated and self.over != "consume":
            raise InputError("compensated=True is for over='consume' alone")
        if not isinstance(self.compensated, (bool, str)):
            raise InputError(f"compensated={self.compensated!r} must be True, False, 'alone' or a pattern as '2:4'")
        if isinstance(self.compensated, str) and self.compensated != "alone":
            n_of_m(self.compensated, "compensated")

    @property
    def label(self) -> str:
        """The criterion in words."""
        parts = [f"head={_name(self.head)}", f"over={self.over}"]
        if self.perturbation != "removal":
            parts.append(f"perturbation={_name(self.perturbation)}")
        if self.engine not in ("auto", "activations"):
            parts.append(f"engine={self.engine}")
        if self.compensated:
            parts.append("compensated" if self.compensated is True else f"compensated {self.compensated}")
        return f"tpv({', '.join(parts)})"

    @property
    def cap(self) -> int:
        """Samples whose effects are kept, where they can be kept."""
        removal = isinstance(perturbation_named(self.perturbation), Removal)
        if self.over != "consume" or self.engine not in ("auto", "activations") or not removal:
            return 0
        if self.compensated and self.sensitivities is None:
            return 0  # before a refit, channels that are cheap alone leave better than those that are cheap together
        return SENSITIVITIES if self.sensitivities is None else self.sensitivities

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, progress: Progress | None = None
    ) -> Scores:
        """Score every unit in one pass over the batches.

        Raises:
            InputError: the engine does not fit the perturbation or the units.
        """
        return collect(self, model, batches, graph, progress=progress)

    def summarise(self, means: Mapping[str, Tensor], model: nn.Module, graph: Graph) -> Mapping[str, Tensor]:
        """The means themselves; the product of the factors for the factored engine."""
        if self._engine(graph) != "factored":
            return means
        return factored_scores(means, model, graph, perturbation_named(self.perturbation))

    def _engine(self, graph: Graph) -> str:
        """The engine that fits the units."""
        if self.engine != "auto":
            return self.engine
        if isinstance(perturbation_named(self.perturbation), Removal) and not _of_weights(graph):
            return "activations"
        single = all(group.members[0].index is None for group in graph.groups)
        return "factored" if self.compensated and single else "batched"  # compensated, only sums over rows count

    def _check(self, graph: Graph) -> None:
        """Refuse what does not go together."""
        removal = isinstance(perturbation_named(self.perturbation), Removal)
        if self._engine(graph) == "activations":
            if not removal or _of_weights(graph):
                raise InputError(
                    "engine='activations' scores the removal of channels and heads; use engine='batched' for single "
                    "weights and for other perturbations"
                )
            if self.compensated not in (False, True, "alone"):
                raise InputError(
                    f"compensated={self.compensated!r} is for single weights; give a graph from weight_graph"
                )
            return
        if self.sensitivities:
            raise InputError("sensitivities are for the removal of channels and heads; leave them out")
        if self.compensated and not (removal and all(group.kind == "weight" for group in graph.groups)):
            raise InputError(
                "compensated scores are of the removal of single weights, or by engine='activations' of channels and "
                "heads; leave compensated out"
            )

    def observe(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, first: int, progress: Progress | None
    ) -> Iterator[Observation]:
        """One observation a batch, by the engine that fits."""
        self._check(graph)
        engine = self._engine(graph)
        if engine == "activations":
            yield from self._from_activations(model, batches, graph, first, progress)
            return
        _, later = self._ahead(model, batches, graph, first)
        for seen in gradient_observations(
            model,
            batches,
            graph,
            self._probing,
            perturbation_named(self.perturbation),
            engine,
            self.over,
            first,
            progress,
        ):
            yield replace(seen, later=later)

    def instead(self) -> TPV | None:
        """What scores a model whose layers do not show what units do; None where the engine was chosen."""
        if self.engine != "auto" or self.sensitivities:
            return None
        return replace(self, engine="batched", compensated=False)

    def sees(self, model: nn.Module, batches: Watched, graph: Graph) -> bool:
        """Whether layers show what units do, as far as two samples of the batch to come tell."""
        batch = batches.peek()
        if batch is None or self._engine(graph) != "activations":
            return True
        try:
            with Tapped(model, graph, self.over)() as taps:
                taps.forward(inputs_of(batch)[:2].to(device_of(model)), self.output)
        except UnseenError:
            return False
        return True

    def _from_activations(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, first: int, progress: Progress | None
    ) -> Iterator[Observation]:
        left = self.cap
        maps, later = self._ahead(model, batches, graph, first)
        sizes = {group.id: group.units for group in graph.groups}

        def fold(sensitivities: dict[str, list[Tensor]]) -> dict[str, Tensor]:
            first = torch.cat([parts[0] for parts in sensitivities.values()], 1)
            if self.over == "consume":
                squares = first.double().square()
            else:
                members = (torch.stack(parts).double().square().sum(0) for parts in sensitivities.values())
                squares = torch.cat(list(members), 1)
            return {"squares": squares} | ({"": first.float()} if left > 0 else {})

        for values in effects(
            model, batches, graph, self._probing, fold, self.over, self.reference, first, progress, maps
        ):
            rows, linear = values.pop("", None), values.pop("linear", None)
            samples = 0
            if rows is not None:
                samples = min(left, len(rows))
                rows = rows[:samples].flatten(0, 1).cpu()
                left -= samples
            total = None if linear is None else linear.sum(0).cpu()
            yield Observation(Tally.of_units(values["squares"], sizes), rows, total, samples, later)

    def drift(
        self, model: nn.Module, batches: Iterable[Batch], plan: Plan, progress: Progress | None = None
    ) -> tuple[float, float]:
        """First-order TPV of a whole plan, covariances between its units included.

        The units of a plan leave together, so their per-sample effects add up before they are squared.
        With the softmax head half of the value predicts KL(dense || pruned) in nats while it is small.

        Returns:
            The value and its standard error.

        Raises:
            PlanError: the plan masks single weights too.
        """
        if plan.zeros:
            raise PlanError("the drift of masked weights is not predicted; apply the plan and measure it instead")
        graph = left_over(plan.graph, plan.keep)
        gone = {name: ~mask for name, mask in plan.keep.items() if name in graph and not bool(mask.all())}

        def moved(sensitivities: dict[str, list[Tensor]]) -> dict[str, Tensor]:
            effects = [sensitivities[n][0][:, mask.to(sensitivities[n][0].device)] for n, mask in gone.items()]
            return {"plan": torch.cat(effects, dim=1).double().sum(1).square()}

        if not gone:
            return 0.0, 0.0
        found = effects(model, batches, graph, self._probing, moved, progress=progress)
        values = torch.cat([batch["plan"].cpu() for batch in found])
        error = float(values.std() / values.numel() ** 0.5) if values.numel() > 1 else float("nan")
        return float(values.mean()), error

    def join(self, model: nn.Module, batches: Iterable[Batch], graph: Graph) -> Later | None:
        """Take part, with nothing left to score, in what several processes make together before they score."""
        self._check(graph)
        return self._ahead(model, batches, graph, 0)[1]

    def _ahead(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, first: int
    ) -> tuple[dict[str, Residual] | None, Later | None]:
        """From a pass before the scoring: what layers cannot predict of their inputs, and what to make of scores."""
        if not self.compensated:
            return None, None
        source = batches.batches if isinstance(batches, Watched) else batches
        if first and not (isinstance(batches, Watched) and batches.skip):
            raise InputError("batches cannot be added to compensated scores: what compensates what would change")
        repeatable(source, "compensated scores read them twice")
        looked = Watched(source)
        maps: dict[str, Residual] | None = None
        later: Later | None = None
        unseen: UnseenError | None = None
        if _of_weights(graph):
            parts = parts_of_inputs(model, looked, graph, self.compensated)
            later = _RowsInTurn(model, graph, parts, self.compensated)
        else:
            try:
                maps = residuals(model, looked, graph, RIDGES)
                later = partial(left_later, model, graph, maps) if self.compensated is True else None
            except UnseenError as error:
                unseen = error
        if isinstance(batches, Watched):
            batches.looked_ahead(looked)  # which processes do together
        if any(of_all(unseen is not None)):
            raise unseen or UnseenError("another process was told that samples cannot be told apart; see there")
        return maps, later

    @property
    def _probing(self) -> Probing:
        return Probing(head_named(self.head), self.probes, self.seed, self.output)


@dataclass(frozen=True)
class _RowsInTurn:
    """`rows_in_turn` as a `Later`: halves would take its time, and room for inputs' covariances, three times."""

    model: nn.Module
    graph: Graph
    parts: Mapping[str, list[Part]]
    others: bool | str

    def __call__(self, alone: Mapping[str, Tensor], half: int | None = None) -> Mapping[str, Tensor] | None:
        return None if half is not None else rows_in_turn(self.model, self.graph, self.parts, self.others, alone)


def _of_weights(graph: Graph) -> bool:
    return any(group.kind == "weight" for group in graph.groups)


def _name(setting: Any) -> str:
    return setting if isinstance(setting, str) else type(setting).__name__.lower()
