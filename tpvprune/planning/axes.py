"""Operations that keep the axes of their inputs apart: entry by entry, norms, reductions, pools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpvprune.members import Role
from tpvprune.multihead import Heads
from tpvprune.planning.follower import FIXED, Follower
from tpvprune.planning.labels import Origin, State, is_free
from tpvprune.planning.seen import Call
from tpvprune.planning.units import modulo


def elementwise(f: Follower, call: Call) -> None:
    """Entry by entry, with shorter shapes repeated."""
    out = call.out[0]
    parts = [(t, s, shape) for t, s, shape in zip(call.given, call.before, call.shapes, strict=True)]
    if all(s.origins or (not s.axes and max(shape, default=1) == 1) for _, s, shape in parts):
        origins = [o for t, s, shape in parts for o in _stretched(s, shape, tuple(out.shape))]
        f.know(out, origins)
        return
    role: Role = "affine" if call.name in ("mul", "div", "prelu", "_prelu_kernel") or _norms(f) else "produce"
    axes: dict[int, Tensor | None] = {}
    for axis in range(out.ndim):
        held: list[Tensor] = []
        fixed = False
        for _, state, shape in parts:
            mine = axis - out.ndim + len(shape)
            if mine >= 0 and shape[mine] == out.shape[axis] and shape[mine] > 1 and not state.origins:
                slots = state.axes.get(mine)
                fixed |= slots is None
                held += [] if slots is None else [slots]
        if not held:
            continue
        for _, state, shape in parts:
            mine = axis - out.ndim + len(shape)
            if state.origins and mine >= 0 and shape[mine] > 1:
                slots = f.along(torch.empty(shape, device="meta"), mine, role, state)
                fixed |= slots is None
                held += [] if slots is None else [slots]
        held.sort(key=is_free)
        for other in held[1:]:
            f.units.tie(held[0], other, FIXED)
        if fixed:
            f.units.pin(held[0], FIXED)
        axes[axis] = held[0]
    for tensor in call.out:
        f.settle(tensor, axes)


def _norms(f: Follower) -> bool:
    return "norm" in type(f.module).__name__.lower()


def _stretched(state: State, shape: tuple[int, ...], to: tuple[int, ...]) -> Iterable[Origin]:
    """Origins of a parameter that is broadcast to a longer shape."""
    more = len(to) - len(shape)
    for origin in state.origins:
        dims = (None,) * more + origin.dims
        cells = None if origin.cells is None else origin.cells.expand(shape)[(None,) * more]
        yield replace(origin, dims=dims, cells=cells)


def _affine(f: Follower, slots: Tensor | None, tensors: Iterable[Any], role: Role) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and slots is not None:
            own = f.along(tensor, tensor.ndim - 1, role)
            if own is None:
                f.units.pin(slots, FIXED)
            else:
                f.units.tie(slots, own, FIXED)


def batch_norm(f: Follower, call: Call) -> None:
    """Batch norms; of a weight alone, its standardisation."""
    x, out = call.given[0], call.out[0]
    state = call.before[0]
    if state.origins:  # a weight is standardised
        others = [
            replace(o, dims=(None, o.dims[0], *[None] * (x.ndim - 2)), pooled=True)
            for t in call.args[1:3] if isinstance(t, Tensor) for o in f.state(t).origins
            if o.cells is None
        ]  # fmt: skip
        others += [
            replace(o, cells=o.cells.reshape(1, -1, *[1] * (x.ndim - 2)), pooled=True, dims=(None,) * x.ndim)
            for t in call.args[1:3] if isinstance(t, Tensor) for o in f.state(t).origins
            if o.cells is not None
        ]  # fmt: skip
        f.know(out, [*state.pooled().origins, *others])
        return
    slots = state.axes.get(1)
    _affine(f, slots, call.args[1:3], "affine")
    _affine(f, slots, call.args[3:5], "stat")
    f.settle(out, state.axes)


def layer_norm(f: Follower, call: Call) -> None:
    """Layer and RMS norms."""
    x, state = call.given[0], call.before[0]
    count = len(call.args[1])
    for axis, slots in state.axes.items():
        if axis >= x.ndim - count:
            f.units.pool(slots)
            for tensor in call.args[2:4]:
                if isinstance(tensor, Tensor):
                    own = f.along(tensor, axis - x.ndim + count, "affine")
                    if own is None:
                        f.units.pin(slots, FIXED)
                    else:
                        f.units.tie(slots, own, FIXED)
    f.settle(call.out[0], state.axes)


def group_norm(f: Follower, call: Call) -> None:
    """Group norms: a unit is one channel of every group."""
    slots, groups = call.before[0].axes.get(1), call.args[-2]
    if slots is not None:
        f.units.pool(slots)
        for one, other in modulo(slots, len(slots) // groups):
            f.units.tie(one, other, FIXED)
        _affine(f, slots, call.args[1:3], "affine")
    f.settle(call.out[0], call.before[0].axes)


def reduce(f: Follower, call: Call) -> None:
    """Sums, means, extremes and the like."""
    state, shape = call.before[0], call.shapes[0]
    dims = call.argument("dim", call.argument("axis"))
    dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % max(1, len(shape)) for dim in dims}
    left = [axis for axis in range(len(shape)) if axis not in gone]
    heads = None
    for axis in gone & set(state.axes):
        if isinstance(f.module, Heads):
            heads = state.axes[axis]
            continue
        f.units.pool(state.axes[axis])
        if call.name in ("argmax", "argmin"):
            f.units.pin(state.axes[axis], f"{f.called!r} tells its units by their numbers")
    for out in call.out:
        places = left if out.ndim == len(shape) else range(out.ndim)
        if state.origins:
            origins = []
            for origin in state.origins:
                kept = dict(zip(places, left, strict=False))
                cells = origin.written_out(shape)
                for axis in gone:
                    cells = cells.narrow(axis, 0, 1)
                origins.append(
                    replace(origin, dims=(None,) * out.ndim, cells=cells.reshape(out.shape), pooled=True)
                    if kept or out.numel() == 1
                    else origin
                )
            f.know(out, origins)
        else:
            f.settle(out, {p: state.axes.get(a) for p, a in zip(places, left, strict=False)}, heads)


def spread_along(f: Follower, call: Call) -> None:
    """Softmax and others that keep the shape and mix along one axis."""
    state, shape = call.before[0], call.shapes[0]
    if state.origins:
        f.know(call.out[0], state.pooled().origins)
        return
    dim = call.argument("dim", -1) % max(1, len(shape))
    if dim in state.axes:
        if call.name in ("sort", "topk", "argsort"):
            f.units.pin(state.axes[dim], f"{f.called!r} sorts its units")
        f.units.pool(state.axes[dim])
    for out in call.out:
        same = {a: s for a, s in state.axes.items() if a < out.ndim and out.shape[a] == shape[a]}
        f.settle(out, same)


def glu(f: Follower, call: Call) -> None:
    """One half of an axis times the sigmoid of the other: a unit is one channel of both."""
    dim, axes = call.argument("dim", -1) % len(call.shapes[0]), dict(call.before[0].axes)
    if dim in axes:
        half = len(axes[dim]) // 2
        f.ties(axes[dim][:half], axes[dim][half:])
        axes[dim] = axes[dim][:half]
    f.settle(call.out[0], axes)


def spatial(f: Follower, call: Call) -> None:
    """Pools and resizing, which keep channels apart."""
    state, shape = call.before[0], call.shapes[0]
    for out in call.out:
        kept = {a: s for a, s in state.axes.items() if a < 2 - (len(shape) == 3 and "1d" not in call.name)}
        for axis, slots in state.axes.items():
            if axis not in kept:
                f.units.pin(slots, f"{f.called!r} pools or resizes along its units")
        same = out.ndim == len(shape)
        f.settle(out, {a: s for a, s in kept.items() if same and out.shape[a] == shape[a]})


def regions(f: Follower, call: Call) -> None:
    """Pools over regions of images, which keep channels apart: `(regions, channels, ...)` come out."""
    f.pin(call.given[1:], f"{f.called!r} pools regions that are told by its units")
    spatial(f, call)


def put(f: Follower, call: Call) -> None:
    """Rows of a tensor that others are put into: what lies along the other axes lies along those of both."""
    indices, values = call.argument("indices"), call.argument("values")
    f.pin((i for i in indices if i is not None), f"{f.called!r} looks up by its units")
    into, given = call.before[0], f.state(values)
    rows = indices[0].ndim if len(indices) == 1 and indices[0] is not None else 0
    # As many axes as a mask has become one, those of numbers of rows stay what they are.
    first, places = (rows, 1) if rows and indices[0].dtype in (torch.bool, torch.uint8) else (1, rows)
    shape = call.shapes[0]
    shift = values.ndim - len(shape) + first - places  # below zero where what is put in is repeated for all rows
    if not rows or into.origins or given.origins or shift > 0:
        f.pin(call.given, f"the operation {call.name!r} in {f.called!r} cannot be followed")
        return
    for axes, below in ((into.axes, first), (given.axes, places + shift)):
        for axis, slots in axes.items():
            if axis < below:
                f.units.pin(slots, f"{f.called!r} looks up its units by their places")
    found = {}
    for axis in range(first, len(shape)):
        there = axis - first + places + shift
        mine, other = into.axes.get(axis), given.axes.get(there) if there >= 0 else None
        if mine is not None and there >= 0 and values.shape[there] > 1:
            f.ties(mine, other)
        # Nothing that units lie along was there before: room for what is put in, as wide as that is.
        found[axis] = other if mine is None and there >= 0 and values.shape[there] == shape[axis] else mine
    f.settle(call.out[0], found)


def embedding(f: Follower, call: Call) -> None:
    """Rows looked up in a table."""
    out = call.out[0]
    f.settle(out, {out.ndim - 1: f.along(call.given[0], 1)})
