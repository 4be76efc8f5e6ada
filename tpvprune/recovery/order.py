"""In which order layers run, which batch norm reads each, and what their outputs are added to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpvprune.calls import running
from tpvprune.patches import channel_axis
from tpvprune.reads import ThroughLayers
from tpvprune.recovery.spill import Result, Watch, tensors_in

SAMPLES = 2  # enough to see the way that a pass takes
SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__")


@dataclass(frozen=True)
class Sum:
    """Where a layer's output is added to something that is known before the layer runs.

    Attributes:
        other: which result of a torch function it is added to.
        norm: the batch norm between the layer and the sum, if there is one.
        share: how often what it is added to goes into the sum for once that the layer's output does.
    """

    other: Result
    norm: str | None
    share: float


@dataclass
class Course:
    """The way of one forward pass.

    Attributes:
        calls: how often each layer runs, in the order in which they run first.
        norms: of each layer whose output a batch norm reads, and nothing else's, the norm.
        sums: of each layer whose output goes into a sum, and into nothing else, see `Sum`.
        shapes: of what each layer gives, call by call.
        cuts: of each layer whose outputs hold units that have left along other axes than its channels, the entries that
            are left along each of them, see `axes.align`.
    """

    calls: dict[str, int] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    sums: dict[str, Sum] = field(default_factory=dict)
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    cuts: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Those that run exactly once, in execution order."""
        return [name for name, count in self.calls.items() if count == 1]


@dataclass(frozen=True)
class _Source:
    """A tensor that is a layer's output, or a norm's of one; held, so that no other takes its id."""

    layer: str
    norm: str | None
    tensor: Tensor
    version: int


@torch.no_grad()
def course(
    model: nn.Module,
    inputs: Tensor,
    layers: Collection[str],
    others: Collection[str] = (),
    behind: Collection[str] = (),
) -> Course:
    """Run a model once and see which way it takes.

    Args:
        model: in eval mode.
        inputs: `(batch, ...)`; the first two samples are looked at.
        layers: to look for.
        others: names of layers to look for where something in `behind` has run before.
        behind: names of modules.

    Raises:
        ModelError: the model does not run on the inputs.
    """
    found = Course()
    calls = found.calls
    normed: dict[str, list[str | None]] = {}
    started: dict[str, int] = {}
    made: dict[int, tuple[Result, Tensor]] = {}
    sources: dict[int, _Source] = {}
    readers: Counter[tuple[str, str | None]] = Counter()
    passed = False
    handles = []

    def seen(number: int, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        if getattr(function, "__name__", "") in SUMS and isinstance(result, Tensor):
            _note(found, sources, made, started, args, kwargs.get("alpha", 1), result)
        given = list(tensors_in(result))
        if given:  # and not a size or a flag
            count(tensors_in([args, kwargs]), written=given)
        made.update({id(tensor): ((number, place), tensor) for place, tensor in enumerate(given)})

    def count(tensors: Iterable[Tensor], written: Sequence[Tensor] = ()) -> None:
        for tensor in tensors:
            source = sources.get(id(tensor))
            into = any(tensor is one for one in written)  # its version has just moved on
            if source is not None and source.version == tensor._version - int(into):
                readers[source.layer, source.norm] += 1

    watch = Watch(seen=seen)

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            started.setdefault(name, watch.calls)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal passed
            passed |= name in behind
            if isinstance(output, Tensor) and (name in layers or (passed and name not in behind)):
                calls[name] = calls.get(name, 0) + 1
                found.shapes.setdefault(name, []).append(tuple(output.shape))
                sources[id(output)] = _Source(name, None, output, output._version)

        return hook

    def norm(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            source = _source(sources, args[0]) if args else None
            if source is not None and channel_axis(model.get_submodule(source.layer)) % args[0].ndim != 1:
                source = None  # what it normalises along are not the layer's channels: tokens, say
            normed.setdefault(name, []).append(None if source is None else source.layer)
            if source is not None and isinstance(output, Tensor):
                sources[id(output)] = _Source(source.layer, name, output, output._version)

        return hook

    for name, module in model.named_modules():
        if name in layers or name in behind or (behind and name in others):
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_hook(norm(name)))
    few = inputs[:SAMPLES]
    try:
        with watch, ThroughLayers(model), running(model, ((few,), {})):
            output = model(few)
        count(tensors_in(output))
    finally:
        for handle in handles:
            handle.remove()
    alone = {layer for layer, one in found.sums.items() if all(readers[layer, key] == 1 for key in {None, one.norm})}
    # Where samples go through one by one, calls have other numbers in larger batches.
    steady = not found.sums or _calls(model, torch.cat([few, few[:1]])) == watch.calls
    found.sums = {layer: one for layer, one in found.sums.items() if steady and layer in alone}
    for name, read in normed.items():
        if read[0] in calls and read == [read[0]] * calls[read[0]]:
            found.norms[read[0]] = name
    return found


def _calls(model: nn.Module, inputs: Tensor) -> int:
    """How many torch functions a pass calls."""
    with Watch() as watch, ThroughLayers(model):
        model(inputs)
    return watch.calls


def _source(sources: dict[int, _Source], tensor: Any) -> _Source | None:
    source = sources.get(id(tensor))
    return source if source is not None and source.version == tensor._version else None  # nothing wrote into it


def _note(
    found: Course,
    sources: dict[int, _Source],
    made: dict[int, tuple[Result, Tensor]],
    started: dict[str, int],
    terms: Sequence[Any],
    alpha: Any,
    total: Tensor,
) -> None:
    """Note a sum of two tensors of one shape, if one is a layer's output and the other was there before that layer.

    Args:
        found: what is noted goes there.
        sources: outputs of layers, by their ids.
        made: which result of a call each tensor is, by its id.
        started: the number of calls when each layer began.
        terms: what is added.
        alpha: how often the second term is added.
        total: the sum.
    """
    if len(terms) != 2 or not all(isinstance(t, Tensor) for t in terms) or terms[0].shape != terms[1].shape:
        return
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha):
        return
    for (term, other), share in ((terms, alpha), (terms[::-1], 1 / alpha)):
        written = total is term  # in place: its version has just moved on
        source = sources.get(id(term))
        if source is None or source.version != term._version - int(written) or id(other) not in made:
            continue
        there = made[id(other)][0]
        if there[0] < started[source.layer]:
            found.sums[source.layer] = Sum(there, source.norm, share)
