"""The layers whose work shrinks with a network's groups, and calls of them at widths other than their own.

One forward pass shows which layers hold entries of a group, which layers without tensors of their own (pools,
activations) read what these write, and what inputs they all meet. Each can then be called alone at any width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.weak import WeakTensorKeyDictionary

from tpvprune import layers
from tpvprune.copies import copied
from tpvprune.members import WORK, Member
from tpvprune.planning.attention import between_projections, timed_attention
from tpvprune.types import Graph

SHARES = (0.1, 0.25, 0.5, 0.75)  # of a layer's widths that are timed, besides the whole


@dataclass(frozen=True)
class Side:
    """A width that a layer's time depends on.

    Attributes:
        tensor: whose size it is, by its name in the graph.
        dim: the dimension of that tensor.
        size: in the dense model.
        step: it changes by multiples of this.
        cuts: `(name, dimension)` of the layer's own tensors that have this width.
        reads: whether the layer's input has it.
        writes: whether the layer's output has it.
    """

    tensor: str
    dim: int
    size: int
    step: int
    cuts: tuple[tuple[str, int], ...]
    reads: bool
    writes: bool

    def grid(self) -> tuple[int, ...]:
        """Widths to time, rising: shares of the whole that a plan can leave; multiples of eight in a wide layer."""
        fixed = self.size % self.step
        step = math.lcm(self.step, 8) if self.size >= 64 and not fixed else self.step
        widths = {fixed + step * round((share * self.size - fixed) / step) for share in SHARES}
        return tuple(sorted({min(self.size, width or step) for width in widths if width >= 0} | {self.size}))


@dataclass(frozen=True)
class Met:
    """An input that a layer meets: its shape, type, and whether it lies channels last in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    last: bool

    @classmethod
    def of(cls, x: Tensor) -> Met:
        """What is met where `x` is."""
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return cls(tuple(x.shape), x.dtype, x.device, last)

    def another(self, shape: list[int], still: bool = False) -> Tensor:
        """An input of another shape: noise, or zeros that a layer which works in place leaves as they are."""
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        if still or not self.dtype.is_floating_point:
            x.zero_()
        else:
            x.normal_(generator=torch.Generator(self.device).manual_seed(0))
        return x.contiguous(memory_format=torch.channels_last) if self.last else x


@dataclass(frozen=True)
class Layer:
    """A layer, as the dense model calls it.

    Attributes:
        name: of the module; with `#attention`, what an attention block does between its projections.
        module: the layer itself.
        sides: one or two widths that its time depends on; none where it can only leave with a block.
        met: its input.
        axis: along which dimension of the input its channels lie.
        calls: how often one forward pass calls it so.
    """

    name: str
    module: nn.Module
    sides: tuple[Side, ...]
    met: Met
    axis: int
    calls: int = 1

    @property
    def multiplies(self) -> bool:
        """Whether it is made of matrix products, which compilers leave alone."""
        return WORK in self.name or isinstance(self.module, (nn.Linear, _ConvNd))

    def alike(self) -> str:
        """Equal for layers that take the same time at the same widths."""
        tensors = [(key, tuple(t.shape), t.stride()) for key, t in self.module.state_dict().items()]
        sides = [(s.size, s.step, s.cuts, s.reads, s.writes) for s in self.sides]
        kind = type(self.module).__module__, type(self.module).__qualname__, WORK in self.name
        return repr((*kind, self.module, tensors, sides, self.met, self.axis))

    def at(self, sizes: tuple[int, ...]) -> Callable[[], object]:
        """One call of a copy of the layer, without gradients, at these sizes of its sides."""
        shape = list(self.met.shape)
        if WORK in self.name:
            module = between_projections(self.module, sizes[0], lambda width: self.met.another([*shape[:-1], width]))
        else:
            module = copied(self.module)
            for side, size in zip(self.sides, sizes, strict=True):
                for key, dim in side.cuts:
                    layers.replace(module, key, _narrow(getattr(module, key).detach(), dim, size))
                if side.reads:
                    shape[self.axis] = shape[self.axis] * size // side.size
            layers.refresh(module)
        x = self.met.another(shape, still=bool(getattr(module, "inplace", False)))

        @torch.no_grad()
        def run() -> object:
            return module(x)

        return run


def _narrow(tensor: Tensor, dim: int, size: int) -> Tensor:
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    cut = tensor.narrow(dim, 0, size)
    return cut.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def sides_of(graph: Graph) -> dict[str, tuple[Side, ...]]:
    """The widths of every module that holds entries of a group, and under `#attention` those of attention blocks."""
    owned: dict[str, list[Member]] = {}
    steps: dict[tuple[str, int], int] = {}
    for group in graph.groups:
        for member in group.members:
            if member.dim is not None:
                owner = member.param if member.role == "work" else member.layer
                owned.setdefault(owner, []).append(member)
                key = (member.param, member.axis)
                steps[key] = math.gcd(steps.get(key, 0), member.width())
    found: dict[str, tuple[Side, ...]] = {}
    for owner, members in owned.items():
        if WORK in owner:  # told by the projection, which is there in the graph of any pruned model
            tensor = f"{owner.split(WORK)[0]}.proj.weight"
            if tensor not in graph.shapes:
                continue
            found[owner] = (Side(tensor, 1, graph.shapes[tensor][1], steps[owner, 0], (), True, True),)
            continue
        sides = []
        alone = not any(m.role in ("produce", "consume") for m in members)  # what comes in is what goes out
        for reads in (True, False):
            mine = {(m.param, m.axis): None for m in members if (m.role == "consume") == reads}
            if mine:
                tensor, dim = next(iter(mine))
                cuts = tuple((param.rpartition(".")[2], axis) for param, axis in mine)
                size = graph.shapes[tensor][dim]
                sides.append(Side(tensor, dim, size, steps[tensor, dim], cuts, reads or alone, not reads))
        found[owner] = tuple(sides)
    return found


def blocks_of(graph: Graph) -> tuple[str, ...]:
    """Names of the blocks that can be skipped: all of their layers are timed."""
    return tuple(group.id for group in graph.groups if group.kind == "block")


@dataclass(frozen=True)
class Watched:
    """What a forward pass shows.

    Attributes:
        modules: all that are worth timing inside the model, by name: layers, and modules that no group touches.
        layers: those whose work shrinks with the groups, in execution order.
    """

    modules: Mapping[str, nn.Module]
    layers: tuple[Layer, ...]


def watch(model: nn.Module, graph: Graph, run: Callable[[], object]) -> Watched:
    """Run a model once and look at its layers.

    Args:
        model: the dense model.
        graph: traced from it.
        run: calls the model.
    """
    known = {f"{block}{WORK}attention" for block in timed_attention(model)}
    sides = {name: side for name, side in sides_of(graph).items() if WORK not in name or name in known}
    owners = {name.split(WORK)[0] for name in sides}
    blocks, skippable = {name.split(WORK)[0] for name in sides if WORK in name}, blocks_of(graph)
    # A loose parameter's owner (a class token's, a layer scale's) is a whole block: what is in it counts, not it.
    owners = {name for name in owners if name in blocks or not any(is_below(other, name) for other in owners)}
    modules = {
        name: module
        for name, module in model.named_modules()
        if name in owners
        or (name and not any(True for _ in module.children()) and not any(is_below(name, owner) for owner in owners))
    }
    found: dict[tuple[str, Met], Layer] = {}
    odd: set[str] = set()
    wrote: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def look(name: str) -> Any:
        key = f"{name}{WORK}attention" if name in blocks else name

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if len(args) == 1 and not any(isinstance(v, Tensor) for v in kwargs.values()) else None
            if not isinstance(given, Tensor):
                odd.add(key)
                return
            mine, source = sides.get(key, ()), wrote.get(given)
            if not mine and source is not None and not module.state_dict() and _spans(given, *source):
                mine = (source[0],)
            if not mine and not any(is_below(name, block) for block in skippable):
                return
            axis = source[1] if source is not None else 0
            if mine and name in owners:
                axis = _axis(module, given.ndim, given.shape, mine[0].size)
            met = Met.of(given)
            layer = found.get((key, met)) or Layer(key, module, mine, met, axis, calls=0)
            found[key, met] = replace(layer, calls=layer.calls + 1)
            written = next((side for side in mine if side.writes), None)
            if written is not None and isinstance(output, Tensor) and output.ndim == given.ndim and name not in blocks:
                after = axis if written.reads else _axis(module, output.ndim, output.shape, written.size)
                if _spans(output, written, after):
                    wrote[output] = replace(written, cuts=(), reads=True), after

        return hook

    handles = [module.register_forward_hook(look(name), with_kwargs=True) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return Watched(modules, tuple(layer for (name, _), layer in found.items() if name not in odd))


def is_below(name: str, other: str) -> bool:
    """Whether one module is part of another."""
    return name != other and (not other or name.startswith(f"{other}."))


def _spans(x: Tensor, side: Side, axis: int) -> bool:
    return axis < x.ndim and x.shape[axis] == side.size


def _axis(module: nn.Module, dims: int, shape: torch.Size, size: int) -> int:
    """Along which dimension of a layer's input or output its channels lie."""
    if isinstance(module, _ConvNd):
        return dims - 1 - len(module.kernel_size)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return dims - 1
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.PReLU)):
        return min(1, dims - 1)
    fitting = [axis for axis in range(1, dims) if shape[axis] == size] or [dims - 1]
    return fitting[-1] if type(module) is nn.LayerNorm else fitting[0]
