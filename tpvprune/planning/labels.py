"""What is known of a tensor in a running network: which slots lie along its axes, or which parameters it is made of.

Slots are those of `units.Units`. Along every axis of an activation that units lie along there is one vector of slots,
as long as the axis; other axes are of fixed length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tpvprune.planning.units import FREE, STATIC


class Tangled(Exception):
    """Internal: the entries along an axis are no slices of the parameter they come from."""


@dataclass(frozen=True, eq=False)
class Origin:
    """A parameter or buffer that a tensor is made of.

    Attributes:
        name: qualified name.
        shape: of the parameter.
        dims: for each axis of the tensor the dimension of the parameter that lies along it, None for an axis of
            length one or one it is repeated along; only where the tensor is the whole parameter, or `cells` is set.
        cells: for each entry of the tensor the flat entry of the parameter it comes from, -1 for none.
        pooled: whether each entry depends on others, as those of a standardised weight do.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    cells: Tensor | None = None
    pooled: bool = False

    def written_out(self, shape: Sequence[int]) -> Tensor:
        """`cells`, made where they are not there, of the tensor's `shape`."""
        if self.cells is not None:
            return self.cells.expand(tuple(shape))
        count = int(torch.Size(self.shape).numel())
        cells = torch.arange(count).reshape(self.shape)
        kept = [dim for dim in self.dims if dim is not None]
        gone = [dim for dim in range(len(self.shape)) if dim not in kept]  # of length one, or their first entry stands
        cells = cells.permute(*kept, *gone).reshape([self.shape[dim] for dim in kept] + [-1])[..., 0]
        for axis, dim in enumerate(self.dims):
            if dim is None:
                cells = cells.unsqueeze(axis)
        return cells.expand(tuple(shape))

    def along(self, axis: int, shape: Sequence[int]) -> tuple[int, Tensor] | None:
        """The dimension of the parameter that lies along an axis and its entry at each place; None if there is none.

        Raises:
            Tangled: the entries along the axis are no slices of the parameter.
        """
        if self.cells is None:
            dim = self.dims[axis]
            return None if dim is None or self.shape[dim] == 1 else (dim, torch.arange(self.shape[dim]))
        cells = self.cells.expand(tuple(shape)).movedim(axis, 0).reshape(shape[axis], -1)
        if bool((cells == cells[:1]).all()):
            return None
        known = cells >= 0
        stride = 1
        strides: list[int] = []
        for length in reversed(self.shape):
            strides.insert(0, stride)
            stride *= length
        for dim, length in enumerate(self.shape):
            at = (cells // strides[dim]) % length
            first = at.masked_fill(~known, -1).amax(1)
            same = bool(((at == first.unsqueeze(1)) | ~known).all())
            # Rows that have one entry of the dimension are one row, or they are cut across several dimensions.
            rows = cells.amax(1)[first >= 0].unique().numel()
            if length > 1 and same and first[first >= 0].unique().numel() == rows > 1:
                return dim, first
        raise Tangled


@dataclass(frozen=True, eq=False)
class State:
    """What is known of one tensor.

    Attributes:
        axes: vectors of slots by axis, of an activation.
        origins: what a tensor that depends on no input is made of; empty for activations.
        heads: slots of the heads whose attention an activation is the mean of; pinned if that is looked at.
    """

    axes: dict[int, Tensor] = field(default_factory=dict)
    origins: tuple[Origin, ...] = ()
    heads: Tensor | None = None

    def pooled(self) -> State:
        """The same of a tensor whose entries depend on each other."""
        return replace(self, origins=tuple(replace(origin, pooled=True) for origin in self.origins))


PLAIN = State()


def spread(slots: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """A vector of slots as a tensor of `shape` that differs along one axis only; takes no memory."""
    view = [1] * len(shape)
    view[axis] = -1
    return slots.view(view).expand(tuple(shape))


def varying(slots: Tensor) -> list[int]:
    """The axes along which a tensor of slots differs, free ones aside."""
    found = []
    for axis in range(slots.ndim):
        if slots.shape[axis] > 1 and slots.stride(axis) != 0:
            small = slots
            for other in range(slots.ndim):
                if other != axis and slots.stride(other) == 0 and slots.shape[other] > 1:
                    small = small.narrow(other, 0, 1)
            first = small.amax(axis, keepdim=True)
            if bool(((small != first) & (small != FREE)).any()):
                found.append(axis)
    return found


def gathered(slots: Tensor, axis: int, tie: Callable[[Tensor, Tensor], None]) -> Tensor:
    """The vector along one axis of a tensor of slots, all that lies across it tied to it.

    Args:
        slots: differs along any axes.
        axis: the one to keep.
        tie: called with vectors of slots that are to be one class each.
    """
    rows = slots.movedim(axis, 0).reshape(slots.shape[axis], -1)
    first = rows.amax(1)
    differ = (rows != first.unsqueeze(1)) & (rows != FREE)
    if bool(differ.any()):
        tie(first.unsqueeze(1).expand_as(rows)[differ], rows[differ])
    return first


def is_static(slots: Tensor) -> bool:
    """Whether no unit lies along a vector of slots."""
    return not bool((slots > STATIC).any())


def is_free(slots: Tensor) -> bool:
    """Whether slots take whatever length they meet."""
    return bool((slots == FREE).all())
