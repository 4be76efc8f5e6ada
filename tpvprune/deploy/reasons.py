"""Why milliseconds did not fall as much as multiply-adds did: what is looked at, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.batches import device_of
from tpvprune.calls import Arguments
from tpvprune.held import held_in
from tpvprune.planning.cost import Usage
from tpvprune.timing import Clock, milliseconds_inside

BLOCK = 8  # kernels work in blocks of 8 channels or more
FEW = 0.02  # a share of the multiply-adds that nothing is expected of
SHORT = 0.5  # less of the time than this share of what left in multiply-adds is worth a word
ODD, LIGHT, CROWDED = 0.1, 0.4, 1.5  # from where on a cause is named


@dataclass(frozen=True)
class Case:
    """One runtime and batch size: (first quartile, median, third quartile) milliseconds of both models."""

    runtime: str
    batch: int
    dense: tuple[float, float, float]
    pruned: tuple[float, float, float]

    @property
    def saved(self) -> float:
        """Share of the dense model's time that is saved; below zero where the pruned model is slower."""
        return 1 - self.pruned[1] / self.dense[1]

    @property
    def apart(self) -> bool:
        """Whether the middle halves of both models' times lie apart."""
        return self.pruned[2] < self.dense[0] or self.dense[2] < self.pruned[0]


@dataclass(frozen=True)
class Causes:
    """What can keep a model with fewer multiply-adds from being faster.

    Attributes:
        odd: share of the pruned model's multiply-adds in layers that have lost their width in multiples of 8.
        odd_layers: names of those layers.
        light: per batch size, share of the pruned model's eager time outside of convolutions and linear layers.
        layers: how many layers are called in one pass.
        zeros: weights that the plan holds at zero.
    """

    odd: float = 0.0
    odd_layers: tuple[str, ...] = ()
    light: Mapping[int, float] = field(default_factory=dict)
    layers: int = 0
    zeros: int = 0


def is_product(module: nn.Module) -> bool:
    """Whether a layer's time goes into multiplying; a depthwise convolution's goes into reading and writing."""
    if isinstance(module, _ConvNd):
        return module.groups == 1 or module.in_channels // module.groups > 1
    return isinstance(module, nn.Linear)


def causes_of(
    pruned: nn.Module,
    dense: nn.Module,
    usage: Usage,
    batches: Mapping[int, Arguments],
    *,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> Causes:
    """Look at widths, at where the pruned model's time goes, and at its zeros.

    Args:
        pruned: in eval mode.
        dense: what it was.
        usage: of the pruned model.
        batches: arguments by batch size.
        rounds: timed passes.
        clock: what tells the time.
    """
    leaves = {name: m for name, m in pruned.named_modules() if not any(m.children()) and name in usage.order}
    before = dict(dense.named_modules())
    odd: list[str] = []
    multiplied = 0
    for name, module in leaves.items():
        if name in before and any(now % BLOCK and not then % BLOCK for now, then in _widths(module, before[name])):
            odd.append(name)
            multiplied += usage.spent.get(name, 0)
    light = {}
    for batch, (positional, by_name) in batches.items():
        run = partial(pruned, *positional, **by_name)
        times = milliseconds_inside({"": pruned, **leaves}, run, device_of(pruned), rounds=rounds, clock=clock)
        products = sum(ms for name, ms in times.items() if name and is_product(leaves[name]))
        total = sum(times.values())
        light[batch] = 1 - products / total if total > 0 else 0.0
    return Causes(
        odd=multiplied / usage.total if usage.total else 0.0,
        odd_layers=tuple(odd),
        light=light,
        layers=len(leaves),
        zeros=sum(int(zero.sum()) for _, zero in held_in(pruned)),
    )


def _widths(module: nn.Module, before: nn.Module) -> list[tuple[int, int]]:
    """Widths of a layer that multiplies, each with what it was."""
    if isinstance(module, nn.Linear) and isinstance(before, nn.Linear):
        return [(module.in_features, before.in_features), (module.out_features, before.out_features)]
    if isinstance(module, _ConvNd) and isinstance(before, _ConvNd):
        return [(module.in_channels, before.in_channels), (module.out_channels, before.out_channels)]
    return []


def findings_of(cases: Sequence[Case], dense_macs: int, pruned_macs: int, causes: Causes) -> tuple[str, ...]:
    """Say where milliseconds fell by much less than multiply-adds, and every cause that was found.

    Args:
        cases: what was measured.
        dense_macs: multiply-adds per example.
        pruned_macs: likewise.
        causes: what was looked at.

    Returns:
        Sentences; none where milliseconds fell along.
    """
    fell = 1 - pruned_macs / dense_macs if dense_macs else 0.0
    zeros = (
        f"{causes.zeros:,} weights are held at zero, and are multiplied like any other; only units that leave, or 2:4 "
        "patterns on a GPU that has them, save time"
    )
    if fell < FEW:
        moved = f"rose by {-fell:.0%}" if fell < 0 else f"fell by {fell:.0%}"
        return (f"multiply-adds {moved}, so no time is saved", *([zeros] if causes.zeros else []))
    slow = [case for case in cases if not case.apart or case.saved < SHORT * fell]
    if not slow:
        return ()
    found = [_verdict(case, fell) for case in slow]
    reasons = [*_widths_told(causes), *_light_told(causes, slow), *_batch_told(cases, slow, causes)]
    if causes.zeros:
        reasons.append(zeros)
    return (
        *found,
        *(reasons or ["no usual cause was found: neither odd widths, nor light layers, nor the batch"]),
    )


def _verdict(case: Case, fell: float) -> str:
    where = f"{case.runtime}, batch {case.batch}: multiply-adds fell by {fell:.0%}, milliseconds "
    if not case.apart:
        before, now = case.dense[1], case.pruned[1]
        told = f"vary by more than they differ ({before:.3g} before, {now:.3g} now)"
        return f"{where}{told}; take more rounds, or a quieter machine"
    if case.saved < 0:
        return where + f"rose by {-case.saved:.0%}"
    return where + f"by {case.saved:.0%} only"


def _widths_told(causes: Causes) -> Iterable[str]:
    if causes.odd >= ODD:
        names = ", ".join(causes.odd_layers[:3]) + (", ..." if len(causes.odd_layers) > 3 else "")
        yield (
            f"widths: {causes.odd:.0%} of the multiply-adds left are in {len(causes.odd_layers)} layers whose width is "
            f"no multiple of {BLOCK} any more ({names}); plan again with round_to={BLOCK}"
        )


def _light_told(causes: Causes, slow: Sequence[Case]) -> Iterable[str]:
    batches = sorted({case.batch for case in slow if causes.light.get(case.batch, 0.0) >= LIGHT})
    if batches:
        shares = " and ".join(f"{causes.light[batch]:.0%} at batch {batch}" for batch in batches)
        yield (
            f"memory: in eager mode {shares} of the pruned model's time is outside of convolutions and linear layers "
            "(norms, activations, depthwise layers, sums), which wait for memory and not for multiplications; "
            "a runtime that fuses them gains more"
        )


def _batch_told(cases: Sequence[Case], slow: Sequence[Case], causes: Causes) -> Iterable[str]:
    told = []
    for case in slow:
        larger = [c for c in cases if c.runtime == case.runtime and c.batch > case.batch]
        best = min(larger, key=lambda c: c.pruned[1] / c.batch, default=None)
        if best is None:
            continue
        here, there = case.pruned[1] / case.batch, best.pruned[1] / best.batch
        if here > CROWDED * there:
            told.append(f"{here:.3g} ms at batch {case.batch} and {there:.3g} ms at {best.batch} in {case.runtime}")
    if told:
        yield (
            f"batch: an example takes {', '.join(told)}; starting {causes.layers} layers and reading their weights "
            "takes a time that does not depend on the batch, and starting a narrower layer takes no less"
        )
