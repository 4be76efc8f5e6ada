"""Criteria that look at weights alone. Batches are not read.

For a channel or head they look at the weights of all members of its group, or of those that write it; a member's
scores are divided by their mean over the group before members are averaged, as Fang 2023 (arXiv 2301.12900) does, so
that layers of different sizes can be compared. Single weights are scored as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpvprune.batches import Batch, Progress
from tpvprune.errors import ModelError
from tpvprune.members import Group, Role
from tpvprune.scores import Scores
from tpvprune.scoring.blocks import refuse_blocks
from tpvprune.scoring.engine import stream
from tpvprune.types import Graph

logger = logging.getLogger(__name__)


def slices(model: nn.Module, group: Group, *roles: Role) -> Iterator[Tensor]:
    """Weights of each unit in each member that holds weights, `(units, entries)`; biases are left out."""
    parameters = dict(model.named_parameters())
    for member in group.of_role(*roles):
        if member.param not in parameters or member.param.rpartition(".")[2] == "bias":
            continue
        weight = parameters[member.param].detach().double()
        rows = (
            weight.reshape(-1, 1)
            if member.dim is None
            else weight.movedim(member.dim, 0).reshape(weight.shape[member.dim], -1)
        )
        yield rows if member.index is None else rows[member.index.to(rows.device)].flatten(1)


def _averaged(parts: list[Tensor], group: Group) -> Tensor:
    """Members' scores, each divided by its mean unless the units are single weights, averaged."""
    if not parts:
        raise ModelError(f"group {group.id!r} holds no weights of the kind this criterion looks at")
    if group.kind == "weight":
        return parts[0].cpu()
    return torch.stack([part / part.mean().clamp(min=1e-300) for part in parts]).mean(0).cpu()


class FromWeights:
    """What the criteria of this file share."""

    seed: int = 0
    _compares = True  # units by their weights, within a group

    @property
    def label(self) -> str:
        """The criterion in words."""
        return type(self).__name__.lower()

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, progress: Progress | None = None
    ) -> Scores:
        """Score every unit from the weights; the batches are not read."""
        values: dict[str, Tensor] = {}
        if self._compares:
            refuse_blocks(graph, f"criterion {self.label}")
        for number, group in enumerate(graph.groups, 1):
            values[group.id] = self._of(model, group)
            if progress:
                progress("score", number, len(graph.groups))
        return Scores(self._finish(values), None, self.label, 0, 0, self.seed, graph.model_id)

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        raise NotImplementedError

    def _finish(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values


@dataclass(frozen=True)
class Random(FromWeights):
    """Uniform numbers: what any criterion must beat.

    Attributes:
        seed: of the numbers; each group has its own stream.
    """

    seed: int = 0
    _compares = False

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        place = int.from_bytes(group.id.encode(), "little")
        return torch.rand(group.units, dtype=torch.float64, generator=stream(self.seed, place, 0))


@dataclass(frozen=True)
class L1(FromWeights):
    """Sum of absolute weights, over all members (Li 2017, arXiv 1608.08710)."""

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        return _averaged([w.abs().sum(1) for w in slices(model, group, "produce", "affine", "consume")], group)


@dataclass(frozen=True)
class L2(FromWeights):
    """Sum of squared weights, over all members."""

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        return _averaged([w.square().sum(1) for w in slices(model, group, "produce", "affine", "consume")], group)


@dataclass(frozen=True)
class LAMP(FromWeights):
    """Squared weight over the squared weights of its group that are no smaller (Lee 2021, arXiv 2010.07611)."""

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        parts = [w.square().sum(1) for w in slices(model, group, "produce", "affine", "consume")]
        squares = _averaged(parts, group)
        order = squares.argsort(descending=True)
        rest = squares[order].cumsum(0)
        return torch.empty_like(squares).scatter_(0, order, squares[order] / rest.clamp(min=1e-300))


@dataclass(frozen=True)
class FPGM(FromWeights):
    """Sum of distances to the other filters of the layers that write it (He 2019, arXiv 1811.00250)."""

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        _no_weights(group, "fpgm")
        return _averaged([torch.cdist(w, w).sum(1) for w in slices(model, group, "produce")], group)


@dataclass(frozen=True)
class WHC(FromWeights):
    """Norm times the norm-weighted dissimilarity to the layer's other filters (Chen 2023, arXiv 2302.08185)."""

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        _no_weights(group, "whc")
        parts = []
        for w in slices(model, group, "produce"):
            norm = torch.linalg.vector_norm(w, dim=1)
            direction = w / norm.clamp(min=1e-300).unsqueeze(1)
            parts.append(norm * ((1 - (direction @ direction.mT).abs()) @ norm))
        return _averaged(parts, group)


@dataclass(frozen=True)
class BNScale(FromWeights):
    """Absolute scale of the batch norms behind it (Liu 2017, arXiv 1708.06519).

    A group without one gets the largest score of the model, so that it goes last.
    """

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        _no_weights(group, "bnscale")
        scales = []
        for member in group.of_role("affine"):
            module: Any = model.get_submodule(member.layer)
            if isinstance(module, _BatchNorm) and member.param.endswith("weight"):
                rows = module.weight.detach().double().abs()
                scales.append((rows if member.index is None else rows[member.index.to(rows.device)].mean(1)).cpu())
        return torch.stack(scales).mean(0) if scales else torch.full((group.units,), torch.inf, dtype=torch.float64)

    def _finish(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        without = [name for name, value in values.items() if bool(value.isinf().all())]
        if len(without) == len(values):
            raise ModelError("criterion bnscale needs batch norms, and no group of this model has one")
        if without:
            logger.warning("bnscale: %s have no batch norm and go last", ", ".join(without))
        most = max(float(value.max()) for name, value in values.items() if name not in without)
        return {name: torch.full_like(value, most) if name in without else value for name, value in values.items()}


def _no_weights(group: Group, criterion: str) -> None:
    if group.kind == "weight":
        raise ModelError(f"criterion {criterion} compares channels; it does not score single weights ({group.id!r})")
