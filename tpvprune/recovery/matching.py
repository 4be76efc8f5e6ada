"""What layers of a pruned model read, against what those of the dense model read: a least-squares problem."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call

from tpvprune.batches import Progress
from tpvprune.errors import ModelError
from tpvprune.patches import channel_axis
from tpvprune.plan import Plan
from tpvprune.reads import read_by
from tpvprune.recovery.fits import kept_inputs
from tpvprune.recovery.kronecker import Factors, Vector
from tpvprune.recovery.linear import REFITTED
from tpvprune.recovery.settings import GaussNewton

logger = logging.getLogger(__name__)
LENGTHS = tuple(2.0**-i for i in range(10))  # of steps, that are tried in turn
ESTIMATED_ON = 512  # samples that the preconditioner is estimated on


class Place(NamedTuple):
    """The input or the output of a module, at one of its calls."""

    module: str
    output: bool = False
    call: int = 0


@dataclass(frozen=True)
class Point:
    """A tensor that is compared.

    Attributes:
        place: where it is seen.
        dim: that channels lie along.
        kept: the dense model's channels that are left, `(channels,)`; None for all.
    """

    place: Place
    dim: int
    kept: Tensor | None

    def of_dense(self, value: Tensor) -> Tensor:
        """What is left of the dense model's tensor."""
        return value if self.kept is None else value.index_select(self.dim % value.ndim, self.kept.to(value.device))


class Task:
    """The least-squares problem over all parameters: its loss, its gradient, and products with its curvature.

    Args:
        small: the pruned model, in eval mode; its parameters are replaced in calls and never written.
        teacher: the dense model.
        plan: what `small` lacks.
        inputs: batches.
        settings: how many passes there are, for progress.
        progress: told of every pass.
        step: number of this one, from 0.
    """

    def __init__(
        self,
        small: nn.Module,
        teacher: nn.Module,
        plan: Plan,
        inputs: Sequence[Tensor],
        settings: GaussNewton,
        progress: Progress | None,
        step: int,
    ) -> None:
        # Not channels_last: torch 2.14's gradients of such weights, cut to odd widths, crashed a CPU at two threads.
        self.inputs = [batch.contiguous() for batch in inputs]
        self.small, self.teacher, self.settings = small, teacher, settings
        self.points = _points(small, teacher, plan, inputs[0])
        if not self.points:
            raise ModelError(
                "refine compares the inputs of linear layers and convolutions, and this model has none that depend on "
                "its parameters in the same way as the dense one's; leave it out"
            )
        masks = plan.weight_masks()
        self._masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}
        each = 3 + settings.iterations + len(LENGTHS)
        self._progress, self._done, self._most = progress, step * each, settings.steps * each
        self._weights = self._scales()
        reached = self._reached()
        self.start = {n: p.detach().contiguous() for n, p in small.named_parameters() if n in reached}

    def loss(self, theta: Vector) -> float:
        """Sum over points of the squared distance over the variance."""
        total = 0.0
        for batch in self.inputs:
            wanted, found = self._wanted(batch), self._found(theta, batch)
            total += sum(float((f - w).square().sum() * s) for f, w, s in self._rows(found, wanted))
        self._tell()
        return total

    def gradient(self, theta: Vector) -> tuple[float, Vector]:
        """The loss and half its gradient."""
        total, summed = 0.0, {name: torch.zeros_like(value) for name, value in theta.items()}
        for batch in self.inputs:
            wanted = self._wanted(batch)
            with self._graph(theta, batch) as (leaves, found):
                parts = [(f - w.to(f.dtype)) for f, w, _ in self._rows(found, wanted)]
                total += sum(float(d.detach().square().sum()) * s for d, s in zip(parts, self._weights, strict=True))
                cotangents = [d.detach() * s for d, s in zip(parts, self._weights, strict=True)]
                self._add(summed, leaves, found, cotangents)
        self._tell()
        return total, self._masked(summed)

    def curved(self, theta: Vector, vector: Vector) -> Vector:
        """`J^T S J v`, `S` the scale of each point."""
        summed = {name: torch.zeros_like(value) for name, value in theta.items()}
        for batch in self.inputs:
            leaves = _leaves(theta)
            try:
                # One pass for both products: tangents go along, and the graph of the values is what comes back on.
                with _no_advice(), torch.enable_grad(), dual_level():
                    duals = {name: make_dual(leaf, vector[name]) for name, leaf in leaves.items()}
                    both = [unpack_dual(value) for value in self._found(duals, batch)]
                    moved = [(d.primal, d.tangent.detach() * s) for d, s in zip(both, self._weights, strict=True)]
            except NotImplementedError as error:
                raise ModelError(f"refine needs forward derivatives, and the model uses one without: {error}") from None
            self._add(summed, leaves, [value for value, _ in moved], [tangent for _, tangent in moved])
        self._tell()
        return self._masked(summed)

    def factors(self, theta: Vector) -> Factors:
        """What the preconditioner is made of, estimated on some of the batches."""
        found = Factors(self.small, theta, self.settings, self._masks)
        generator = torch.Generator(self.inputs[0].device).manual_seed(0)
        some = _spread(self.inputs, max(1, ESTIMATED_ON // len(self.inputs[0])))
        for batch in some:
            with found.watched(), self._graph(theta, batch) as (leaves, points):
                signs = [
                    (torch.randint(0, 2, p.shape, generator=generator, device=p.device) * 2 - 1) * s**0.5
                    for p, s in zip(points, self._weights, strict=True)
                ]
                summed = {name: torch.zeros_like(value) for name, value in theta.items()}
                self._add(summed, leaves, points, [s.to(p.dtype) for s, p in zip(signs, points, strict=True)])
                found.add(summed)
        self._tell()
        found.finish(sum(map(len, self.inputs)) / sum(map(len, some)))
        return found

    @contextmanager
    def _graph(self, theta: Vector, batch: Tensor) -> Iterator[tuple[Vector, list[Tensor]]]:
        with torch.enable_grad():
            leaves = _leaves(theta)
            yield leaves, self._found(leaves, batch)

    @staticmethod
    def _add(summed: Vector, leaves: Vector, found: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
        gradients = torch.autograd.grad(found, list(leaves.values()), cotangents, allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                summed[name] += gradient

    def _found(self, theta: Vector, batch: Tensor) -> list[Tensor]:
        with _seen(self.small, self._places) as held:
            functional_call(self.small, theta, (batch,))
        return [held[place] for place in self._places]

    def _wanted(self, batch: Tensor) -> list[Tensor]:
        with torch.no_grad(), _seen(self.teacher, self._places) as held:
            self.teacher(batch)
        return [point.of_dense(held[point.place]) for point in self.points]

    def _rows(self, found: Iterable[Tensor], wanted: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, float]]:
        return zip(found, wanted, self._weights, strict=True)

    @property
    def _places(self) -> list[Place]:
        return [point.place for point in self.points]

    def _scales(self) -> list[float]:
        """For each point one over its variance and its count of numbers."""
        count = [0] * len(self.points)
        sums, squares = [0.0] * len(self.points), [0.0] * len(self.points)
        for batch in self.inputs:
            for i, value in enumerate(self._wanted(batch)):
                count[i] += value.numel()
                sums[i] += float(value.sum(dtype=torch.float64))
                squares[i] += float(value.double().square().sum())
        self._tell()
        spread = [q / n - (s / n) ** 2 for n, s, q in zip(count, sums, squares, strict=True)]
        return [1 / (n * v) if v > 0 else 0.0 for n, v in zip(count, spread, strict=True)]

    def _reached(self) -> set[str]:
        """Names of the parameters that move any point."""
        theta = {n: p.detach().contiguous() for n, p in self.small.named_parameters() if p.is_floating_point()}
        with self._graph(theta, self.inputs[0][:2]) as (leaves, found):
            ones = [torch.ones_like(f) for f in found]
            gradients = torch.autograd.grad(found, list(leaves.values()), ones, allow_unused=True)
        return {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}

    def _masked(self, vector: Vector) -> Vector:
        for name, mask in self._masks.items():
            if name in vector:
                vector[name] = vector[name] * mask.to(vector[name].device)
        return vector

    def _tell(self) -> None:
        self._done += 1
        if self._progress:
            self._progress("refine", self._done, self._most)


@contextmanager
def _no_advice() -> Iterator[None]:
    """Forward derivatives compile some of torch's own code the way that torch advises against."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # torch has changed its mind
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=kind)
        yield


def _leaves(theta: Vector) -> Vector:
    return {name: value.detach().clone().requires_grad_() for name, value in theta.items()}


def _spread(inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """So many of the batches, evenly spaced: neighbours may be of one class."""
    count = min(count, len(inputs))
    return [inputs[i * len(inputs) // count] for i in range(count)]


@contextmanager
def _seen(model: nn.Module, places: Iterable[Place]) -> Iterator[dict[Place, Tensor]]:
    """The tensors at all calls of the modules of places while this is on, in the order in which they are there."""
    held: dict[Place, Tensor] = {}
    calls: Counter[tuple[str, bool]] = Counter()

    def keep(module: str, output: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any = None) -> None:
            value = given if output else read_by(args, kwargs) if args or "input" in kwargs else None
            if isinstance(value, Tensor):
                held[Place(module, output, calls[module, output])] = value
            calls[module, output] += 1

        return hook

    handles = []
    for name, output in dict.fromkeys((place.module, place.output) for place in places):
        module = model.get_submodule(name)
        register = module.register_forward_hook if output else module.register_forward_pre_hook
        handles.append(register(keep(name, output), with_kwargs=True))
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _points(small: nn.Module, teacher: nn.Module, plan: Plan, batch: Tensor) -> list[Point]:
    """Inputs of layers that both networks run equally often, each tensor once, that the pruned parameters move.

    A layer that reads one vector a sample, as a classifier, is answered for by the tensor that the vector was pooled
    from: the vector itself has too few numbers for the parameters before it, and was measured to be fitted too well.
    """
    modules, others = (dict(model.named_modules()) for model in (small, teacher))
    names = [n for n, m in modules.items() if isinstance(m, REFITTED) and isinstance(others.get(n), REFITTED)]
    places = [Place(name) for name in names] + [Place(name, True) for name in modules if name and name in others]
    few, found, known = batch[:2], dict[Place, Point](), set[int]()
    vectors: list[Place] = []
    with torch.enable_grad(), _seen(small, places) as mine:
        leaves = {n: p.detach().clone().requires_grad_() for n, p in small.named_parameters() if p.is_floating_point()}
        functional_call(small, leaves, (few,))
    with torch.no_grad(), _seen(teacher, places) as dense:
        teacher(few)
    often = [Counter((place.module, place.output) for place in seen) for seen in (mine, dense)]
    both = {place: value for place, value in mine.items() if often[0][place[:2]] == often[1][place[:2]]}

    def compared(place: Place, dim: int, kept: Tensor | None) -> Point | None:
        point = Point(place, dim, kept)
        if point.of_dense(dense[place]).shape == both[place].shape:
            return point
        logger.info("refine: %s has another shape in the pruned model and is not compared", place.module)
        return None

    order = {name: number for number, name in enumerate(names)}
    for place in sorted((p for p in both if not p.output), key=lambda p: (order[p.module], p.call)):
        value, name = both[place], place.module
        if id(value) in known or not value.requires_grad:
            continue
        layer: Any = others[name]
        kept = kept_inputs(plan, layer, name) if f"{name}.weight" in plan.graph.shapes else None
        point = compared(place, channel_axis(layer), kept)
        if point is None:
            continue
        known.add(id(value))
        found[place] = point
        if value.numel() == value.shape[0] * value.shape[point.dim]:
            vectors.append(place)
    if len(vectors) < len(found):
        for place in vectors:
            vector = found.pop(place)
            pooled = _pooled(both, dense, place, known)
            if pooled is not None and (point := compared(*pooled, vector.kept)):
                found[place] = point
    return list(found.values())


def _pooled(
    held: Mapping[Place, Tensor], dense: Mapping[Place, Tensor], read: Place, known: set[int]
) -> tuple[Place, int] | None:
    """The last output of a module that all positions of go into a vector, channel by channel, and its channel axis."""
    vector = held[read]
    width, whole = (seen[read].numel() // len(seen[read]) for seen in (held, dense))
    # Not a plain sum, which a layer norm behind the pooling holds still.
    drawn = torch.randn(vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(vector)
    for place, value in reversed(list(held.items())):
        if not (place.output and value.requires_grad and value.ndim > 2 and len(value) == len(vector)):
            continue
        # Of as many tokens as there are channels left, the dense model has another number than of its channels.
        both = [d for d in (1, -1) if (value.shape[d], dense[place].shape[d]) == (width, whole)]
        dims = both if value.numel() > len(value) * width else []
        (slope,) = torch.autograd.grad(vector, value, drawn, retain_graph=True, allow_unused=True) if dims else (None,)
        if slope is not None and bool((slope != 0).movedim(dims[0], 1).flatten(2).any(1).any(0).all()):
            return None if id(value) in known else (place, dims[0])
    return None
