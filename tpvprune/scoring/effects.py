"""What zeroing each unit does to the outputs, sample by sample and probe by probe, batch after batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Progress, evaluation_mode, finite_outputs, model_inputs
from tpvprune.scoring.activations import Tapped
from tpvprune.scoring.engine import Parts, global_number
from tpvprune.scoring.probing import Probing, detached, drift_slope
from tpvprune.scoring.taps import Map
from tpvprune.types import Graph

logger = logging.getLogger(__name__)
Fold = Callable[[dict[str, list[Tensor]]], dict[str, Tensor]]
"""What is made of the sensitivities of a probe, see `Tapped.backward`."""


def effects(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    probing: Probing,
    fold: Fold,
    over: Literal["consume", "all"] = "consume",
    reference: nn.Module | None = None,
    first: int = 0,
    progress: Progress | None = None,
    maps: Mapping[str, Map] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Per batch, the mean over probes (the sum, if exact) of what `fold` makes of the sensitivities.

    What it gives under "" is kept row by row, `(samples, rows, ...)`; "linear" is added where there is a reference.

    Args:
        model: the model scored.
        batches: its inputs.
        graph: traced from it.
        probing: the cotangents.
        fold: told the sensitivities of each probe.
        over: see `Tapped`.
        reference: the model that drift is measured from, where that is another one.
        first: batches that have gone before.
        progress: told of each batch.
        maps: see `Tapped`.

    Raises:
        UnseenError: what layers are given does not tell what units do.
    """
    tapped, parts = Tapped(model, graph, over, maps), Parts()
    if tapped.left_out:
        logger.warning("over='all' leaves out %s: used outside layers", ", ".join(sorted(tapped.left_out)))
    for local, inputs in enumerate(model_inputs(model, batches, "score", progress)):
        generators = probing.generators(first + local)

        def run(
            part: slice,
            inputs: Tensor = inputs,
            generators: list[torch.Generator] = generators,
            number: int = global_number(first + local),
        ) -> dict[str, Tensor]:
            return _of_part(tapped, inputs[part], number + part.start, probing, generators, fold, reference)

        found = parts(len(inputs), run, generators)
        yield {name: torch.cat([one[name] for one in found]) for name in found[0]}


def _of_part(
    tapped: Tapped,
    inputs: Tensor,
    number: int,
    probing: Probing,
    generators: list[torch.Generator],
    fold: Fold,
    reference: nn.Module | None,
) -> dict[str, Tensor]:
    wanted = None
    if reference is not None:
        with evaluation_mode(reference), torch.no_grad():
            wanted = finite_outputs(reference, inputs, probing.output)

    def seen(taps: Tapped) -> tuple[dict[str, Tensor], list[Tensor]]:
        totals: dict[str, Tensor] = {}
        rows: list[Tensor] = []
        output = taps.forward(inputs, probing.output, number)
        fixed = detached(output)
        slope = None if wanted is None else drift_slope(probing.head, fixed, wanted)
        for cotangent, last in probing.cotangents(fixed, generators):
            found = fold(taps.backward(output, cotangent, keep_graph=not last or slope is not None))
            if "" in found:
                rows.append(found.pop(""))
            for name, value in found.items():
                totals[name] = totals[name] + value if name in totals else value
        if slope is not None:
            along = taps.backward(output, slope, keep_graph=False)
            # Drift grows by (slope . change) twice over in units of TPV, and removal is minus the effect.
            totals["linear"] = -2 * torch.cat([parts[0] for parts in along.values()], 1).double()
        return totals, rows

    totals, rows = tapped.run(seen, generators)
    linear = totals.pop("linear", None)
    out = {name: total / probing.count for name, total in totals.items()}
    if rows:
        out[""] = torch.stack(rows, 1) / probing.count**0.5
    return out if linear is None else out | {"linear": linear}
