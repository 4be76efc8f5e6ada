"""Trace a network into a `Graph`: run it, follow its channels, see which can only leave together, and rehearse it.

`follow` ties the entries of all tensors; here the classes it found become groups of units, each with an index into
every tensor that loses entries with them, so that any of them can be removed without tracing again. Then one unit of
every group is cut, and the network runs: where its code cannot do without, the group stays. What cannot be pruned is
listed in `Graph.skipped` with the reason, never guessed at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tpvprune.batches import Progress, device_of, evaluation_mode
from tpvprune.calls import arguments_of
from tpvprune.copies import copied
from tpvprune.errors import InputError, ModelError
from tpvprune.kinds import as_verb
from tpvprune.layers import forget
from tpvprune.multihead import free
from tpvprune.plan import plan_of
from tpvprune.planning.blocks import residual_blocks
from tpvprune.planning.cost import Usage
from tpvprune.planning.follow import follow
from tpvprune.planning.rehearsal import needed_counts, rehearsed
from tpvprune.planning.seen import Limit, Policy
from tpvprune.planning.traced import Traced, tensors_and_buffers
from tpvprune.types import Graph, fingerprint


@as_verb
def trace(
    model: nn.Module,
    example: Any,
    *,
    depth: bool = False,
    bundles: bool = False,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Graph:
    """Find which units can only leave a network together, and what each tensor costs.

    The model is copied; neither it nor its hooks, modes and gradients are touched.

    Args:
        model: any module.
        example: one input batch: a tensor `(batch, ...)`, a tuple of positional or a dict of keyword
            arguments. Multiply-adds are counted per example of it.
        depth: whether residual blocks that can be skipped as a whole are groups too, of kind "block". Takes a few
            forward passes more.
        bundles: whether the units around a grouped convolution are its groups, of kind "bundle", instead of one
            channel of each group. Where its groups cannot leave as a whole, `Graph.skipped` says why, and units are
            channels.
        seconds: to give up after; None for as long as it takes.
        progress: called as `progress("trace", steps_done, steps_to_do)`.

    Raises:
        InputError: `seconds` is not above zero.
        ModelError: the model is quantized, cannot be copied (what holds it up is named) or run on `example`, or not
            traced, or not within `seconds`; the last operation is named.
    """
    if seconds is not None and not seconds > 0:
        raise InputError(f"seconds={seconds} must be above zero, or None for no limit")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is TorchScript, which holds no code to follow and no module that could be cut; "
            "give the module that it was made of"
        )
    limit = None if seconds is None else Limit(seconds)
    twin = copied(model)
    free(twin)
    for name, parameter in twin.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(f"parameter {name!r} is {parameter.dtype}; only floating models can be traced")
    for name, module in twin.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "_weight_bias"):
            raise ModelError(
                f"{name or 'the model'!r} is a quantized {type(module).__name__}, whose weights are packed integers "
                "and cannot be cut; prune the floating model, and quantize what comes of it"
            )
    args, kwargs = arguments_of(example, device_of(model))
    with evaluation_mode(twin), torch.no_grad():
        usage = Usage(twin.requires_grad_(False), args, kwargs)
        policy = Policy(bundles=bundles)
        carried = plan_of(model)
        dense = carried.graph if carried is not None and carried.graph.groups else None
        notify = progress and _Told(progress, len(usage.order))
        while True:
            forget(twin)
            traced = Traced(twin, follow(twin, args, kwargs, policy, notify, limit), usage, policy, dense)
            found = traced.stricter() or rehearsed(
                twin,
                traced.graph(model_id(model)),
                traced.follower,
                args,
                kwargs,
                policy,
                limit,
                doubtful=traced.doubtful,
                torn=traced.torn,
            )
            if replace(found, openings=policy.openings) == policy:
                break
            policy = found
        traced.policy = found
        if traced.doubtful:
            traced.counts = needed_counts(twin, traced.graph(model_id(model)), traced.doubtful, args, kwargs, limit)
        if carried is not None and dense is not None:
            traced.restrict(carried)
        if depth:
            names, held = residual_blocks(twin, args, kwargs)
            traced.add_blocks(names, held)
    return traced.graph(model_id(model))


class _Told:
    """Tells of every module that is reached for the first time."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.seen = progress, total, set[str]()

    def __call__(self, name: str) -> None:
        """Called with the name of a module whose call ends."""
        if name not in self.seen:
            self.seen.add(name)
            self.progress("trace", len(self.seen), self.total)


def model_id(model: nn.Module) -> str:
    """Fingerprint of a model's architecture, see `types.fingerprint`."""
    return fingerprint((name, tuple(tensor.shape)) for name, tensor in tensors_and_buffers(model))
