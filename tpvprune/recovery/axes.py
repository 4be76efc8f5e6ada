"""Along which axes, besides their channels, outputs of layers hold units that have left: token-mixing layers."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from tpvprune.copies import copied
from tpvprune.patches import channel_axis
from tpvprune.plan import Plan
from tpvprune.reads import ThroughLayers
from tpvprune.recovery.fits import kept_outputs
from tpvprune.recovery.order import SAMPLES, Course

logger = logging.getLogger(__name__)
Shape = tuple[int, ...]


def align(way: Course, goal: Course, teacher: nn.Module, plan: Plan, inputs: Tensor) -> None:
    """Note in `way.cuts` which entries of other axes are left of what layers of the dense model give.

    A layer that runs along tokens gives one row a channel, and so fewer rows once channels have left. Whose they are is
    seen by gradients: what is left along an axis depends on what is left of a parameter and on nothing that is gone of
    it, and what is gone along the axis on nothing that is left. A layer of which that cannot be told is taken out of
    `way.calls`, with a log line, and keeps its weights.

    Args:
        way: of the pruned model.
        goal: of the dense model, over the same layers.
        teacher: the dense model, in eval mode.
        plan: what has left.
        inputs: `(batch, ...)`; the first two samples are looked at.
    """
    apart: dict[str, dict[int, tuple[int, int]]] = {}
    for name in list(way.calls):
        found = _apart(teacher.get_submodule(name), name, way.shapes[name], goal.shapes.get(name, []), plan)
        if found is None:
            _leave(way, name)
        elif found:
            apart[name] = found
    if not apart:
        return
    for name, seen in _seen(teacher, inputs[:SAMPLES], apart, plan).items():
        if len(seen) == len(apart[name]):
            way.cuts[name] = seen
        else:
            _leave(way, name)


def _leave(way: Course, name: str) -> None:
    del way.calls[name]
    logger.info(
        "%s gives another number of rows than in the dense model, nobody knows which: it keeps its weights", name
    )


def _apart(
    layer: nn.Module, name: str, mine: list[Shape], dense: list[Shape], plan: Plan
) -> dict[int, tuple[int, int]] | None:
    """Axes besides the channels whose lengths differ, with both, the dense model's first; None if calls disagree."""
    found = []
    for a, b in zip(mine, dense, strict=False):
        wanted = list(b)
        wanted[channel_axis(layer) % len(b)] = len(kept_outputs(plan, layer, name))
        if len(a) != len(b) or a[channel_axis(layer) % len(a)] != wanted[channel_axis(layer) % len(b)]:
            return None
        found.append({dim: (w, m) for dim, (m, w) in enumerate(zip(a, wanted, strict=True)) if m != w})
    return found[0] if found and all(f == found[0] and 0 not in f for f in found) else None


def _seen(
    teacher: nn.Module, few: Tensor, apart: dict[str, dict[int, tuple[int, int]]], plan: Plan
) -> dict[str, dict[int, Tensor]]:
    """Of each layer and axis the entries that are left, where a parameter tells them."""
    probe = copied(teacher)  # what a pass leaves in a module stays in the copy
    by_kept: dict[tuple[int, ...], list[Tensor]] = {}
    for name, parameter in probe.named_parameters():
        if name in plan.graph.shapes and len(kept := plan.kept_entries(name, 0)) != len(parameter):
            by_kept.setdefault(tuple(kept.tolist()), []).append(parameter)
    outputs: dict[str, list[Tensor]] = {name: [] for name in apart}
    handles = [
        probe.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: outputs[name].append(out))
        for name in apart
    ]
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad(), ThroughLayers(probe):
        probe(few)
    for handle in handles:
        handle.remove()
    found: dict[str, dict[int, Tensor]] = {name: {} for name in apart}
    for name, axes in apart.items():
        for dim, (whole, left) in axes.items():
            told = [_told(out, dim, whole, left, by_kept) for out in outputs[name]]
            if all(told) and len(set(told)) == 1:
                found[name][dim] = torch.tensor(told[0])
    return found


def _told(
    output: Tensor, dim: int, whole: int, left: int, by_kept: dict[tuple[int, ...], list[Tensor]]
) -> tuple[int, ...]:
    """The entries that are left of a parameter on which the same entries of a tensor depend, and no others do.

    Empty where no parameter tells.
    """
    if not output.requires_grad:
        return ()
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    for entries, found in by_kept.items():
        parameters = [p for p in found if len(p) == whole]
        if len(entries) != left or not parameters:
            continue
        there = torch.zeros(whole, dtype=torch.bool, device=output.device)
        there[list(entries)] = True
        along = there.reshape(-1, *[1] * (output.ndim - dim - 1))
        # What is gone is asked too: units that leave are often dead ones, on which nothing depends anyway.
        left_to, gone_to = (
            torch.autograd.grad(output, parameters, drawn * side, retain_graph=True, allow_unused=True)
            for side in (along, ~along)
        )
        for mine, others in zip(left_to, gone_to, strict=True):
            if mine is not None and others is not None:
                moved, moved_too = (slope.reshape(whole, -1).any(1) for slope in (mine, others))
                if bool(moved.any()) and not bool(moved[~there].any() or moved_too[there].any()):
                    return entries
    return ()
