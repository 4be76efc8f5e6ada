"""What a group of units holds of which tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tpvprune.errors import PlanError

Role = Literal["produce", "affine", "consume", "stat", "work", "inside"]
Kind = Literal["channel", "head", "bundle", "weight", "block"]
ROLES: tuple[str, ...] = ("produce", "affine", "consume", "stat", "work", "inside")
KINDS: tuple[str, ...] = ("channel", "head", "bundle", "weight", "block")
WORK = "#"  # marks a tensor that costs multiply-adds and holds no parameter, as the two products of attention


@dataclass(frozen=True, eq=False)
class Member:
    """One side of one tensor that loses entries when units of a group leave.

    Attributes:
        param: qualified name of a parameter or buffer, or of a `#` work tensor.
        dim: the dimension of that tensor the units lie along; None for the flattened tensor, whose entries are
            masked and never cut, and for the tensors of a block, which leave whole.
        index: entries of `dim` that belong to each unit, `(units, entries)`; None is the identity.
        role: `produce` writes the channels, `affine` scales them in place (norms, depthwise convolutions),
            `consume` reads them, `stat` is a buffer, `work` only costs multiply-adds, `inside` is a parameter that
            leaves with its block.
    """

    param: str
    dim: int | None
    index: Tensor | None
    role: Role

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PlanError(f"member {self.param!r} has role {self.role!r}; known roles are {', '.join(ROLES)}")
        if self.index is not None and (self.index.ndim != 2 or self.index.dtype != torch.int64):
            raise PlanError(f"member {self.param!r} needs an int64 index of shape (units, entries)")

    @property
    def layer(self) -> str:
        """Qualified name of the module that owns the tensor."""
        return self.param.split(WORK)[0] if WORK in self.param else self.param.rpartition(".")[0]

    @property
    def axis(self) -> int:
        """`dim` of a tensor that units are cut from.

        Raises:
            PlanError: the units are single weights.
        """
        if self.dim is None:
            raise PlanError(f"the units of {self.param!r} are single weights, which are masked and not cut")
        return self.dim

    def entries(self, units: int) -> Tensor:
        """The index written out, `(units, entries)`."""
        return torch.arange(units).unsqueeze(1) if self.index is None else self.index

    def width(self) -> int:
        """Entries each unit holds along `dim`."""
        return 1 if self.index is None else self.index.shape[1]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; `from_json` is its inverse."""
        return {"param": self.param, "dim": self.dim, "role": self.role, "index": _pack_index(self.index)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Member:
        """Rebuild a member from `to_json`."""
        return cls(data["param"], _dim(data["dim"]), _unpack_index(data["index"]), data["role"])


@dataclass(frozen=True)
class Opening:
    """A size that a module's code writes out in a call of `reshape` or `view` and that a cut model leaves open.

    Or a number that the code makes of a width and that a cut model keeps as it was.

    Attributes:
        method: name of the method, of the module's class, that the call stands in, or of a function that methods call.
        call: its text; of a number, that of the operation, as `x * width ** -0.5`.
        size: which of its sizes is open: -1, if `given` does not tell it; or which operand is the number.
        given: a size and the axis of the tensor, that is reshaped, whose length is written there; None if there is
            no -1 in the call.
        number: that stands there; None of a size.
    """

    method: str
    call: str
    size: int
    given: tuple[int, int] | None = None
    number: float | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can only leave the network together with all their members.

    Attributes:
        id: name of the layer (or attention block) whose outputs the units are; stable under pruning.
        kind: what a unit is. A `bundle` is a group of a grouped convolution. A `block` is one unit: a residual
            block, of that name, that can be skipped.
        units: how many there are.
        members: every tensor side that holds entries of the units.
        exact_mask: whether zeroing the consumers equals removing the unit. False where a normaliser
            pools over the units (layer norm, group norm).
        signature: equal for groups of the same structure.
    """

    id: str
    kind: Kind
    units: int
    members: tuple[Member, ...]
    exact_mask: bool
    signature: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"group {self.id!r} has kind {self.kind!r}; known kinds are {', '.join(KINDS)}")
        if self.units < 1:
            raise PlanError(f"group {self.id!r} has no units")
        for member in self.members:
            if member.index is not None and member.index.shape[0] != self.units:
                raise PlanError(
                    f"group {self.id!r}: index of {member.param!r} speaks of {member.index.shape[0]} units, "
                    f"the group has {self.units}"
                )

    def __repr__(self) -> str:
        return f"Group({self.id!r}, {self.kind}, {self.units:,} units, {len(self.members):,} members)"

    def of_role(self, *roles: Role) -> tuple[Member, ...]:
        """The members of these roles, in order."""
        return tuple(m for m in self.members if m.role in roles)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules that any member belongs to, in order, without repeats."""
        return tuple(dict.fromkeys(m.layer for m in self.members))


def _pack_index(index: Tensor | None) -> Any:
    """None, `{"start", "shape"}` for a plain run, or `{"list", "shape"}`."""
    if index is None:
        return None
    flat = index.flatten()
    if torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + flat.numel())):
        return {"start": int(flat[0]), "shape": list(index.shape)}
    return {"list": flat.tolist(), "shape": list(index.shape)}


def _dim(written: Any) -> int | None:
    return None if written is None else whole(written)


def _unpack_index(packed: Any) -> Tensor | None:
    if packed is None:
        return None
    shape = tuple(map(whole, packed["shape"]))
    if "start" in packed:
        start = whole(packed["start"])
        return torch.arange(start, start + math.prod(shape)).reshape(shape)
    return torch.tensor([whole(entry) for entry in packed["list"]], dtype=torch.int64).reshape(shape)


def whole(number: Any) -> int:
    """A whole number from a file, as it is.

    Raises:
        TypeError: it is none, or below zero.
    """
    if type(number) is not int or number < 0:
        raise TypeError(f"{number!r} is no whole number")
    return number
