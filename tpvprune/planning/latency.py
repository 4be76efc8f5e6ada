"""Milliseconds as a cost: layers are timed once at a few widths, and every plan's latency follows from the table.

Each convolution, linear layer and attention product that a graph's groups touch is timed alone, on inputs of the size
it meets in the model, at a grid of widths, and scaled to what it takes inside the model at full width, where caches
and memory are not its own. What the whole model takes beyond them (norms, activations, sums) is spread over the layers
by how many numbers they write, and shrinks with those.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tpvprune.batches import Progress, device_of, evaluation_mode
from tpvprune.errors import ModelError, PlanError
from tpvprune.files import write_text
from tpvprune.timing import milliseconds, milliseconds_inside
from tpvprune.types import REST, WORK, Graph, Group, check_format, read_json

LATENCY_FORMAT = 1
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of a layer's widths that are timed
ROUNDS = 7


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one layer at a grid of widths; never less at a greater width.

    Attributes:
        out: sizes of the first dimension of its weight, rising.
        into: sizes of the second one; a single one where it has none or never changes.
        ms: `(len(out), len(into))`.
    """

    out: tuple[int, ...]
    into: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def at(self, out: int, into: int) -> float:
        """Milliseconds at these sizes, by straight lines between those that were timed."""
        i, s = _between(self.out, out)
        j, t = _between(self.into, into)
        low, high = self.ms[i], self.ms[min(i + 1, len(self.out) - 1)]
        k = min(j + 1, len(self.into) - 1)
        return (1 - s) * ((1 - t) * low[j] + t * low[k]) + s * ((1 - t) * high[j] + t * high[k])


def _between(grid: tuple[int, ...], value: int) -> tuple[int, float]:
    if value <= grid[0]:
        return 0, 0.0
    if value >= grid[-1]:
        return len(grid) - 1, 0.0
    place = bisect_right(grid, value) - 1
    return place, (value - grid[place]) / (grid[place + 1] - grid[place])


@dataclass(frozen=True)
class LatencyTable:
    """What the layers of a model take on one machine.

    Attributes:
        layers: by name of the weight, or of the `#attention` work tensor.
        fixed: milliseconds that no plan changes.
        model_id: of the dense model.
        measured: where and how: device, threads, torch, batch shape, dtype, eager or compiled.
    """

    layers: Mapping[str, LayerTimes]
    fixed: float
    model_id: str
    measured: Mapping[str, Any]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table as JSON."""
        about = {"format": LATENCY_FORMAT, "fixed": self.fixed, "model_id": self.model_id}
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
                name: LayerTimes(tuple(t["out"]), tuple(t["into"]), tuple(tuple(row) for row in t["ms"]))
                for name, t in data["layers"].items()
            }
            return cls(layers, float(data["fixed"]), data["model_id"], dict(data["measured"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"latency table {path} is incomplete ({error!r}); delete it, it is made anew") from error


class LatencyCost:
    """Predicted milliseconds while a network's groups shrink; see `planning.widths.Costs`.

    Args:
        graph: of the model as it is.
        table: of the dense model.
    """

    def __init__(self, graph: Graph, table: LatencyTable) -> None:
        self.table = table
        self.sizes = {name: [*graph.shapes[name], 1][:2] for name in table.layers if name in graph.shapes}
        self.slopes: dict[str, list[tuple[str, int, int]]] = {
            group.id: [
                (m.param, m.axis, m.width())
                for m in group.members
                if m.dim is not None and m.param in self.sizes and m.dim < 2
            ]
            for group in graph.groups
        }
        self.blocks = {
            g.id: {m.param for m in g.members if m.param in self.sizes} for g in graph.groups if g.kind == "block"
        }
        self.gone: set[str] = set()  # layers of skipped blocks
        self.layers = {n: {name for name, _, _ in own} | self.blocks.get(n, set()) for n, own in self.slopes.items()}
        readers: dict[str, set[str]] = defaultdict(set)
        for group_id, names in self.layers.items():
            for name in names:
                readers[name].add(group_id)
        self.neighbours = {
            group_id: set().union(*(readers[name] for name in names)) for group_id, names in self.layers.items()
        }
        self.total = table.fixed + sum(self._of(name) for name in self.sizes)

    def _of(self, name: str) -> float:
        return 0.0 if name in self.gone else self.table.layers[name].at(*self.sizes[name])

    def saving(self, group: Group, units: int) -> float:
        """See `Costs`; in milliseconds."""
        names = self.layers[group.id]
        before = sum(map(self._of, names))
        self._shrink(group, units)
        after = sum(map(self._of, names))
        self._shrink(group, -units)
        return before - after

    def remove(self, group: Group, units: int) -> None:
        """See `Costs`."""
        self.total -= self.saving(group, units)
        self._shrink(group, units)

    def _shrink(self, group: Group, units: int) -> None:
        if group.id in self.blocks:
            self.gone ^= self.blocks[group.id] if units else set()
            return
        for name, axis, width in self.slopes[group.id]:
            self.sizes[name][axis] -= units * width

    def touches(self, group: Group, other: Group) -> bool:
        """See `Costs`."""
        return other.id in self.neighbours[group.id]


@dataclass(frozen=True)
class _Met:
    """What a layer meets in the model: the shape and layout of its input, and how often it is called."""

    shape: tuple[int, ...]
    last: bool  # channels last in memory
    dtype: torch.dtype
    calls: int


def latency_table(
    model: nn.Module,
    graph: Graph,
    example: Tensor,
    *,
    compiled: bool = False,
    cache: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time a model's layers over a few widths, on the device and with the threads at hand.

    Args:
        model: the dense model, on the device to plan for.
        graph: traced from it.
        example: one batch `(batch, ...)`, of the size and dtype to plan for.
        compiled: the whole model is timed under `torch.compile`; layers are timed eagerly and scaled to it.
        cache: a folder of tables; one made under the same conditions is taken from it, a new one is put there.
        progress: called as `progress("latency", layers_done, layers)`.

    Raises:
        PlanError: the graph is of another model.
        ModelError: the model does not run on the example.
    """
    example = example.to(device_of(model))
    measured = _conditions(model, example, compiled)
    kept = None
    if cache is not None:
        key = hashlib.sha256(json.dumps([graph.model_id, LATENCY_FORMAT, measured]).encode()).hexdigest()[:24]
        kept = Path(cache) / f"{key}.json"
        if kept.is_file():
            return LatencyTable.load(kept)
    with evaluation_mode(model), torch.no_grad():
        met = _met(model, graph, example)
        runner = torch.compile(model) if compiled else model
        whole = milliseconds({"": lambda: runner(example)}, example.device, rounds=2 * ROUNDS, warmup=3)[""]
        eager = whole
        if compiled:
            eager = milliseconds({"": lambda: model(example)}, example.device, rounds=2 * ROUNDS, warmup=3)[""]
        inside = milliseconds_inside(
            {name: model.get_submodule(_layer(name)) for name in met if WORK not in name},
            lambda: model(example),
            example.device,
            rounds=ROUNDS,
        )
        inside = {name: ms * whole / eager for name, ms in inside.items()}
        raw: dict[str, LayerTimes] = {}
        known: dict[str, LayerTimes] = {}
        for done, (name, what) in enumerate(met.items(), 1):
            layer = model.get_submodule(_layer(name))
            key = repr((type(layer), layer.extra_repr(), graph.shapes[name], what))
            if key not in known:
                known[key] = _timed(layer, graph.shapes[name], what, example.device)
            raw[name] = known[key]
            if progress:
                progress("latency", done, len(met))
    table = _calibrated(raw, inside, graph, whole, measured)
    if kept is not None:
        table.save(kept)
    return table


def default_cache() -> Path:
    """Where tables are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpvprune" / "latency"


def _conditions(model: nn.Module, example: Tensor, compiled: bool) -> dict[str, Any]:
    device = example.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    first = next(model.parameters())
    last = any(p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters())
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": list(example.shape),
        "dtype": str(first.dtype),
        "channels_last": last,
        "mode": "compiled" if compiled else "eager",
    }


def _met(model: nn.Module, graph: Graph, example: Tensor) -> dict[str, _Met]:
    """The weights and work tensors that groups touch, with what their layers meet, in execution order."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(m.param for group in graph.groups for m in group.members):
        if name.endswith(REST):  # of a block: what it takes goes with what its layers write
            continue
        layer = _layer(name)
        module = model.get_submodule(layer)
        if WORK in name or (name.endswith(".weight") and isinstance(module, (nn.Linear, _ConvNd))):
            wanted[layer].append(name)
    found: dict[str, _Met] = {}
    handles = []

    def look(names: list[str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            for name in names:
                calls = found[name].calls + 1 if name in found else 1
                found[name] = _Met(tuple(x.shape), last, x.dtype, calls)

        return hook

    try:
        for layer, names in wanted.items():
            handles.append(model.get_submodule(layer).register_forward_pre_hook(look(names)))
        model(example)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} does not run on {tuple(example.shape)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layer(name: str) -> str:
    """The module that a weight or a work tensor is of."""
    return name.split(WORK)[0] if WORK in name else name.rpartition(".")[0]


def _grid(size: int) -> tuple[int, ...]:
    """Widths that are timed, rising: multiples of eight where a layer is wide."""
    step = 8 if size >= 64 else 1
    return tuple(sorted({max(1, min(size, math.ceil(share * size / step) * step)) for share in SHARES}))


def _timed(layer: nn.Module, shape: tuple[int, ...], what: _Met, device: torch.device) -> LayerTimes:
    depthwise = isinstance(layer, _ConvNd) and layer.groups > 1 and shape[1] == 1
    each = layer.groups if isinstance(layer, _ConvNd) and not (depthwise or layer.transposed) else 1
    out = tuple(each * size for size in _grid(shape[0] // each))  # as many in every group of a convolution
    into = (1,) if len(shape) < 2 else (shape[1],) if depthwise else _grid(shape[1])
    if not isinstance(layer, (nn.Linear, _ConvNd)):  # the products of attention: whole heads
        size = shape[0] // int(layer.num_heads)  # type: ignore[arg-type]  # an int attribute of the known classes
        out = tuple(sorted({max(1, round(share * shape[0] / size)) * size for share in SHARES}))
    rows = []
    for o in out:
        row = []
        for i in into:
            run = _runner(layer, shape, (o, i), what, device)
            row.append(what.calls * milliseconds({"": run}, device, rounds=ROUNDS)[""])
        rows.append(row)
    return _rising(out, into, rows)


def _rising(out: tuple[int, ...], into: tuple[int, ...], rows: list[list[float]]) -> LayerTimes:
    """A wider layer never takes less, so that no saving of a plan is negative."""
    table = torch.tensor(rows, dtype=torch.float64).cummax(0).values.cummax(1).values
    return LayerTimes(out, into, tuple(tuple(row) for row in table.tolist()))


def _runner(
    layer: nn.Module, shape: tuple[int, ...], sizes: tuple[int, int], what: _Met, device: torch.device
) -> Callable[[], object]:
    """One call of a layer at other sizes of its weight's first two dimensions."""
    made = partial(torch.randn, device=device, dtype=what.dtype, generator=torch.Generator(device).manual_seed(0))
    if isinstance(layer, nn.Linear):
        x, weight = made(*what.shape[:-1], sizes[1]), made(*sizes)
        return partial(F.linear, x, weight, None if layer.bias is None else made(sizes[0]))
    if not isinstance(layer, _ConvNd):
        heads = int(layer.num_heads)  # type: ignore[arg-type]
        size, tokens = shape[0] // heads, what.shape[1]
        q, k, v = (made(what.shape[0], sizes[0] // size, tokens, size) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v)
    groups = sizes[0] if layer.groups > 1 and shape[1] == 1 and shape[0] == layer.groups else layer.groups
    channels = sizes[0] if layer.transposed else sizes[1] * groups
    x, weight = made(what.shape[0], channels, *what.shape[2:]), made(*sizes, *shape[2:])
    if what.last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    width = sizes[1] * groups if layer.transposed else sizes[0]
    bias = None if layer.bias is None else made(width)
    dims = len(shape) - 2
    if layer.transposed:
        transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        more = layer.stride, layer.padding, layer.output_padding, groups, layer.dilation
        return lambda: transposed(x, weight, bias, *more)
    plain: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return lambda: plain(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def _calibrated(
    raw: Mapping[str, LayerTimes],
    inside: Mapping[str, float],
    graph: Graph,
    whole: float,
    measured: Mapping[str, Any],
) -> LatencyTable:
    """Layers as they are inside the model; the rest of the whole goes with the numbers that each layer writes."""
    alone = sum(raw[name].ms[-1][-1] for name in inside)
    usual = sum(inside.values()) / alone if alone else 1.0  # for what is no module, and cannot be timed inside
    dense = {name: inside.get(name, usual * times.ms[-1][-1]) for name, times in raw.items()}
    fits = min(1.0, whole / max(1e-12, sum(dense.values())))  # what is timed one by one may add up to more
    rest = whole - fits * sum(dense.values())
    written = {name: graph.reuse.get(name, 0) * shape[0] for name, shape in graph.shapes.items() if len(shape) > 1}
    each = rest / max(1, sum(written.values()))  # layers that no group touches write as well
    layers = {}
    for name, times in raw.items():
        scale, more = fits * dense[name] / times.ms[-1][-1], each * graph.reuse.get(name, 0) * (name in written)
        rows = [[scale * ms + more * out for ms in row] for out, row in zip(times.out, times.ms, strict=True)]
        layers[name] = _rising(times.out, times.into, rows)
    fixed = whole - sum(times.ms[-1][-1] for times in layers.values())
    return LatencyTable(layers, max(0.0, fixed), graph.model_id, dict(measured))
