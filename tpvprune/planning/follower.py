"""The mode that runs with a network and remembers what lies along the axes of its tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from tpvprune.elastic import calls_at, names_at, value_of
from tpvprune.members import Role
from tpvprune.planning.conventions import infos
from tpvprune.planning.cost import tensors_of
from tpvprune.planning.labels import PLAIN, Origin, State, Tangled, is_static
from tpvprune.planning.seen import Call, Limit, Policy, Product, Reshaped, Width
from tpvprune.planning.units import FREE, STATIC, Units
from tpvprune.source import method_of, running

WEIGHTS = "{!r} looks at the mean attention of all heads"
OF_ONE_HEAD = ("head_dim", "dim_head", "head_size", "head_channels", "d_head", "dim_per_head")  # in names of numbers
FIXED = "its channels are added to the model's input or another tensor of fixed width"


class Follower(TorchDispatchMode):
    """Runs with a network and ties what can only leave together.

    Attributes:
        units: what was found.
        widths: places in the code that depend on a length.
        products: of activations, with each other and with weights.
        order: parameters in the order in which they are first read.
        readers: of each parameter, the modules in which it is multiplied with.
        bundled: grouped convolutions whose groups are units, and the slots they write.
        sites: what calls of `reshape` and `view` did, by class, method, line and text.
        outputs: of modules that the model's `feature_info` names, and the slots along their axes.
        scaled: whether attention runs that takes its scale from the width of what it is given.
        policy: what may be cut.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        rule: Callable[[Call], Rule | None],
        told: Callable[[str], None] | None = None,
        limit: Limit | None = None,
    ) -> None:
        super().__init__()
        self._limit = limit
        self.scaled = False
        self.units = Units()
        self.widths: list[Width] = []
        self.products: list[Product] = []
        self.order: dict[str, int] = {}
        self.readers: dict[str, set[str]] = {}
        self.bundled: list[tuple[str, Tensor]] = []
        self.sites: dict[tuple[type[Any], str, int, str], Reshaped] = {}
        self.policy, self._rule, self._told = policy, rule, told
        self.outputs: dict[str, tuple[Tensor, Mapping[int, Tensor]]] = {}
        self._watched = {info["module"] for info in infos(model)}
        self._names = {id(m): name for name, m in model.named_modules()}
        self._stack: list[nn.Module] = [model]  # stays when the model itself is left
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            dims = tuple(range(tensor.ndim))
            self._known[tensor] = State(origins=(Origin(name, tuple(tensor.shape), dims),))

    # Where in the network we are.

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook of every module."""
        self._stack.append(module)
        if self.here in self.policy.sealed:
            self.pin(tensors_of((args, kwargs)), self.policy.sealed[self.here])

    def leave(self, module: nn.Module, _: Any, out: Any) -> None:
        """A forward hook of every module."""
        if self.here in self.policy.sealed:
            self.pin(tensors_of(out), self.policy.sealed[self.here])
        if self.here in self._watched and isinstance(out, Tensor):
            self.outputs[self.here] = out, self.state(out).axes
        if self._told is not None and self.here:
            self._told(self._names[id(module)])
        while self._stack.pop() is not module:  # one that raised and was caught
            pass

    @property
    def here(self) -> str:
        """Name of the module whose code runs."""
        return self._names[id(self._stack[-1])]

    @property
    def called(self) -> str:
        """What messages call the module whose code runs: by its name, the model itself by its class."""
        return self.here or type(self._stack[0]).__name__

    # What is known of tensors.

    def state(self, tensor: Tensor) -> State:
        """What is known of a tensor."""
        return self._known.get(tensor, PLAIN)

    def along(self, tensor: Tensor, axis: int, role: Role = "produce", state: State | None = None) -> Tensor | None:
        """The slots along an axis of a tensor, None if there are none; those of a parameter are made if need be."""
        state = state or self.state(tensor)
        if not state.origins:
            return state.axes.get(axis)
        found: Tensor | None = None
        for origin in state.origins:
            try:
                place = origin.along(axis, tensor.shape)
            except Tangled:
                place = None
                if tensor.shape[axis] > 1:
                    found = torch.zeros(tensor.shape[axis], dtype=torch.int64) if found is None else found
            if place is None:
                continue
            dim, entries = place
            self.order.setdefault(origin.name, len(self.order))
            held = "stat" if origin.name in self._buffers else role
            slots = self.units.of(origin.name, dim, origin.shape[dim], held)
            slots = torch.where(entries >= 0, slots[entries.clamp(min=0)], FREE)
            if found is not None:
                self.units.tie(found, slots, FIXED)
                slots = torch.where(slots == FREE, found, slots)
            found = slots
        return None if found is None else found.clamp(min=STATIC)

    def settle(self, tensor: Tensor, axes: Mapping[int, Tensor | None], heads: Tensor | None = None) -> None:
        """Remember the slots along the axes of an activation, and of heads whose attention it is the mean of."""
        kept = {a: s for a, s in axes.items() if s is not None and (not is_static(s) or bool((s == FREE).all()))}
        self._known[tensor] = State(kept, heads=heads)

    def know(self, tensor: Tensor, origins: Iterable[Origin]) -> None:
        """Remember what a tensor is made of that depends on no input."""
        self._known[tensor] = State(origins=tuple(origins))

    def ties(self, slots: Tensor, others: Tensor | None, why: str = FIXED) -> None:
        """Tie two vectors of slots; without the second the first is pinned."""
        if others is None:
            self.units.pin(slots, why)
        else:
            self.units.tie(slots, others, why)

    @property
    def module(self) -> nn.Module:
        """The module whose code runs."""
        return self._stack[-1]

    def author(self) -> tuple[nn.Module, FrameType | None]:
        """The module of the model whose method runs, a helper of the one that was called perhaps, and its frame."""
        found = self._running()
        return (self.module, None) if found is None else (found[0], found[1])

    def _running(self) -> tuple[nn.Module, FrameType, tuple[str, FrameType] | None] | None:
        return running(sys._getframe(1), lambda module: id(module) in self._names)

    def width(self, length: int, slots: Tensor, **more: Any) -> None:
        """Note that the code that runs depends on how many entries an axis has, see `Width`."""
        owner, frame = self.author()
        method = None if frame is None else method_of(type(owner), frame.f_code)
        named = frozenset[str]() if frame is None or method is None else names_at(type(owner), method, frame.f_lineno)
        self.widths.append(Width(self.here, self._names[id(owner)], length, slots, named=named, **more))

    def site(self, before: Sequence[int], slots: Tensor, axes: Iterable[int]) -> None:
        """Note that the code that runs reshapes a tensor.

        Args:
            before: its shape.
            slots: of what came out, in that shape.
            axes: along which they lie.
        """
        shape, found = tuple(slots.shape), self._running()
        if found is None or found[2] is None:
            return
        owner, (name, frame) = found[0], found[2]
        site = type(owner), name, frame.f_lineno
        for call, sizes in calls_at(*site):
            values = [value_of(size, frame) for size in sizes]
            if len(sizes) == len(shape) and all(v in (None, -1, n) for v, n in zip(values, shape, strict=True)):
                seen = self.sites.setdefault((*site, call), Reshaped(tuple(before), shape, set()))
                seen.axes.update(axes)

    def pin(self, tensors: Iterable[Tensor], why: str, axes: Iterable[int] | None = None) -> None:
        """Keep whole what lies along some or all axes of activations."""
        for tensor in tensors:
            state = self.state(tensor)
            for axis, slots in state.axes.items():
                if axes is None or axis in axes:
                    self.units.pin(slots, why)
            if state.heads is not None:
                self.units.pin(state.heads, why)

    # Dispatch.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and follow it."""
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        before = [self.state(t) for t in given]
        shapes = [tuple(t.shape) for t in given]
        for state in before:
            if state.heads is not None:
                self.units.pin(state.heads, WEIGHTS.format(self.called))
        out = func(*args, **kwargs)
        if not any(s.axes or s.origins for s in before):
            return out
        name = func.overloadpacket.__name__.rstrip("_")
        if self._limit is not None:
            self._limit.check(f"the operation {name!r} in {self.called!r}")
        call = Call(func, name, args, kwargs, given, before, shapes, tensors_of(out))
        rule = self._rule(call)
        if rule is None:
            label = f"the operation {name!r} in {self.called!r} cannot be followed"
            for state in before:
                for slots in state.axes.values():
                    self.units.pin(slots, label)
        else:
            rule(self, call)
        return out


Rule = Callable[[Follower, Call], None]


def numbers(module: nn.Module) -> Iterable[tuple[str, int]]:
    """The whole numbers among a module's own attributes."""
    for key, value in vars(module).items():
        if type(value) is int and not key.startswith("_") and value > 1:
            yield key, value


def shapes(module: nn.Module) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The tuples and lists of whole numbers among a module's own attributes."""
    for key, value in vars(module).items():
        if type(value) in (tuple, list) and not key.startswith("_") and all(type(v) is int for v in value):
            yield key, tuple(value)
