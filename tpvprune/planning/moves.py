"""Operations that move entries: run on the slots themselves, or on the places in the parameter they come from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tpvprune.planning.cost import tensors_of
from tpvprune.planning.follower import FIXED, OF_ONE_HEAD, Follower, numbers, shapes
from tpvprune.planning.labels import Origin, gathered, is_free, spread, varying
from tpvprune.planning.seen import Call
from tpvprune.planning.units import FREE, STATIC, modulo

VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy", "_reshape_alias")
PART = "{!r} takes a part of its channels"
LARGE = 50_000_000  # entries of a parameter whose places are not written out


def move(f: Follower, call: Call) -> None:
    """Views, slices, joins, looking up: whatever puts entries elsewhere."""
    if (
        call.name in ("index", "gather")
        and any(s.axes or s.origins for s in call.before[1:])
        and not call.before[0].axes
    ):
        f.pin(call.given[1:], f"{f.called!r} looks up by its units")
    if all(s.origins or not s.axes for s in call.before) and any(s.origins for s in call.before):
        _move_parameters(f, call)
        return
    _by_place(f, call)
    found: list[dict[int, Tensor | None]] = [{} for _ in call.out]
    joins = call.name in ("cat", "stack")
    axes = {a: None for state in call.before for a in state.axes}
    for axis in axes:
        if joins and _joined_across(f, call, axis, found[0]):
            continue
        labels = []
        for tensor, state, shape in zip(call.given, call.before, call.shapes, strict=True):
            slots = f.along(tensor, axis % len(shape), "produce", state) if shape else None
            if slots is None and shape:
                slots = torch.full((shape[axis % len(shape)],), STATIC)
            labels.append(spread(slots, axis % len(shape), shape) if slots is not None else tensor)
            if not joins:
                labels += call.given[1:]
                break
        if not joins and is_free(labels[0]):
            _repeated(f, call, axis, found)
            continue
        for number, moved in enumerate(_run(f, call, labels)):
            place = _settled(f, call, moved)
            if place is not None:
                at, slots = place
                found[number][at] = _merged(f, found[number].get(at), slots)
    if call.name == "expand":  # what is repeated takes the length it meets
        shape, to = (1,) * (call.out[0].ndim - len(call.shapes[0])) + call.shapes[0], call.out[0].shape
        found[0] |= {a: torch.full((n,), FREE) for a, n in enumerate(to) if n != shape[a] and a not in found[0]}
    for tensor, axes_of in zip(call.out, found, strict=True):
        f.settle(tensor, axes_of)
    _cuts(f, call)


def _repeated(f: Follower, call: Call, axis: int, found: list[dict[int, Tensor | None]]) -> None:
    """Where an axis that takes whatever length it meets lies after a move; nowhere once others are mixed into it."""
    shape = call.shapes[0]
    labels = [spread(torch.arange(1, shape[axis] + 1), axis, shape), *call.given[1:]]
    for number, moved in enumerate(_run(f, call, labels)):
        for at in varying(moved):
            # Of several samples, what is repeated for each of them still is.
            if moved.shape[at] == shape[axis] or (at, axis) == (0, 1):
                found[number].setdefault(at, torch.full((moved.shape[at],), FREE))


def _merged(f: Follower, one: Tensor | None, other: Tensor) -> Tensor:
    """What lies along an axis that two axes were joined to: heads if one has them, and the other stays whole."""
    if one is None or is_free(one):
        return other
    heads = {f.units.find(slot) for width in f.widths if width.heads for slot in width.slots.tolist()} - {STATIC}
    has = [bool(heads & {f.units.find(slot) for slot in slots.unique().tolist()}) for slots in (one, other)]
    if has[0] != has[1]:
        kept, left = (one, other) if has[0] else (other, one)
        f.units.pin(left, f"each head of {f.called!r} has all of them")
        return kept
    f.units.tie(one, other, FIXED)
    f.units.pin(other, FIXED)
    return other


def _by_place(f: Follower, call: Call) -> None:
    """Pin what is looked up or rolled along its units by places that no cut sets anew."""
    shape = call.shapes[0]
    if call.name == "index":
        dims = [dim for dim, index in enumerate(call.args[1]) if index is not None]
    elif call.name in ("index_select", "gather"):
        dims = [call.argument("dim", 0) % max(1, len(shape))]
    elif call.name == "roll":
        dims = [dim % len(shape) for dim in call.argument("dims") or range(len(shape))]
    else:
        return
    f.pin(call.given[:1], f"{f.called!r} looks up its units by their places", dims)


def _joined_across(f: Follower, call: Call, axis: int, found: dict[int, Tensor | None]) -> bool:
    """Tie what lies along an axis of tensors that are joined along another one; whether they are."""
    ndim = call.out[0].ndim
    dim = call.argument("dim", 0) % ndim
    place = axis + int(call.name == "stack" and dim <= axis)
    parts = [(t, s, shape) for t, s, shape in zip(call.given, call.before, call.shapes, strict=True) if shape != (0,)]
    if place == dim or any(axis >= len(shape) for _, _, shape in parts):
        return False
    first, *others = (f.along(tensor, axis, "produce", state) for tensor, state, _ in parts)
    for other in others:
        if first is None:
            first, other = other, None
        if first is not None:
            f.ties(first, other)
    found[place] = first
    return True


def _run(f: Follower, call: Call, labels: list[Tensor]) -> list[Tensor]:
    """The same operation on slots."""
    if call.name in VIEWS:
        return [labels[0].reshape(call.out[0].shape)]
    args, kwargs = call.args, dict(call.kwargs)
    if call.name in ("cat", "stack"):
        return [call.func(labels, *args[1:], **kwargs)]
    if call.name == "constant_pad_nd":
        return [call.func(labels[0], args[1], FREE)]
    if call.name == "im2col":
        return [call.func(labels[0].double(), *args[1:], **kwargs).long()]
    return tensors_of(call.func(labels[0], *args[1:], **kwargs))


def _settled(f: Follower, call: Call, moved: Tensor) -> tuple[int, Tensor] | None:
    """The one axis along which slots lie after a move, and the slots."""
    axes = varying(moved)
    if not axes:
        if moved.numel():
            slots = moved.reshape(-1)[:1] if moved.numel() == 1 else moved[(slice(0, 1),) * moved.ndim].reshape(-1)
            f.units.pin(slots, f"{f.called!r} picks single channels")
        return None
    axis = axes[0] if len(axes) == 1 else _chosen(f, moved, axes)
    slots = gathered(moved, axis, lambda a, b: f.units.tie(a, b, FIXED))
    if len(axes) > 1 and f.here in f.policy.still:
        f.units.pin(slots, f.policy.still[f.here])
    if call.name == "constant_pad_nd":
        slots = slots.clamp(min=STATIC)
    if call.name in VIEWS:
        f.site(call.shapes[0], moved, axes)
        heads = len(axes) > 1 and axis in _heads(f, moved, axes)
        f.width(moved.shape[axis], slots, heads=heads, shape=tuple(moved.shape), axis=axis)
    return axis, slots


def _counts_heads(f: Follower, length: int) -> bool:
    return any("head" in key and "dim" not in key and value == length for key, value in numbers(f.author()[0]))


def _heads(f: Follower, moved: Tensor, axes: list[int]) -> list[int]:
    """The axes that may be heads: as many as the module counts, or what comes before the channels of one head."""
    counted = [axis for axis in axes if _counts_heads(f, moved.shape[axis])]
    of_one = [value for key, value in numbers(f.author()[0]) if any(part in key for part in OF_ONE_HEAD)]
    told = {times * value for value in of_one for times in (1, 2, 3)}  # queries, keys and values may lie side by side
    if not counted and len(axes) > 1 and axes[-2:] == [moved.ndim - 2, moved.ndim - 1] and moved.shape[-1] in told:
        return [axes[-2]]
    return counted


def _chosen(f: Follower, moved: Tensor, axes: list[int]) -> int:
    """The axis that units lie along where a move leaves several: heads, or else the longest."""
    heads = _heads(f, moved, axes)
    if heads and f.here not in f.policy.whole:
        # The channels of a head come last; there may be as many of them as heads.
        return heads[-2] if len(heads) > 1 and heads[-1] == axes[-1] else heads[-1]
    left = [axis for axis in axes if axis not in heads] or axes
    return max(left, key=lambda axis: moved.shape[axis])


def _cuts(f: Follower, call: Call) -> None:
    """Equal parts that units are cut into stay equal; others keep their lengths, unless attributes hold them."""
    if call.name not in ("slice", "split", "split_with_sizes", "narrow", "chunk", "unbind", "select"):
        return
    for axis, slots in call.before[0].axes.items():
        lengths = [t.shape[axis] for t in call.out] if call.out[0].ndim == len(call.shapes[0]) else []
        lengths = [length for length in lengths if length]
        whole = call.shapes[0][axis]
        if not lengths or lengths == [whole]:
            continue
        part = lengths[0]
        start = call.argument("start", 0) or 0 if call.name == "slice" else 0
        even = all(length == part for length in lengths) and whole % part == 0 and start % part == 0
        step = call.argument("step", 1) if call.name == "slice" else 1
        if step != 1 or f.here in f.policy.still:
            f.units.pin(slots, f.policy.still.get(f.here, PART.format(f.called)))
        elif even:
            f.width(part, slots[:part])
            f.width(whole, slots)
            for one, other in modulo(slots, part):
                f.units.tie(one, other, FIXED)
        else:
            _uneven(f, slots, start, lengths)


def _uneven(f: Follower, slots: Tensor, start: int, lengths: list[int]) -> None:
    """Parts of several lengths: each must be a number that the module holds, so that it can be set anew."""
    told = {value for _, value in numbers(f.author()[0])}
    ends = [start, *(start + sum(lengths[: n + 1]) for n in range(len(lengths)))]
    parts = [(a, b) for a, b in zip((0, *ends), (*ends, len(slots)), strict=False) if a < b]
    alone = len(lengths) == 1  # a slice: what is left over need not be told, one of its two ends may be the axis's own
    if alone:
        parts = [(a, b) for a, b in ((0, start), (start, ends[-1])) if a < b and b < len(slots)]
    if f.here in f.policy.parts or not parts or any(b - a not in told for a, b in parts) or (alone and len(parts) > 1):
        f.units.pin(slots, PART.format(f.called))
        return
    for a, b in parts:
        f.width(b - a, slots[a:b], must=True)


def _move_parameters(f: Follower, call: Call) -> None:
    state, shape = call.before[0], call.shapes[0]
    out = call.out[0]
    if call.name in ("t", "permute", "transpose", "unsqueeze", "expand", "squeeze") and state.origins:
        axes = _moved_axes(call, len(shape))
        if axes is not None:
            origins = []
            for origin in state.origins:
                dims = tuple(None if a is None else origin.dims[a] for a in axes)
                cells = None if origin.cells is None else call.func(origin.written_out(shape), *call.args[1:])
                origins.append(replace(origin, dims=dims, cells=cells))
            f.know(out, origins)
            return
    if call.name in ("cat", "stack"):
        offsets, base = {}, 0
        for t, s in zip(call.given, call.before, strict=True):
            offsets[id(t)] = base
            base += len(s.origins)
        names = dict.fromkeys((o.name, o.shape) for s in call.before for o in s.origins)
        origins = []
        for name, whole in names:
            cells = []
            for s, each in zip(call.before, call.shapes, strict=True):
                own = next((o for o in s.origins if o.name == name), None)
                cells.append(torch.full(each, -1) if own is None else own.written_out(each))
            joined = call.func(cells, *call.args[1:], **call.kwargs)
            origins.append(Origin(name, whole, (None,) * out.ndim, joined))
        f.know(out, origins)
        return
    for origin in state.origins:
        if origin.cells is None and torch.Size(origin.shape).numel() > LARGE:
            return
    results: list[list[Origin]] = [[] for _ in call.out]
    for origin in state.origins:
        labels = [origin.written_out(shape), *call.given[1:]]
        for number, moved in enumerate(_run(f, call, labels)):
            results[number].append(replace(origin, dims=(None,) * moved.ndim, cells=moved))
    for tensor, origins in zip(call.out, results, strict=True):
        f.know(tensor, origins)
    if call.name in VIEWS:
        told = any(shape == out.shape for _, shape in shapes(f.author()[0]))
        for axis in range(out.ndim if told else 0):
            slots = f.along(out, axis, "affine")
            if slots is not None:
                f.width(out.shape[axis], slots, shape=tuple(out.shape), axis=axis)


def _moved_axes(call: Call, count: int) -> list[int | None] | None:
    """For each axis of what comes out the axis it was."""
    axes: list[int | None] = list(range(count))
    if call.name == "t":
        return axes[::-1]
    if call.name == "permute":
        return [axes[a % count] for a in call.args[1]]
    if call.name == "transpose":
        a, b = (d % count for d in call.args[1:3])
        axes[a], axes[b] = axes[b], axes[a]
        return axes
    if call.name == "unsqueeze":
        axes.insert(call.args[1] % (count + 1), None)
        return axes
    if call.name == "expand":
        return [None] * (call.out[0].ndim - count) + axes
    return None
