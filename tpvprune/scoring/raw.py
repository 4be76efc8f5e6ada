"""Modules that read units by parameters of their own: whether their input tells what the units do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.batches import Selector
from tpvprune.errors import UnseenError
from tpvprune.members import Member
from tpvprune.types import Graph

if TYPE_CHECKING:
    from tpvprune.scoring.activations import Tapped

ALIKE = 1e-2  # of the largest: rounding, also in half precision


def raw_readers(model: nn.Module, graph: Graph) -> dict[str, list[str]]:
    """Modules that read units by parameters which are no linear layer's or convolution's weight, with their names."""
    found: dict[str, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for member in (m for group in graph.groups for m in group.of_role("consume")):
        layer = isinstance(modules.get(member.layer), (nn.Linear, _ConvNd))
        known = layer and member.param == f"{member.layer}.weight".removeprefix(".")
        if not known and member.param not in found.setdefault(member.layer, []):
            found[member.layer].append(member.param)
    return found


def check_raw(taps: Tapped, raw: Mapping[str, Sequence[str]], inputs: Tensor, select: Selector) -> None:
    """Whether such modules use what they are given as layers do: times a weight.

    By Euler's theorem a module's input times its gradient is then its weight times the weight's, channel by channel.

    Args:
        taps: they are on.
        raw: from `raw_readers`.
        inputs: `(1, ...)`.
        select: of the outputs.

    Raises:
        UnseenError: one does not.
    """
    named = dict(taps.model.named_parameters())
    weights = {param: named[param] for params in raw.values() for param in params}
    maps, taps.sink.maps, taps.sink.sums, taps.sink.numbers = taps.sink.maps, {}, {}, range(1)
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        output, _ = taps.passed(inputs, select)
        ends = list(output.values()) if isinstance(output, dict) else [output]
        drawn = [torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o) for o in ends]
        found = torch.autograd.grad(ends, [*taps.roots, *weights.values()], drawn, allow_unused=True)
    finally:
        taps.sink.maps = maps
        for weight in weights.values():
            weight.requires_grad_(False)
    slopes = dict(zip(weights, found[len(taps.roots) :], strict=True))
    for group in taps.graph.groups:
        for layer, params in raw.items():
            members = [member for member in group.of_role("consume") if member.param in params]
            wanted = torch.zeros(group.units, dtype=torch.float64)
            for member in members:
                slope = slopes[member.param]
                if slope is not None:
                    wanted += _by_unit(weights[member.param].detach() * slope, member, group.units)
            if members and not _alike(taps.sink.sums.get(f"in:{layer}"), members[0], wanted):
                raise UnseenError(
                    f"{layer or type(taps.model).__name__!r} reads units of {group.id!r} through parameters of its own "
                    f"({', '.join(params)}), and what they do is not seen from its input; score with "
                    "TPV(engine='batched')"
                )


def _by_unit(entries: Tensor, member: Member, units: int) -> Tensor:
    """What a parameter's entries say, summed over those that are each unit's, `(units,)`."""
    along = entries.double().movedim(member.axis, -1).flatten(0, -2).sum(0) if entries.ndim > 1 else entries.double()
    return along.cpu()[member.entries(units).cpu()].sum(1)


def _alike(sums: Tensor | None, member: Member, wanted: Tensor) -> bool:
    """Whether what a tap has summed up, `(1, channels)`, is what the weights say."""
    entries = member.entries(len(wanted)).cpu()
    if sums is None or int(entries.max()) >= sums.shape[1]:
        return not bool(wanted.any())
    seen = sums[0].double().cpu()[entries].sum(1)
    return bool((seen - wanted).abs().max() <= ALIKE * wanted.abs().max())
