"""One layer of a pruned model and the regression that its kept weights and its bias come out of."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tpvprune.batches import device_of
from tpvprune.errors import NonFiniteError, PlanError
from tpvprune.patches import channel_axis, patches, some_of
from tpvprune.plan import Plan, plan_of
from tpvprune.recovery.linear import TRANSPOSED, given, grouped, holders, width
from tpvprune.recovery.normal import Normal, chosen_ridge
from tpvprune.recovery.order import Course

logger = logging.getLogger(__name__)
TOLD = 8  # names in a log line
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
COLUMNS = 1 << 23  # numbers of unfolded inputs that are looked at together
LEAST_SCALE = 1e-3  # of a norm's largest: what is scaled down further makes up for nothing


def fitting_plan(model: nn.Module, teacher: nn.Module, verb: str) -> Plan:
    """The plan that a model carries.

    Raises:
        PlanError: it carries none, or the teacher is not the model that the plan is of.
    """
    plan = plan_of(model)
    if plan is None:
        raise PlanError(f"{verb} needs a model that apply() made: this one carries no plan")
    dense = {name: tuple(p.shape) for name, p in teacher.named_parameters()}
    wrong = next((n for n in plan.graph.parameters if dense.get(n) != plan.graph.shapes[n]), None)
    if wrong is not None:
        raise PlanError(
            f"the teacher is not the dense original: {wrong!r} is {dense.get(wrong)} there, and by the plan that the "
            f"model carries it was {plan.graph.shapes[wrong]}; give the model that was pruned first"
        )
    return plan


def consumers(plan: Plan, able: Collection[str]) -> list[str]:
    """Those of the layers in `able` that lack inputs or weights, but no bias."""
    return [name for name in _lacking(plan) if name in able]


def say_left(plan: Plan, way: Course, verb: str) -> None:
    """Log which modules lack inputs or weights and keep what they have."""
    left = [repr(name) if name else "the model itself" for name in _lacking(plan) if name not in way.calls]
    if left:
        more = f" and {len(left) - TOLD} more" if len(left) > TOLD else ""
        logger.warning(
            "%s: %s%s read less than before and keep their weights: only linear layers and convolutions that are "
            "called as layers, give what torch's own would and share their weight with no other are refitted",
            verb,
            ", ".join(left[:TOLD]),
            more,
        )


def _lacking(plan: Plan) -> list[str]:
    """Names of modules with weights that lack inputs or entries, but no bias."""
    pruned = [plan.graph[name] for name, keep in plan.keep.items() if not bool(keep.all())]
    gone = plan.graph.vanished(plan.keep)
    params = dict.fromkeys(m.param for group in pruned for m in group.of_role("consume") if m.param not in gone)
    masked = [name for name, mask in plan.weights.items() if not bool(mask.all())]
    params |= dict.fromkeys(name for name in masked if len(plan.graph.shapes[name]) > 1)
    held = {name.removesuffix(".bias") for name in masked if name.endswith(".bias")}  # as in a block held at zero
    return [n for n in dict.fromkeys(name.rpartition(".")[0] for name in params) if n not in held]


def kept_outputs(plan: Plan, layer: nn.Module, name: str) -> Tensor:
    """Entries of a dense layer's output channels that the pruned layer gives, `(channels,)`.

    Args:
        plan: what has left.
        layer: of the dense or of the pruned model.
        name: the layer's.
    """
    if not isinstance(layer, _ConvTransposeNd):
        return plan.kept_entries(f"{name}.weight", 0)
    return plan.kept_entries(f"{name}.weight", 1) if layer.groups == 1 else torch.arange(layer.out_channels)


def kept_inputs(plan: Plan, layer: nn.Module, name: str) -> Tensor:
    """Entries of a dense layer's input channels that the pruned layer reads, `(channels,)`.

    Args:
        plan: what has left.
        layer: of the dense model.
        name: the layer's.
    """
    param = f"{name}.weight"
    if isinstance(layer, _ConvTransposeNd):
        return plan.kept_entries(param, 0)
    own = plan.kept_entries(param, 1)
    groups = int(getattr(layer, "groups", 1))
    if groups == 1:
        return own
    outputs, width = plan.graph.shapes[param][:2]
    left = (plan.kept_entries(param, 0) // (outputs // groups)).unique()
    return (left.unsqueeze(1) * width + own).flatten()


class Fit:
    """The regression of one layer, gathered part by part.

    Args:
        model: the pruned model; its layer changes in `finish` alone.
        teacher: the dense model.
        name: the layer's.
        way: of the pruned model.
        plan: what the model lacks.
        halves: whether samples are dealt out to two halves, so that a ridge can be chosen.
        positions: at most so many of a sample's positions are fitted to, the same ones of each.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        name: str,
        way: Course,
        plan: Plan,
        halves: bool,
        positions: int = 1 << 62,
    ) -> None:
        self.name = name
        self.layer: Any = model.get_submodule(name)
        self.norm: Any = model.get_submodule(way.norms[name]) if name in way.norms else None
        bias: Any = self.layer.bias
        self._bias: Tensor | None = bias if holders(model)[id(bias)] == 1 else None  # one that others add too stays
        device = device_of(model)
        self._left = {dim: kept.to(device) for dim, kept in way.cuts.get(name, {}).items()}
        self._rows = kept_outputs(plan, self.layer, name).to(device)
        summed = way.sums[name].norm if name in way.sums else None
        self._summed: Any = None if summed is None else model.get_submodule(summed)
        dense_norm = None if self.norm is None else teacher.get_submodule(way.norms[name])
        self._undone = None if dense_norm is None else _undone(self.norm, dense_norm, self._rows)
        mask = plan.weight_masks().get(f"{name}.weight")
        self._mask = None if mask is None or bool(mask.all()) else mask
        self._groups = int(getattr(self.layer, "groups", 1))
        self._halves = tuple(Normal() for _ in range(1 + halves))
        self._positions = positions

    def cut(self, target: Tensor) -> Tensor:
        """What is left of a tensor that is shaped as the dense layer's outputs are."""
        target = target.index_select(channel_axis(self.layer) % target.ndim, self._rows)
        return self.other_axes(target)

    def other_axes(self, value: Tensor) -> Tensor:
        """What is left of a dense layer's inputs or outputs along all axes but that of its channels."""
        for dim, kept in self._left.items():
            value = value.index_select(dim, kept)
        return value

    @torch.no_grad()
    def add(self, value: Tensor, target: Tensor, samples: int, first: int, lacks: Tensor | None = None) -> None:
        """Take samples in.

        Args:
            value: what the pruned layer reads, `(batch, ...)`.
            target: what the dense layer gives, `(batch, ...)`, all of its outputs.
            samples: how many there are; each may have several places in the batch, one after the other.
            first: number of the first sample among all.
            lacks: what the layer's outputs are to give on top, shaped as they are.
        """
        value, target = self._read(value), self._wanted(target)
        for half, chosen in self._parts(value, target, samples, first):
            part = value[chosen]
            residual = target[chosen] - given(self.layer, part, tuple(target.shape[2:]))
            if lacks is not None:
                residual = residual + lacks[chosen]
            flat = self._flat(residual)
            columns = patches(self.layer, part, tuple(target.shape[2:]))
            some = some_of(columns.shape[3], self._positions)
            flat = flat.unflatten(0, columns.shape[::3])[:, some].flatten(0, 1)
            columns = columns[..., some]
            read = columns.permute(1, 0, 3, 2).reshape(self._groups, -1, columns.shape[2])
            half.add(read, flat.reshape(len(flat), self._groups, -1).transpose(0, 1))

    @torch.no_grad()
    def mean_lost(self, value: Tensor, target: Tensor) -> Tensor:
        """Mean over samples and positions of what the layer does not give of a target, `(outputs,)` in float64.

        Args:
            value: what the pruned layer reads, `(batch, ...)`; only its mean over the batch matters.
            target: what the dense layer gives, `(batch, ...)`, all of its outputs.
        """
        value, target = self._read(value), self._wanted(target)
        size = tuple(target.shape[2:])
        middle = value.double().mean(0, keepdim=True).to(value.dtype)
        return self._flat(target).double().mean(0) - self._flat(given(self.layer, middle, size)).double().mean(0)

    @torch.no_grad()
    def finish(self, ridge: float | Literal["auto"]) -> float:
        """Write the refitted weights and bias into the layer; the ridge that was taken.

        Raises:
            NonFiniteError: the layer, or the dense one, is given NaN or infinity.
        """
        total = self._halves[0] if len(self._halves) == 1 else self._halves[0] + self._halves[1]
        biased = self._bias is not None or self.norm is not None
        free = None if self._mask is None else grouped(self.layer, self._mask)
        try:
            taken = chosen_ridge(self._halves, RIDGES, biased, free) if ridge == "auto" else float(ridge)
            change, shift = total.solve(taken, biased, free)
        except ArithmeticError:
            raise NonFiniteError.of_layer(self.name) from None
        weight: Tensor = self.layer.weight
        weight += self._ungrouped(change).to(weight.dtype)
        self.move(shift.flatten())
        return taken

    @torch.no_grad()
    def move(self, shift: Tensor) -> bool:
        """Add `shift`, `(outputs,)`, to what the layer gives; False without a bias or norm of its own to add it to.

        Raises:
            NonFiniteError: the shift holds NaN or infinity, as what it is the mean of.
        """
        if not bool(shift.isfinite().all()):
            raise NonFiniteError.of_layer(self.name)
        if self._bias is not None:
            self._bias += shift.to(self._bias.dtype)
        elif self.norm is not None:
            self.norm.running_mean -= shift.to(self.norm.running_mean.dtype)
        return self._bias is not None or self.norm is not None

    def before_norm(self, difference: Tensor) -> Tensor:
        """What the layer has to give for a difference `(batch, ...)` in a sum, behind the norm before it, if any."""
        if self._summed is None:
            return difference
        gain = _gain(self._summed.running_var, self._summed)
        usable = _usable(gain)
        factor = torch.where(usable, 1 / gain.masked_fill(~usable, 1), 0)
        return difference * factor.reshape(-1, *[1] * (difference.ndim - 2))

    def _read(self, value: Tensor) -> Tensor:
        """As the layer takes it outside of an autocast that may be in the model's own code."""
        return value.to(self.layer.weight.dtype)

    def _wanted(self, target: Tensor) -> Tensor:
        """What the layer is to give where the dense layer gives `target`, so that the norm behind it gives the same."""
        target = self.cut(target)
        if self._undone is None:
            return target
        scale, offset = (t.to(target.dtype).reshape(-1, *[1] * (target.ndim - 2)) for t in self._undone)
        return target * scale + offset

    def _ungrouped(self, change: Tensor) -> Tensor:
        """Of `(groups, outputs, inputs)`, shaped as the weights are."""
        shape = self.layer.weight.shape
        if isinstance(self.layer, TRANSPOSED):
            change = change.reshape(self._groups, shape[1], -1, *shape[2:]).transpose(1, 2)
        return change.reshape(shape)

    def _parts(self, value: Tensor, target: Tensor, samples: int, first: int) -> Iterator[tuple[Normal, Tensor]]:
        """The places in a batch that belong together, and the half that they go to."""
        place = torch.arange(len(value), device=value.device)
        number = first + place * samples // len(value)
        positions = target[0].numel() // target.shape[channel_axis(self.layer)]
        reads = positions * self._groups * width(self.layer)
        for which, half in enumerate(self._halves):
            mine = place if len(self._halves) == 1 else place[number % 2 == which]
            for chosen in mine.split(max(1, COLUMNS // max(1, reads))):
                if len(chosen):
                    yield half, chosen

    def _flat(self, output: Tensor) -> Tensor:
        """`(rows, outputs)`: one row a position and sample."""
        if isinstance(self.layer, nn.Linear):
            return output.reshape(-1, output.shape[-1])
        return output.flatten(2).transpose(1, 2).reshape(-1, output.shape[1])


def _gain(variance: Tensor, norm: Any) -> Tensor:
    """By what a batch norm of this variance multiplies each channel, `(channels,)`."""
    gain = (variance + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight


def _usable(gain: Tensor) -> Tensor:
    """Which channels a norm does not scale to next to nothing."""
    size = gain.abs()
    return size > LEAST_SCALE * size.max()


def _undone(mine: Any, dense: Any, rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """What two norms differ by, as a scale and an offset, `(channels,)` in float64, of what the dense one reads.

    A refit hands the shift of a layer without a bias to the norm behind it, and training and new statistics move norms
    too: what a layer gives is right if its norm makes of it what the dense norm makes of the dense output.

    Args:
        mine: the pruned model's norm.
        dense: the dense model's.
        rows: the dense channels that are left.

    Returns:
        None where the norms are the same.
    """
    gain = _gain(mine.running_var.double(), mine)
    wanted = _gain(dense.running_var.double(), dense)[rows]
    usable = _usable(gain)
    gain, wanted = gain.masked_fill(~usable, 1), wanted.masked_fill(~usable, 1)
    scale = wanted / gain
    offset = mine.running_mean.double() - scale * dense.running_mean.double()[rows]
    if mine.bias is not None:
        offset = offset + (dense.bias[rows] - mine.bias).masked_fill(~usable, 0) / gain
    return None if bool((scale == 1).all() and (offset == 0).all()) else (scale, offset)
