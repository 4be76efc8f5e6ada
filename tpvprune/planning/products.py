"""Products: of activations by weights, which make and read channels, and of activations by activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpvprune.planning.follower import FIXED, Follower
from tpvprune.planning.labels import Origin, is_free
from tpvprune.planning.seen import Call, Product
from tpvprune.planning.units import STATIC, modulo

SUMMED = "its channels are summed over in {!r} with others that stay"


def matmul(f: Follower, call: Call) -> None:
    """`mm`, `bmm`, and both with a bias."""
    a, b = call.given[-2:]
    out, last = call.out[0], call.out[0].ndim - 1
    macs = out.numel() * a.shape[-1]
    _contract(f, a, b, last)
    if f.state(a).origins and f.state(b).origins:  # of parameters alone
        return
    rows, columns = f.along(a, last - 1), f.along(b, last)
    together = None
    if last == 2:
        one, other = f.along(a, 0), f.along(b, 0)
        if one is None or (other is not None and is_free(one)):
            one, other = other, one
        together = one
        if together is not None and out.shape[0] > 1:
            f.ties(together, other)
    if len(call.given) == 3 and columns is not None and call.given[0].shape[-1] > 1:
        f.ties(columns, f.along(call.given[0], call.given[0].ndim - 1))
    weight, other = (b, a) if f.state(b).origins else (a, b)
    summed = f.state(other).axes.get(last if other is a else last - 1)
    own = last == 2 and bool(f.state(weight).origins) and f.along(weight, 0) is not None
    beside = (None if own else together, rows if other is a else columns)
    _note(f, weight, macs, (together, columns, rows, summed), beside)
    f.settle(out, {0: together, last - 1: rows, last: columns} if last == 2 else {0: rows, 1: columns})


def _note(
    f: Follower, weight: Tensor, macs: int, along: Sequence[Tensor | None], beside: Sequence[Tensor | None]
) -> None:
    """Remember a product, with what lies along its axes, and along those of them that are none of the weight's own."""
    slots, rows = (tuple(each for each in axes if each is not None) for axes in (along, beside))
    origins = f.state(weight).origins
    f.products.append(Product(f.here, macs, slots, origins[0].name, rows) if origins else Product(f.here, macs, slots))


def _contract(f: Follower, a: Tensor, b: Tensor, last: int) -> None:
    """Tie what is summed over."""
    for weight, other, mine, theirs in ((b, a, last - 1, last), (a, b, last, last - 1)):
        origins = f.state(weight).origins
        if origins and not f.state(other).origins:
            _read(f, origins)
            slots = f.state(other).axes.get(theirs)
            if slots is not None:
                f.ties(slots, f.along(weight, mine, "consume"))
                if any(origin.pooled for origin in origins):
                    f.units.pool(slots)
            return
    left, right = f.state(a).axes.get(last), f.state(b).axes.get(last - 1)
    for one, other_slots in ((left, right), (right, left)):
        if one is not None:
            f.units.pool(one)
            f.ties(one, other_slots, SUMMED.format(f.called) if other_slots is None else FIXED)
            if f.scaled:
                f.units.pin(one, f"how many there are sets the scale of the attention in {f.called!r}")


def _read(f: Follower, origins: Sequence[Origin]) -> None:
    name = origins[0].name
    f.order.setdefault(name, len(f.order))
    f.readers.setdefault(name, set()).add(f.here)


def convolution(f: Follower, call: Call) -> None:
    """Dense, grouped, depthwise and transposed convolutions."""
    x, weight, bias = call.args[:3]
    out, transposed, groups = call.out[0], call.args[6], call.args[8]
    source = x if transposed else out
    macs = source.numel() // source.shape[1] * weight.numel()
    origins = f.state(weight).origins
    if not origins:
        f.pin([x, weight], f"{f.called!r} computes the weights of its convolution")
        f.products.append(Product(f.here, macs, ()))
        return
    _read(f, origins)
    f.pin([x], f"{f.called!r} convolves over its units", [axis for axis in f.state(x).axes if axis > 1])
    batch, slots = f.state(x).axes.get(0), f.state(x).axes.get(1)
    if slots is not None and any(origin.pooled for origin in origins):
        f.units.pool(slots)
    rows, columns = (1, 0) if transposed else (0, 1)
    depthwise = groups > 1 and groups == x.shape[1] and not transposed
    bundled = groups > 1 and not depthwise and slots is not None and f.policy.bundles and f.here not in f.policy.loose
    written = f.along(weight, rows, "affine" if depthwise or bundled else "produce")
    if groups > 1 and transposed:
        _stays_whole(f, weight, bias, slots)
        _note(f, weight, macs, (batch,), (batch,))
        f.settle(out, {0: batch})
        return
    if written is None:  # a single channel comes out
        written = torch.full((out.shape[1],), STATIC)
    if depthwise:
        f.ties(written, slots if slots is None else slots.repeat_interleave(out.shape[1] // groups))
        f.width(groups, written[:: out.shape[1] // groups])  # a number its code may hold
    elif bundled and slots is not None:
        _bundle(f, slots, written, groups)
    else:
        _read_channels(f, weight, columns, slots, written, groups)
    if bias is not None:
        own = f.along(bias, 0, "affine" if depthwise or bundled else "produce")
        if own is not None:
            f.units.tie(written, own, FIXED)
    read = None if slots is None or groups > 1 else f.along(weight, columns)
    _note(f, weight, macs, (batch, written, read), (batch,))
    f.settle(out, {0: batch, 1: written})


def _stays_whole(f: Follower, weight: Tensor, bias: Tensor | None, slots: Tensor | None) -> None:
    """A grouped transposed convolution, of which a slice along either dimension of the weight lies in one group."""
    sides = [slots, f.along(weight, 0, "consume"), f.along(weight, 1)]
    sides += [] if bias is None else [f.along(bias, 0)]
    for side in sides:
        if side is not None:
            f.units.pin(side, f"{f.called!r} is a grouped transposed convolution")


def _read_channels(
    f: Follower, weight: Tensor, columns: int, slots: Tensor | None, written: Tensor, groups: int
) -> None:
    """Channels that a weight reads and writes; a unit is one channel of every group."""
    for part in (slots, written):
        if part is not None and groups > 1:
            for one, other in modulo(part, len(part) // groups):
                f.units.tie(one, other, FIXED)
    if slots is not None:
        f.ties(slots[: len(slots) // groups], f.along(weight, columns, "consume"))


def _bundle(f: Follower, slots: Tensor, written: Tensor, groups: int) -> None:
    """What a group of a convolution reads and writes is one unit."""
    for part in (slots, written):
        for one, other in modulo(part.reshape(groups, -1).T.reshape(-1), groups):
            f.units.tie(one, other, FIXED)
    f.units.tie(slots.reshape(groups, -1)[:, 0], written.reshape(groups, -1)[:, 0], FIXED)
    f.bundled.append((f.here, written))
