"""Rehearse a cut: remove one unit of every group, run the network, and compare it with one in which they are masked.

The code of a module may rest on a width that it read when it was built. Where it does, the run fails inside of it, or
gives something else; then the network is followed again under a stricter policy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tpvprune.elastic import calls_at, can_open
from tpvprune.members import Group, Opening
from tpvprune.planning.follower import Follower
from tpvprune.planning.seen import Limit, Policy, Reshaped
from tpvprune.planning.stage import Failure, Stage
from tpvprune.source import own_name
from tpvprune.types import Graph

TORN = "the number that counts them in the code counts something else that stays"


@torch.no_grad()
def rehearsed(
    model: nn.Module,
    graph: Graph,
    follower: Follower,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    policy: Policy,
    limit: Limit | None = None,
    *,
    doubtful: Collection[str] = (),
    torn: Collection[str] = (),
) -> Policy:
    """The policy to follow the network under; where nothing but openings is new in it, every group can be cut as it is.

    Args:
        model: in eval mode.
        graph: of the network as it was followed.
        follower: that followed it.
        args: of one forward pass.
        kwargs: likewise.
        policy: under which it was followed.
        limit: to the time it may take.
        doubtful: names of numbers that are read for something else than a width, as far as code tells.
        torn: groups that are counted by a number by which something else is counted, too.
    """
    groups = [g for g in graph.groups if g.units > 1]
    if not groups:
        return policy
    stage = Stage(model, graph, args, kwargs, limit)
    exact = [g for g in groups if g.exact_mask]
    # One unit of each; one of each where all can be masked; and other numbers of each, for code that counts two groups
    # by one number.
    rounds = [(groups, False), (exact if len(exact) < len(groups) else [], False), (groups, True)]
    for some, uneven in rounds:
        failure, policy = _tried(stage, follower, policy, some, uneven) if some else (None, policy)
        if failure is not None:
            uncounted = _uncounted(stage, some, uneven, doubtful)
            if uncounted:
                return replace(policy, uncounted=policy.uncounted | uncounted)
            stuck = {g.id: TORN for g in some if g.id in torn and stage.fails([g], uneven) is not None}
            if stuck:
                return _keeping(policy, stage.graph, stuck)
            uneven_parts = {width.module for width in follower.widths if width.must} - policy.parts
            if uneven_parts:
                return replace(policy, parts=policy.parts | uneven_parts)
            stricter = None if failure.module is None else _stricter(model, follower, policy, failure)
            return stricter or _kept(stage, follower, policy, some, uneven, failure)
    return policy


@torch.no_grad()
def needed_counts(
    model: nn.Module,
    graph: Graph,
    doubtful: Collection[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    limit: Limit | None = None,
) -> dict[str, tuple[str, int]]:
    """The numbers of a graph that are set anew, without those that only happen to be as many as units.

    Without these a cut model runs, and gives what it gives with units masked, or, where that cannot be compared, what
    it gives with the number set anew.

    Args:
        model: in eval mode.
        graph: of the network, every group of which can be cut.
        doubtful: names of numbers that are read for something else than a width, as far as code tells.
        args: of one forward pass.
        kwargs: likewise.
        limit: to the time it may take.
    """
    groups = [g for g in graph.groups if g.units > 1]
    counts = dict(graph.counts)
    for names in _by_kind(model, doubtful):
        fewer = {name: of for name, of in counts.items() if name not in names}
        stages = [Stage(model, replace(graph, counts=some), args, kwargs, limit) for some in (fewer, counts)]
        rounds = [(some, uneven) for uneven in (False, True) for some in ([g for g in groups if g.exact_mask], groups)]
        if all(not some or stages[0].fails(some, uneven) is None for some, uneven in rounds):
            got, wanted = (stage.outputs(groups, True) for stage in stages)
            if all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)) or all(g.exact_mask for g in groups):
                counts = fewer
    return counts


def _by_kind(model: nn.Module, names: Iterable[str]) -> list[set[str]]:
    """Names of numbers, those of one attribute of one class together."""
    kinds: dict[tuple[type, str], set[str]] = {}
    for name in names:
        module, _, key = name.rpartition(".")
        kinds.setdefault((type(model.get_submodule(module)), key), set()).add(name)
    return list(kinds.values())


def _uncounted(stage: Stage, groups: list[Group], uneven: bool, doubtful: Collection[str]) -> frozenset[str]:
    """Numbers without which a rehearsal goes well that fails with them set anew; none if there are none."""
    kinds, graph = _by_kind(stage.model, doubtful), stage.graph
    try:
        for names in [*kinds, set(doubtful)] if len(kinds) > 1 else kinds:
            stage.graph = replace(graph, counts={name: of for name, of in graph.counts.items() if name not in names})
            if stage.fails(groups, uneven) is None:
                return frozenset(names)
    finally:
        stage.graph = graph
    return frozenset()


def _tried(
    stage: Stage, follower: Follower, policy: Policy, groups: list[Group], uneven: bool
) -> tuple[Failure | None, Policy]:
    """How a rehearsal fails, None if it does not, with all sizes left open that can be, and the policy that says so."""
    failure = stage.fails(groups, uneven)
    while failure is not None:
        opened = _opened(stage.model, stage.graph, follower, policy, failure)
        if opened is None:
            break
        policy = opened
        stage.graph = replace(stage.graph, openings=policy.openings)
        failure = stage.fails(groups, uneven)
    return failure, policy


def _kept(
    stage: Stage, follower: Follower, policy: Policy, groups: list[Group], uneven: bool, failure: Failure
) -> Policy:
    """The policy with all units of the groups kept that fail on their own, or of all that fail together."""
    guilty = {}
    for group in groups:  # which may fail where together they did not: widths that are the same differ then
        alone, policy = _tried(stage, follower, policy, [group], uneven)
        if alone is not None:
            guilty[group.id] = alone.why
    if not guilty:  # each can go, but not all together
        guilty = {g.id: failure.why for g in groups}
    return _keeping(policy, stage.graph, guilty)


def _keeping(policy: Policy, graph: Graph, whys: Mapping[str, str]) -> Policy:
    """The policy with all units of groups kept, each for its reason."""
    kept = dict(policy.kept)
    for name, why in whys.items():
        group = graph[name]
        member = group.of_role("produce", "affine")[0]
        for entry in member.entries(group.units)[:, 0].tolist():
            kept[member.param, member.axis, entry] = why
    return replace(policy, kept=kept)


def _opened(model: nn.Module, graph: Graph, follower: Follower, policy: Policy, failure: Failure) -> Policy | None:
    """The policy with the sizes left open that the class whose code failed writes out; None if none failed there.

    Or with the numbers kept that went wrong.
    """
    if failure.keeping:
        more = {name: (*policy.openings.get(name, ()), *kept) for name, kept in failure.keeping.items()}
        if not all(can_open(type(model.get_submodule(name)), kept) for name, kept in more.items()):
            return None
        return replace(policy, openings={**policy.openings, **more})
    if failure.site is None:
        return None
    kind = failure.site[0]
    alike = [name for name, m in model.named_modules() if type(m) is kind]
    counts = [name.rpartition(".") for name in graph.counts]
    own = own_name(kind, failure.site[1])
    # A function is given them by the names that they have.
    set_anew = {key if own is None else f"{own}.{key}" for around, _, key in counts if around in alike}
    done = policy.openings.get(alike[0], ())
    found: dict[Opening, bool] = {}  # and whether it is where the code failed
    for (other, method, line, call), seen in follower.sites.items():
        if other is kind and not any((o.method, o.call) == (method, call) for o in (*done, *found)):
            sizes = next(sizes for text, sizes in calls_at(other, method, line) if text == call)
            opening = _opening(method, call, sizes, seen, set_anew)
            if opening is not None and can_open(kind, (*done, opening)):
                found[opening] = (kind, method, line) == failure.site
    if not any(found.values()):
        return None
    return replace(policy, openings={**policy.openings, **dict.fromkeys(alike, (*done, *found))})


def _opening(method: str, call: str, sizes: Sequence[str], seen: Reshaped, set_anew: Collection[str]) -> Opening | None:
    """How a size that a call writes out can be left open; None if none is, or none can."""
    free = [axis for axis in seen.axes if not sizes[axis].lstrip("-").isdigit() and sizes[axis] not in set_anew]
    if not free:
        return None
    axis = max(free)
    if "-1" not in sizes:
        return Opening(method, call, axis)
    for place in (axis, sizes.index("-1")):
        source = seen.source(place)
        if source is not None:
            return Opening(method, call, axis if place != axis else sizes.index("-1"), (place, source))
    return None


def _stricter(model: nn.Module, follower: Follower, policy: Policy, failure: Failure) -> Policy | None:
    """The next thing to give up in the code that failed, and in all code of the same class."""
    taking = {width.module for width in follower.widths} | set(policy.still)
    name = failure.module or ""
    while name and name not in taking:
        name = name.rpartition(".")[0]
    if name not in taking or not name:
        name = (failure.module or "").rpartition(".")[0]
        if not name or name in policy.sealed:
            return None
        return replace(policy, sealed={**policy.sealed, **_alike(model, name, failure.why)})
    heads = {width.module for width in follower.widths if width.heads}
    alike = _alike(model, name, failure.why)
    if name in heads and name not in policy.whole:
        return replace(policy, whole={**policy.whole, **alike})
    if name not in policy.still:
        return replace(policy, still={**policy.still, **alike})
    return None if name in policy.sealed else replace(policy, sealed={**policy.sealed, **alike})


def _alike(model: nn.Module, name: str, why: str) -> dict[str, str]:
    kind = type(model.get_submodule(name))
    return {other: why.replace(repr(name), repr(other)) for other, m in model.named_modules() if type(m) is kind}
