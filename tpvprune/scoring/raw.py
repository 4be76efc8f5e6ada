"""Modules that use their parameters in a way of their own: whether what they read, or give, tells what units do."""

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

Raw = Mapping[tuple[str, str], Sequence[str]]
"""By side, "in" or "out", and name of a module: names of parameters."""

ALIKE = 1e-2  # of the largest: rounding, also in half precision


def plain(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer or convolution that does with its weight what PyTorch's do.

    Others, as those that standardise their weight first, are not linear in it.
    """
    if not isinstance(module, (nn.Linear, _ConvNd)) or "forward" in vars(module):
        return False
    kind = type(module)
    ours = next(base for base in kind.__mro__ if base.__module__ in (nn.Linear.__module__, _ConvNd.__module__))
    return all(getattr(kind, name, None) is getattr(ours, name, None) for name in ("forward", "_conv_forward"))


def raw_users(model: nn.Module, graph: Graph, over: str) -> Raw:
    """Modules that read or write units by parameters in a way that is to be looked at, with the parameters' names.

    They are no linear layer's or convolution's weight, or that layer is none of PyTorch's own.

    Args:
        model: any module.
        graph: of the same model.
        over: `consume` or `all`: whether what writes and scales the units counts.
    """
    found: dict[tuple[str, str], list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for member in (m for group in graph.groups for m in group.members):
        module, side = modules.get(member.layer), "in" if member.role == "consume" else "out"
        if side == "in":
            known = plain(module) and member.param == f"{member.layer}.weight".removeprefix(".")
        else:
            written = over == "all" and member.role in ("produce", "affine")
            known = not written or not isinstance(module, (nn.Linear, _ConvNd)) or plain(module)
        if not known and member.param not in found.setdefault((side, member.layer), []):
            found[side, member.layer].append(member.param)
    return found


def check_raw(taps: Tapped, raw: Raw, inputs: Tensor, select: Selector) -> None:
    """Whether such modules use what they are given as layers do: times a weight.

    By Euler's theorem a module's input times its gradient is then its weight times the weight's, channel by channel;
    and its output times its gradient all its parameters times theirs.

    Args:
        taps: they are on.
        raw: from `raw_users`.
        inputs: `(1, ...)`.
        select: of the outputs.

    Raises:
        UnseenError: one does not.
    """
    named = dict(taps.model.named_parameters())
    weights = {param: named[param] for params in raw.values() for param in params}
    maps, taps.sink.maps, taps.sink.sums, taps.sink.numbers = taps.sink.maps, {}, {}, range(1)
    taps.whole = True
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        output, _ = taps.passed(inputs, select)
        ends = list(output.values()) if isinstance(output, dict) else [output]
        drawn = [torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o) for o in ends]
        found = torch.autograd.grad(ends, [*taps.roots, *weights.values()], drawn, allow_unused=True)
    finally:
        taps.sink.maps, taps.whole = maps, False
        for weight in weights.values():
            weight.requires_grad_(False)
    slopes = dict(zip(weights, found[len(taps.roots) :], strict=True))
    for group in taps.graph.groups:
        for (side, layer), params in raw.items():
            roles = ("consume",) if side == "in" else ("produce", "affine")
            members = [member for member in group.of_role(*roles) if member.param in params]
            wanted = torch.zeros(group.units, dtype=torch.float64)
            for member in members:
                slope = slopes[member.param]
                if slope is not None:
                    wanted += _by_unit(weights[member.param].detach() * slope, member, group.units)
            if members and not _alike(taps.sink.sums.get(f"{side}:{layer}"), members[0], wanted):
                does, seen = ("reads", "input") if side == "in" else ("writes", "output")
                raise UnseenError(
                    f"{layer or type(taps.model).__name__!r} {does} units of {group.id!r} through parameters, or in a "
                    f"way, of its own ({', '.join(params)}), and what they do is not seen from its {seen}; score with "
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
