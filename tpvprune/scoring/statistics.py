"""Criteria from statistics of activations: forward passes without labels, no gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.batches import Batch, Progress, evaluation_mode, model_inputs
from tpvprune.errors import ModelError, NonFiniteError
from tpvprune.members import Group, Member
from tpvprune.patches import channel_axis
from tpvprune.reads import ThroughLayers, read_by
from tpvprune.scores import Scores
from tpvprune.scoring.blocks import refuse_blocks
from tpvprune.scoring.collect import collect
from tpvprune.scoring.engine import Parts
from tpvprune.scoring.gradients import Side, with_sharing
from tpvprune.scoring.layout import Layout, outermost
from tpvprune.scoring.streaming import Observation
from tpvprune.tally import Tally
from tpvprune.types import Graph

UNSEEN = "is not seen; take a criterion of gradients, as TPV(engine='batched'), or of weights alone"


@contextmanager
def _inputs(
    model: nn.Module, users: Iterable[tuple[str, nn.Module]], layout: Layout
) -> Iterator[dict[str, list[Tensor]]]:
    """Moments of inputs of one pass.

    Args:
        model: any module.
        users: layers, and those that share a weight with one under its name.
        layout: told of each layer.

    Yields:
        Per name `(samples, 3, channels)`, of each call: sums of 1, x and x^2 over positions.
    """
    found: dict[str, list[Tensor]] = {}
    handles = []

    def hook(name: str, place: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value, axis = read_by(args, kwargs).detach(), channel_axis(module)
            if layout.met(place, value):
                return
            value = outermost(value, layout.axes.get(place, 0))
            # The spread of channels far from zero is lost in single precision.
            rows = value.movedim(axis, -1).reshape(len(value), -1, value.shape[axis]).double()
            ones = torch.full_like(rows[:, 0], rows.shape[1])
            found.setdefault(name, []).append(torch.stack([ones, rows.sum(1), rows.square().sum(1)], 1))

        return seen

    for number, (name, module) in enumerate(users):
        if isinstance(module, (nn.Linear, _ConvNd)):
            place = f"{number}:{name}"
            handles.append(module.register_forward_pre_hook(hook(name, place), with_kwargs=True))
    through = ThroughLayers(model)
    try:
        with through:
            yield found
        beside = next((name for name, module in users if module in through.beside), None)
        if beside is not None:
            raise ModelError(f"the model uses the weight of {beside!r} without calling it, and what it reads {UNSEEN}")
    finally:
        for handle in handles:
            handle.remove()


class _FromActivations:
    """What the criteria of this file share."""

    probes = 0
    seed = 0

    @property
    def label(self) -> str:
        """The criterion in words."""
        return type(self).__name__.lower()

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, progress: Progress | None = None
    ) -> Scores:
        """Score every unit from what the layers that read it are given."""
        return collect(self, model, batches, graph, progress=progress)

    def observe(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, first: int, progress: Progress | None
    ) -> Iterator[Observation]:
        """One observation a batch: moments of every consumer's input channels."""
        refuse_blocks(graph, f"criterion {self.label}")
        layers = [member.layer for group in graph.groups for member in group.of_role("consume")]
        users, parts = with_sharing(model, dict.fromkeys(layers)), Parts()
        layout = Layout(model)
        for inputs in model_inputs(model, batches, "score", progress):

            def run(part: slice, inputs: Tensor = inputs) -> dict[str, Tensor]:
                batch = len(inputs[part])
                with evaluation_mode(model), torch.no_grad(), _inputs(model, users, layout) as found:
                    layout.begin(inputs[part])
                    model(inputs[part])
                    again = layout.end()
                if again:  # where samples lie is known now
                    return run(part, inputs)
                if not found:
                    raise ModelError("no layer of the graph is used in the forward pass")
                sums = {
                    name: sum(m.reshape(batch, -1, *m.shape[1:]).sum(1) for m in calls) for name, calls in found.items()
                }
                for name, value in sums.items():
                    if not bool(torch.isfinite(value).all()):  # type: ignore[arg-type]
                        raise NonFiniteError.of_layer(name)
                for name, module in users:
                    if name not in sums and isinstance(module, (nn.Linear, _ConvNd)):  # this pass went another way
                        sums[name] = torch.zeros(batch, 3, _width(module), dtype=torch.float64, device=inputs.device)
                return {name: sums[name].flatten(1) for name in sorted(sums)}  # type: ignore[union-attr]

            done = parts(len(inputs), run)
            yield Observation(Tally.of_rows({name: torch.cat([one[name] for one in done]) for name in done[0]}))

    def summarise(self, means: Mapping[str, Tensor], model: nn.Module, graph: Graph) -> dict[str, Tensor]:
        """Scores from the mean moments."""
        moments = {name: value.reshape(3, -1) for name, value in means.items()}
        return {group.id: self._of(model, group, moments) for group in graph.groups}

    def _of(self, model: nn.Module, group: Group, moments: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Variance(_FromActivations):
    """Variance of the activation over samples and positions, mean over the layers that read it (VBP, Berisha 2025)."""

    def _of(self, model: nn.Module, group: Group, moments: Mapping[str, Tensor]) -> Tensor:
        if group.kind == "weight":
            raise ModelError(f"criterion variance scores channels, not single weights ({group.id!r})")
        parts = []
        for member, (count, total, square) in _read(group, moments):
            spread = square / count - (total / count).square()
            entries = _channels(member.entries(group.units), len(spread), model, member.layer)
            parts.append(spread[entries].mean(1))
        return torch.stack(parts).mean(0).clamp(min=0)


@dataclass(frozen=True)
class Wanda(_FromActivations):
    """Absolute weight times the norm of the activation it reads, summed over a unit (Sun 2024, arXiv 2306.11695).

    The norm's square is a sum over positions and a mean over samples: more samples do not make it larger.
    """

    def _of(self, model: nn.Module, group: Group, moments: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(group.units, dtype=torch.float64)
        parameters = dict(model.named_parameters())
        for member, (_, _, square) in _read(group, moments):
            weight = parameters[member.param].detach().double().abs()
            norm = square.sqrt().to(weight.device)
            layer: Any = model.get_submodule(member.layer)
            if getattr(layer, "transposed", False):  # input channels come first
                read = norm.unsqueeze(1)
            else:
                # Output o of a grouped convolution reads the channels of its own group.
                groups = int(getattr(layer, "groups", 1))
                read = norm.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
            effect = weight * read.reshape(*read.shape, *(1,) * (weight.ndim - 2))
            total += Side(group.id, group.units, member, weight.ndim, None, None).fold(effect).cpu()
        return total


def _read(group: Group, moments: Mapping[str, Tensor]) -> Iterator[tuple[Member, Tensor]]:
    """What reads the units, and the moments `(3, channels)` of what it is given."""
    for member in group.of_role("consume"):
        if member.layer not in moments:
            raise ModelError(
                f"{member.param!r} reads units of {group.id!r} outside of a layer, and what it reads {UNSEEN}"
            )
        yield member, moments[member.layer]


def _width(layer: Any) -> int:
    """Channels that a layer reads."""
    return int(getattr(layer, "in_features", 0) or layer.in_channels)


def _channels(entries: Tensor, channels: int, model: nn.Module, layer: str) -> Tensor:
    """Input channels that weight entries read: a grouped convolution's entry stands for one channel of every group."""
    module: Any = model.get_submodule(layer)
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        return entries
    width = channels // groups
    return torch.cat([entries + group * width for group in range(groups)], 1) if int(entries.max()) < width else entries
