"""Rehearse a cut: remove one unit of every group, run the network, and compare it with one in which they are masked.

The code of a module may rest on a width that it read when it was built. Where it does, the run fails inside of it, or
gives something else; then the network is followed again under a stricter policy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import device_of
from tpvprune.copies import copied, doubled
from tpvprune.elastic import calls_at
from tpvprune.layers import cut, registered
from tpvprune.members import Group, Opening
from tpvprune.plan import Plan
from tpvprune.planning.cost import tensors_of
from tpvprune.planning.follower import Follower
from tpvprune.planning.scalars import Scalars, changed, keeping
from tpvprune.planning.seen import Limit, Policy, Reshaped, Site
from tpvprune.source import base_of, functions, method_of, own_name, owner_of
from tpvprune.types import Graph

LEEWAY = 0.05  # of what the masks change: a wrong index changes about as much as they do
NOISE = 1e-5  # of the largest output, for what rounding adds
EXACT = 1e-7  # likewise in float64, where even networks that make much of rounding add less
FOLLOWS = "the code of {} makes a number of their width, {:g} with all of them"
TORN = "the number that counts them in the code counts something else that stays"
DIFFERS = "without them the network does not give what it gives with them masked"


@dataclass(frozen=True)
class _Failure:
    """Where a rehearsal went wrong.

    Attributes:
        module: whose code failed; None if the outputs were wrong.
        why: in words.
        site: class, method and line of that code, if it is a module's own.
        keeping: numbers that modules are to keep, so that it does not go wrong.
    """

    module: str | None
    why: str
    site: Site | None = None
    keeping: Mapping[str, tuple[Opening, ...]] = field(default_factory=dict)


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
    stage = _Stage(model, graph, args, kwargs, limit)
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
        stages = [_Stage(model, replace(graph, counts=some), args, kwargs, limit) for some in (fewer, counts)]
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


def _uncounted(stage: _Stage, groups: list[Group], uneven: bool, doubtful: Collection[str]) -> frozenset[str]:
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
    stage: _Stage, follower: Follower, policy: Policy, groups: list[Group], uneven: bool
) -> tuple[_Failure | None, Policy]:
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
    stage: _Stage, follower: Follower, policy: Policy, groups: list[Group], uneven: bool, failure: _Failure
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


class _Stage:
    """Runs a model with units cut."""

    def __init__(
        self, model: nn.Module, graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: Limit | None
    ) -> None:
        self.limit = limit
        self.model, self.graph, self.args, self.kwargs = model, graph, args, kwargs
        self.scalars = Scalars(model)
        self.free = {name for name, module in model.named_modules() if registered(module)}
        with self.scalars:
            self.dense = _run(model, args, kwargs)

    def outputs(self, groups: Sequence[Group], uneven: bool) -> list[Tensor]:
        """What the model gives with units cut, as `fails` cuts them."""
        return _run(cut(self.model, self._plan(groups, uneven)), self.args, self.kwargs)

    def _plan(self, groups: Sequence[Group], uneven: bool) -> Plan:
        least = {g.id: 1 if all(m.width() == 1 for m in g.of_role("affine", "stat")) else 2 for g in groups}
        gone = {g.id: max(1, min(1 + n % 5 if uneven else 1, g.units - least[g.id])) for n, g in enumerate(groups)}
        return Plan({g.id: torch.arange(g.units) < g.units - gone[g.id] for g in groups}, self.graph)

    def fails(self, groups: Iterable[Group], uneven: bool = False) -> _Failure | None:
        """Cut one unit of each group, or other numbers of each, and run; where all of them can be masked, compare."""
        groups = list(groups)
        plan, running = self._plan(groups, uneven), list[str]()
        if self.limit is not None:
            self.limit.check(f"to rehearse a cut of {len(groups)} groups, {groups[0].id!r} the first")
        try:
            small = cut(self.model, plan)
            for name, module in small.named_modules():
                module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
                module.register_forward_hook(lambda *_, name=name: self._left(running, name))
            with Scalars() as scalars:
                got = _run(small, self.args, self.kwargs)
        except Exception as error:  # whatever a model's own code raises
            module = running[-1] if running else ""
            kind = type(self.model.get_submodule(module)).__name__
            line = str(error).strip().split("\n")[0]
            code = f"{module!r} ({kind})" if module else f"{kind!r}"
            why = f"the code of {code} cannot do without them: {line}"
            return _Failure(module, why, _site(self.model, error))
        if [t.shape for t in got] != [t.shape for t in self.dense]:
            return _Failure(None, "without them the outputs have another shape")
        other = changed(self.scalars.used, scalars.used, self.free)
        if other is not None:
            used, number = other
            code = repr(used.module) if used.module else repr(type(self.model).__name__)
            kept = keeping(self.scalars.used, used, number)
            return _Failure(None, FOLLOWS.format(code, used.numbers[number]), keeping=kept)
        if not all(g.exact_mask for g in groups) or self._same(
            self.model, plan, got, self.dense, self.args, self.kwargs, 0.0, NOISE
        ):
            return None
        # A network that makes much of rounding tells nothing in float32.
        model, args, kwargs = doubled((self.model, self.args, self.kwargs))
        try:
            got, dense = (_run(m, args, kwargs) for m in (cut(model, plan), model))
            same = self._same(model, plan, got, dense, args, kwargs, 0.0, EXACT)
        except Exception:  # code that asks for another type
            got = _run(cut(self.model, plan), self.args, self.kwargs)
            same = self._same(self.model, plan, got, self.dense, self.args, self.kwargs, LEEWAY, 10 * NOISE)
        return None if same else _Failure(None, DIFFERS)

    @staticmethod
    def _same(
        model: nn.Module,
        plan: Plan,
        got: list[Tensor],
        dense: list[Tensor],
        args: Any,
        kwargs: Mapping[str, Any],
        leeway: float,
        noise: float,
    ) -> bool:
        """Whether a model gives, with units masked, what it gave with them cut."""
        masked = copied(model)
        for name, mask in plan.as_masks().weights.items():
            masked.get_parameter(name).masked_fill_(~mask.to(masked.get_parameter(name).device), 0)
        for a, b, c in zip(got, _run(masked, args, kwargs), dense, strict=True):
            if a.is_floating_point() and a.numel() and not bool(a.isnan().any()):
                bound = leeway * float((b - c).abs().max()) + noise * float(c.abs().max())
                if float((a - b).abs().max()) > bound:
                    return False
        return True

    @staticmethod
    def _left(running: list[str], name: str) -> None:
        while running and running.pop() != name:
            pass


def _run(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What a model gives, drawing the same random numbers each time: some shuffle or hide parts of their input."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return tensors_of(model(*args, **kwargs))


def _site(model: nn.Module, error: BaseException) -> Site | None:
    """The innermost line of a module's own methods that an error went through, and the class of that module.

    Or of the functions that these call.
    """
    found: tuple[type[Any], str, int] | None = None
    inner: dict[Any, str] = {}
    for frame, line in walk_tb(error.__traceback__):
        kind: type[Any] = type(owner_of(frame))
        method = method_of(kind, frame.f_code) if issubclass(kind, nn.Module) else None
        if method is not None and not kind.__module__.startswith("torch.nn."):
            found = base_of(kind), method, line
            inner = {function.__code__: name for name, function in functions(kind).items()}
        elif found is not None and frame.f_code in inner:
            found = found[0], inner[frame.f_code], line
    same = [type(m) for m in model.modules() if found is not None and base_of(type(m)) is found[0]]
    return (same[0], *found[1:]) if found is not None and same else None


def _opened(model: nn.Module, graph: Graph, follower: Follower, policy: Policy, failure: _Failure) -> Policy | None:
    """The policy with the sizes left open that the class whose code failed writes out; None if none failed there.

    Or with the numbers kept that went wrong.
    """
    if failure.keeping:
        more = {name: (*policy.openings.get(name, ()), *kept) for name, kept in failure.keeping.items()}
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
            if opening is not None:
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


def _stricter(model: nn.Module, follower: Follower, policy: Policy, failure: _Failure) -> Policy | None:
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
