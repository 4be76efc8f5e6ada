"""Milliseconds as a cost: layers are timed once at a few widths, and every plan's latency follows from the table.

Each layer whose work shrinks with a graph's groups is timed alone, on inputs of the size it meets in the model, at a
grid of widths, and scaled to what it takes inside the model at full width, where caches and memory are not its own.
What no module takes (sums of branches, functions) is spread over the layers by how many numbers they write, and shrinks
with those.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Progress, device_of, evaluation_mode
from tpvprune.calls import arguments_of, check_rows, running
from tpvprune.errors import PlanError
from tpvprune.files import write_text
from tpvprune.kinds import as_verb
from tpvprune.members import WORK, Group
from tpvprune.planning.graph import model_id
from tpvprune.planning.layertimes import ROUNDS, Alone, LayerTimes, times_alone
from tpvprune.planning.narrow import blocks_of, is_below, sides_of, watch
from tpvprune.timing import Clock, device_name, measured_latency, milliseconds_inside
from tpvprune.types import Graph, check_format, read_json

LATENCY_FORMAT = 2
STEADY = 1.25  # a model that takes so many times more or less than a minute ago is disturbed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatencyTable:
    """What the layers of a model take on one machine.

    Attributes:
        layers: by name; `#attention` is what an attention block does between its projections.
        fixed: milliseconds that no plan changes.
        model_id: of the dense model.
        measured: where and how: device, threads, torch, batch shape, dtype, eager or compiled.
        blocks: names of those that can be skipped; all of their layers are among `layers`.
    """

    layers: Mapping[str, LayerTimes]
    fixed: float
    model_id: str
    measured: Mapping[str, Any]
    blocks: tuple[str, ...] = ()

    def within(self, block: str) -> frozenset[str]:
        """Names of the layers that lie in a block."""
        return frozenset(n for n in self.layers if n.partition(WORK)[0] == block or is_below(n, block))

    def latency(self, graph: Graph, keep: Mapping[str, Tensor] | None = None) -> float:
        """Predicted milliseconds once only the units in `keep` are left.

        Args:
            graph: of the dense model.
            keep: bool mask `(units,)` per group id; a group that is missing stays whole.

        Raises:
            PlanError: the graph is of another model.
        """
        if graph.model_id != self.model_id:
            raise PlanError(
                f"the latency table is of model {self.model_id}, the graph of {graph.model_id}; measure again"
            )
        cost = LatencyCost(graph, self)
        for name, mask in (keep or {}).items():
            cost.remove(graph[name], int((~mask).sum()))
        return cost.total

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table as JSON."""
        about: dict[str, Any] = {"format": LATENCY_FORMAT, "fixed": self.fixed, "model_id": self.model_id}
        about |= {"blocks": list(self.blocks)} if self.blocks else {}
        layers = {name: asdict(times) for name, times in self.layers.items()}
        write_text(path, json.dumps({**about, "measured": dict(self.measured), "layers": layers}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LatencyTable:
        """Read a table written by `save`.

        Raises:
            PlanError: the file is missing, damaged or of another format.
        """
        data = read_json(path, "latency table")
        check_format(data, LATENCY_FORMAT, f"latency table {path}")
        try:
            layers = {
                name: LayerTimes(
                    tuple((tensor, int(dim)) for tensor, dim in t["sides"]),
                    tuple(map(tuple, t["widths"])),
                    tuple(t["ms"]),
                )
                for name, t in data["layers"].items()
            }
            if any(len(t.ms) != math.prod(map(len, t.widths)) for t in layers.values()):
                raise ValueError("times are missing")
            return cls(
                layers, float(data["fixed"]), data["model_id"], dict(data["measured"]), tuple(data.get("blocks", ()))
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"latency table {path} is incomplete ({error!r}); delete it and measure again") from error


class LatencyCost:
    """Predicted milliseconds while a network's groups shrink; see `planning.widths.Costs`.

    Args:
        graph: of the model as it is.
        table: of the dense model.
    """

    def __init__(self, graph: Graph, table: LatencyTable) -> None:
        self.table = table
        self.sizes = {
            (tensor, dim): graph.shapes[tensor][dim] if tensor in graph.shapes else widths[-1]
            for times in table.layers.values()
            for (tensor, dim), widths in zip(times.sides, times.widths, strict=True)
        }
        users: dict[tuple[str, int | None], list[str]] = defaultdict(list)
        for name, times in table.layers.items():
            for side in times.sides:
                users[side].append(name)
        self.slopes: dict[str, list[tuple[tuple[str, int], int]]] = {
            group.id: [((m.param, m.axis), m.width()) for m in group.members if (m.param, m.dim) in users]
            for group in graph.groups
        }
        self.layers = {
            group_id: tuple(dict.fromkeys(name for side, _ in sides for name in users[side]))
            for group_id, sides in self.slopes.items()
        }
        self.blocks = {group.id: table.within(group.id) for group in graph.groups if group.kind == "block"}
        self.layers |= {block: tuple(sorted(names)) for block, names in self.blocks.items()}
        # Of layers of skipped blocks: those that the graph's model is without already, and what is removed here.
        self.gone = {
            name
            for block in table.blocks
            if not any(is_below(tensor, block) for tensor in graph.shapes)
            for name in table.within(block)
        }
        self.ms = {name: self._of(name) for name in table.layers}

    @property
    def total(self) -> float:
        """See `Costs`; in milliseconds."""
        return math.fsum((self.table.fixed, *self.ms.values()))

    def _of(self, name: str) -> float:
        if name in self.gone:
            return 0.0
        times = self.table.layers[name]
        return times.at(*(self.sizes[side] for side in times.sides))

    def saving(self, group: Group, units: int) -> float:
        """See `Costs`."""
        names = self.layers[group.id]
        self._shrink(group, units)
        after = math.fsum(self._of(name) for name in names)
        self._shrink(group, -units)
        return math.fsum(self.ms[name] for name in names) - after

    def remove(self, group: Group, units: int) -> None:
        """See `Costs`."""
        self._shrink(group, units)
        for name in self.layers[group.id]:
            self.ms[name] = self._of(name)

    def _shrink(self, group: Group, units: int) -> None:
        if group.id in self.blocks:
            self.gone ^= self.blocks[group.id] if units else frozenset()
        for side, width in self.slopes[group.id]:
            self.sizes[side] -= units * width

    def touches(self, group: Group, other: Group) -> bool:
        """See `Costs`."""
        return not set(self.layers[group.id]).isdisjoint(self.layers[other.id])


@as_verb
def latency_table(
    model: nn.Module,
    graph: Graph,
    example: Any,
    *,
    compiled: bool = False,
    cache: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> LatencyTable:
    """Time a model's layers over a few widths, on the device and with the threads at hand.

    Args:
        model: the dense model, on the device to plan for.
        graph: traced from it.
        example: one batch of the size and dtype to plan for: a tensor `(batch, ...)`, a tuple of positional or a
            dict of keyword arguments.
        compiled: the whole model is timed under `torch.compile`. Layers are timed eagerly; what is not a matrix
            product, and so can be fused, is scaled to what the compiled model takes.
        cache: a folder of tables; one made under the same conditions is taken from it, a new one is put there.
        progress: called as `progress("latency", layers_done, layers)`.
        clock: what tells the time, in seconds.

    Raises:
        PlanError: the graph is of another model.
        ModelError: the model does not run on the example, or the example holds no row.
    """
    if graph.model_id != model_id(model):
        raise PlanError(f"the graph is of model {graph.model_id}, this one is {model_id(model)}; trace it again")
    device = device_of(model)
    args, kwargs = arguments = arguments_of(example, device)
    check_rows(arguments)
    measured = _conditions(model, args, kwargs, compiled)
    kept = None
    if cache is not None:
        about = [LATENCY_FORMAT, graph.model_id, measured, _structure(model, graph)]
        kept = Path(cache) / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.json"
        try:
            return LatencyTable.load(kept)
        except PlanError:  # none yet, or a damaged one
            pass
    run = partial(model, *args, **kwargs)
    random = [device] if device.type == "cuda" else []
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(random):
        with running(model, arguments):
            seen = watch(model, graph, run)
        first = measured_latency(model, example, rounds=ROUNDS, clock=clock)
        alone = times_alone(seen.layers, device, clock=clock, progress=progress)
        inside = milliseconds_inside(seen.modules, run, device, rounds=ROUNDS, clock=clock)
        last = measured_latency(model, example, rounds=ROUNDS, clock=clock)
        eager = (first + last) / 2
        whole = measured_latency(model, example, compiled=True, rounds=2 * ROUNDS, clock=clock) if compiled else eager
    table = _calibrated(alone, inside, graph, eager, whole, measured)
    if kept is not None:
        table.save(kept)
    if max(first, last) > STEADY * min(first, last):
        again = "measure again" if kept is None else f"delete {kept} and measure again"
        logger.warning(
            "other jobs disturb the latency table: the model took %.4g ms before and %.4g ms after its layers were "
            "timed; %s when the machine is idle",
            first,
            last,
            again,
        )
    return table


def default_cache() -> Path:
    """Where tables are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpvprune" / "latency"


def _conditions(model: nn.Module, args: Any, kwargs: Any, compiled: bool) -> dict[str, Any]:
    device = device_of(model)
    inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    parameters = [*model.parameters()]
    last = any(t.ndim == 4 and not t.is_contiguous() and t.stride(1) == 1 for t in (*parameters, *inputs))
    return {
        "device": f"{device.type}: {device_name(device)}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": list(inputs[0].shape) if inputs else [],
        "inputs": [list(t.shape) for t in inputs],
        "dtype": str(parameters[0].dtype if parameters else None),
        "channels_last": last,
        "mode": "compiled" if compiled else "eager",
    }


def _structure(model: nn.Module, graph: Graph) -> str:
    """What `model_id` does not tell: strides and kinds of layers, and what groups there are."""
    described = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    structure = f"{described}{sorted(sides_of(graph).items())}{blocks_of(graph) or ''}"
    return hashlib.sha256(structure.encode()).hexdigest()[:16]


def _calibrated(
    alone: Mapping[str, Alone],
    inside: Mapping[str, float],
    graph: Graph,
    eager: float,
    whole: float,
    measured: Mapping[str, Any],
) -> LatencyTable:
    """Layers as they are inside the model; what no module takes goes with the numbers that each layer writes."""
    modules = sum(inside.values())
    fits = min(1.0, eager / max(modules, 1e-12))  # what is timed one by one may add up to more
    own = {name: fits * inside[name.partition(WORK)[0]] for name in alone}
    products = sum(ms for name, ms in own.items() if alone[name].multiplies)
    kept, fused = _factors(products, eager, whole)
    written = {name: graph.reuse.get(name, 0) * shape[0] for name, shape in graph.shapes.items() if len(shape) > 1}
    each = fused * max(0.0, eager - modules) / max(1, sum(written.values()))  # untouched layers write as well
    layers = {}
    for name, what in alone.items():
        by = (kept if what.multiplies else fused) * own[name] / max(what.times.ms[-1], 1e-12)
        writes = what.times.sides[-1:] == ((f"{name}.weight", 0),)
        layers[name] = what.times.scaled(by, each * written.get(f"{name}.weight", 0) if writes else 0.0)
    fixed = whole - math.fsum(times.ms[-1] for times in layers.values())
    return LatencyTable(layers, max(0.0, fixed), graph.model_id, dict(measured), blocks_of(graph))


def _factors(products: float, eager: float, whole: float) -> tuple[float, float]:
    """What matrix products, and all else, take in the whole model for each millisecond that they take eagerly.

    A compiler fuses what is not a matrix product; where it wins nothing, all is scaled alike.
    """
    if whole >= eager:
        return (whole / max(eager, 1e-12),) * 2
    return (whole / products, 0.0) if whole <= products else (1.0, (whole - products) / (eager - products))
