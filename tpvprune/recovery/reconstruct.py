"""Closed-form recovery: refit what is left of each layer to what the dense layer gave.

For every layer that reads pruned units or has masked weights, in execution order, the kept weights and the
bias solve a ridge regression: on the pruned network's own inputs (the layers before already refitted), come as
close as possible to the dense layer's outputs on the same unlabeled images. Reconstruction by least squares:
He 2017 (arXiv 1707.06168), Luo 2017 (arXiv 1707.06342); sequential and shrunk toward the kept weights
as in section 5 of the design.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpvprune.batches import Batch, Progress, evaluation_mode, model_inputs
from tpvprune.errors import InputError, PlanError
from tpvprune.patches import patches
from tpvprune.plan import Plan, plan_of
from tpvprune.recovery.lockstep import strands
from tpvprune.recovery.masks import solve_free

logger = logging.getLogger(__name__)
MOST_STRANDS = 16
REFITTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Reconstruct:
    """Settings of the closed form.

    Attributes:
        ridge: pull toward the kept weights, as a share of the mean input variance of the layer.
    """

    ridge: float = 1e-2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise InputError(f"ridge={self.ridge} must be zero or more")


def reconstruct(
    model: nn.Module,
    batches: Iterable[Batch],
    teacher: nn.Module,
    settings: Reconstruct | None = None,
    *,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of a pruned model with its consumer layers refitted to the dense one's outputs.

    Behind a skipped block every layer is refitted: what it reads has changed, whatever units it has left.

    Costs one forward pass of each network over the batches, plus Gram matrices and solves. The
    activations of all batches at the current layer are held in memory. Masked weights stay zero: each output is
    refitted over the weights that are left to it.

    Args:
        model: from `apply`; carries its plan.
        batches: unlabeled; labels are not looked at.
        teacher: the dense model the plan was made for.
        settings: how strongly to shrink.
        progress: called as `progress("reconstruct", layers_done, layers_to_do)`.

    Raises:
        PlanError: the model carries no plan, or the teacher is another model.
    """
    settings = settings or Reconstruct()
    plan = plan_of(model)
    if plan is None:
        raise PlanError("reconstruct needs a model that apply() made: this one carries no plan")
    dense = {name: tuple(p.shape) for name, p in teacher.named_parameters()}
    wrong = next((n for n in plan.graph.parameters if dense.get(n) != plan.graph.shapes[n]), None)
    if wrong is not None:
        raise PlanError(f"the teacher is not the dense original: {wrong!r} is {dense.get(wrong)} there")
    inputs = _merged(list(model_inputs(model, batches, "reconstruct", None)))
    small, masks = copy.deepcopy(model), plan.weight_masks()
    with evaluation_mode(small, teacher):
        layers, followers = _order(small, inputs[0], _consumers(small, plan), _skipped(plan))
        with (
            strands(small, inputs, layers, "input") as students,
            strands(teacher, inputs, layers, "output") as masters,
        ):
            for done in range(len(layers)):
                names = {s.advance() for s in students} | {m.advance() for m in masters}
                if len(names) != 1 or None in names:
                    raise PlanError(f"batches take different paths through the model, at {sorted(map(str, names))}")
                name = next(str(n) for n in names)
                rows = plan.kept_entries(f"{name}.weight", 0).to(inputs[0].device)
                pairs = [(s.value, m.value) for s, m in zip(students, masters, strict=True)]
                _refit(small, name, followers.get(name), pairs, rows, settings.ridge, masks.get(f"{name}.weight"))
                if progress:
                    progress("reconstruct", done + 1, len(layers))
    return small


def _merged(inputs: list[Tensor]) -> list[Tensor]:
    """The same samples in at most `MOST_STRANDS` batches: each takes a thread per network."""
    if len(inputs) <= MOST_STRANDS or len({(t.shape[1:], t.dtype) for t in inputs}) > 1:
        return inputs
    size = math.ceil(len(inputs) / MOST_STRANDS)
    return [torch.cat(inputs[i : i + size]) for i in range(0, len(inputs), size)]


def _consumers(model: nn.Module, plan: Plan) -> list[str]:
    """Layers that lack inputs or weights, but no bias, and whose refit is linear least squares."""
    pruned = [plan.graph[name] for name, keep in plan.keep.items() if not bool(keep.all())]
    gone = plan.graph.vanished(plan.keep)
    names = dict.fromkeys(m.layer for group in pruned for m in group.of_role("consume") if m.param not in gone)
    masked = [name for name, mask in plan.weights.items() if not bool(mask.all())]
    names |= dict.fromkeys(name.removesuffix(".weight") for name in masked if name.endswith(".weight"))
    held = {name.removesuffix(".bias") for name in masked if name.endswith(".bias")}  # as in a block held at zero
    return [n for n in names if n not in held and isinstance(model.get_submodule(n), REFITTED)]


def _skipped(plan: Plan) -> list[str]:
    """Blocks in whose place an identity stands."""
    return [name for name, keep in plan.keep.items() if plan.graph[name].kind == "block" and not bool(keep.any())]


@torch.no_grad()
def _order(model: nn.Module, inputs: Tensor, layers: list[str], skipped: list[str]) -> tuple[list[str], dict[str, str]]:
    """The layers, and all behind skipped blocks, in execution order, and for each the batch norm that reads it."""
    behind = False
    calls: dict[str, int] = {}
    made: dict[int, tuple[str, Tensor, int]] = {}
    followers: dict[str, str] = {}
    handles = []

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal behind
            behind |= name in skipped
            if name not in layers and (name in skipped or not behind):
                return
            calls[name] = calls.get(name, 0) + 1
            made[id(output)] = (name, output, output._version)

        return hook

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            source = made.get(id(args[0])) if args else None
            if source is not None and source[2] == args[0]._version:  # no in-place activation came between
                followers[source[0]] = name

        return hook

    for name, module in model.named_modules():
        if name in layers or name in skipped or (skipped and isinstance(module, REFITTED)):
            handles.append(module.register_forward_hook(after(name)))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before(name)))
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, count in calls.items():
        if count > 1:
            logger.info("%s runs %d times in one pass and keeps its weights", name, count)
    return [name for name, count in calls.items() if count == 1], followers


class _Normal:
    """Normal equations of one layer, summed in float64 over batches.

    `x` is `(groups, rows, inputs)`, the residual `d` `(groups, rows, outputs)`.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.xx = self.xd = self.x = self.d = torch.zeros(())
        self.dd = 0.0

    def add(self, x: Tensor, d: Tensor) -> None:
        x, d = (t if t.dtype == torch.float64 else t.float() for t in (x, d))  # half precision would overflow
        self.rows += x.shape[1]
        self.xx = self.xx + (x.mT @ x).double()
        self.xd = self.xd + (x.mT @ d).double()
        self.x, self.d = self.x + x.sum(1).double(), self.d + d.sum(1).double()
        self.dd += float(d.double().square().sum())

    def solve(self, ridge: float, biased: bool, free: Tensor | None) -> tuple[Tensor, Tensor]:
        """Change of the weights `(groups, outputs, inputs)` and of the bias `(groups, outputs)`.

        Args:
            ridge: share of the mean input variance.
            biased: whether there is a bias to move.
            free: which weights may change, shaped as they are; None for all.
        """
        xx, xd = self.xx / self.rows, self.xd / self.rows
        x, d = self.x / self.rows, self.d / self.rows
        if biased:
            xx, xd = xx - x.unsqueeze(2) * x.unsqueeze(1), xd - x.unsqueeze(2) * d.unsqueeze(1)
        width = xx.shape[-1]
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
        eye = torch.eye(width, dtype=xx.dtype, device=xx.device)
        # The floor keeps the factorisation safe where inputs are dead or fewer than the weights.
        damped = xx + (max(ridge, 1e-8) * scale).reshape(-1, 1, 1) * eye
        if free is None:
            change = torch.cholesky_solve(xd, torch.linalg.cholesky(damped))
        else:
            change = solve_free(damped, xd, free.to(xd.device).mT)
        bias = d - (x.unsqueeze(1) @ change).squeeze(1) if biased else torch.zeros_like(d)
        return change.mT, bias


@torch.no_grad()
def _refit(
    model: nn.Module,
    name: str,
    follower: str | None,
    pairs: list[tuple[Tensor | None, Tensor | None]],
    rows: Tensor,
    ridge: float,
    mask: Tensor | None,
) -> None:
    """Refit one layer in place from (its input in the pruned network, the dense layer's output)."""
    layer: Any = model.get_submodule(name)
    norm = model.get_submodule(follower) if follower is not None else None
    normal, groups = _Normal(), int(getattr(layer, "groups", 1))
    for value, target in pairs:
        assert value is not None
        assert target is not None
        residual = _rows_of_output(layer, target, rows) - _rows_of_output(layer, layer.forward(value), None)
        columns = patches(layer, value)
        rows_read = columns.permute(1, 0, 3, 2).reshape(groups, -1, columns.shape[2])
        if rows_read.shape[1] != residual.shape[0]:
            logger.info("%s pads in a way of its own and keeps its weights", name)
            return
        normal.add(rows_read, residual.reshape(residual.shape[0], groups, -1).transpose(0, 1))
    biased = layer.bias is not None or norm is not None
    whole = mask is None or bool(mask.all())
    free = None if mask is None or whole else mask.reshape(groups, -1, normal.x.shape[1])
    change, shift = normal.solve(ridge, biased, free)
    weight: Tensor = layer.weight
    weight += change.reshape(weight.shape).to(weight.dtype)
    if layer.bias is not None:
        layer.bias += shift.flatten().to(layer.bias.dtype)
    elif norm is not None:
        norm.running_mean -= shift.flatten().to(weight.dtype)  # type: ignore[operator]


def _rows_of_output(layer: nn.Module, output: Tensor, keep: Tensor | None) -> Tensor:
    """`(rows, outputs)`: one row a position and sample, with only the outputs in `keep`."""
    if isinstance(layer, nn.Linear):
        flat = output.reshape(-1, output.shape[-1])
        return flat if keep is None else flat[:, keep]
    if keep is not None:
        output = output[:, keep]
    return output.flatten(2).transpose(1, 2).reshape(-1, output.shape[1])
