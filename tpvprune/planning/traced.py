"""From what was followed to a graph: groups of units with their members, costs, counts and reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.members import Group, Kind, Member
from tpvprune.multihead import Heads
from tpvprune.plan import Plan
from tpvprune.planning.attributes import counted_attributes, told_widths
from tpvprune.planning.blocks import block_group
from tpvprune.planning.cost import RECURRENT, Usage
from tpvprune.planning.follow import WHOLE
from tpvprune.planning.follower import Follower
from tpvprune.planning.seen import Policy
from tpvprune.planning.units import STATIC
from tpvprune.planning.work import add_products
from tpvprune.types import REST, Graph

ROOTS = (_ConvNd, nn.Linear, nn.Embedding)
UNUSED = "it is not used in the forward pass"
UNREAD = "no convolution or linear layer consumes its outputs"
LOST = "its channels cannot be followed"
NEW = "the dense model, of which this is a part, has no such units"
SINGLE = "it has a single unit"


def tensors_and_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All that a model holds, by qualified name."""
    return [*model.named_parameters(), *model.named_buffers()]


@dataclass
class _Class:
    """One unit: what of each tensor's dimensions leaves with it, and what is known of it."""

    entries: dict[tuple[str, int], list[int]]
    reason: str | None
    pools: bool
    module: str | None = None  # the attention whose head it is
    bundled: bool = False


class Traced:
    """Turns what was followed into groups, costs and reasons."""

    def __init__(
        self, model: nn.Module, follower: Follower, usage: Usage, policy: Policy, dense: Graph | None = None
    ) -> None:
        self.model, self.follower, self.usage, self.policy = model, follower, usage, policy
        self.units = follower.units
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.reuse: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        self._pin()
        self.classes = self._classes()
        self.place: dict[int, tuple[str, int]] = {}  # class to (group, unit)
        self.groups = self._groups()
        self.unequal = add_products(self)
        known = None if dense is None else frozenset(dense.counts)
        found = counted_attributes(self, known)
        self.counts, self.doubtful, self.untold, self.torn = found.counts, found.doubtful, found.untold, found.torn
        self.told = told_widths(self)
        self._explain()

    def graph(self, name: str) -> Graph:
        """The groups found so far as a value."""
        shapes, reuse = dict(self.shapes), dict(self.reuse)
        stats = {m.param for g in self.groups for m in g.of_role("stat")}
        shapes |= {key: tuple(b.shape) for key, b in self.model.named_buffers() if key in stats}
        itemsize = {key: tensor.element_size() for key, tensor in tensors_and_buffers(self.model) if key in shapes}
        other = sum(tensor.nbytes for key, tensor in tensors_and_buffers(self.model) if key not in shapes)
        rest = self.usage.total - sum(times * torch.Size(shapes[key]).numel() for key, times in reuse.items())
        if rest:
            shapes[REST], reuse[REST] = (), rest
        if other:
            shapes[REST], itemsize[REST] = (), other
        openings = {key: all_of for key, all_of in self.policy.openings.items() if key not in self.policy.sealed}
        adapted = dict(self.counts), openings, dict(self.told), self.usage.inputs
        return Graph(tuple(self.groups), shapes, reuse, name, dict(self.skipped), itemsize, *adapted)

    def restrict(self, carried: Plan) -> None:
        """Leave alone what is no group of the dense model's graph: what comes of it could not be told in its terms."""

        def known(group: Group) -> bool:
            return group.id in carried.graph and int(carried.mask(group.id).sum()) == group.units

        for group in self.groups:
            if not known(group):
                written = {m.layer for m in group.of_role("produce", "affine")}
                self.skipped |= dict.fromkeys(written - set(self.skipped), NEW)
        self.groups = [group for group in self.groups if known(group)]

    def add_blocks(self, names: Iterable[str], held: Mapping[str, str]) -> None:
        """Residual blocks that can be skipped as groups of one unit."""
        self.groups += [block_group(self.model, name, self.usage, self.shapes, self.reuse) for name in names]
        self.groups.sort(key=lambda g: self.usage.order.get(g.id, -1))
        self.skipped |= held

    def stricter(self) -> Policy | None:
        """The policy without what was tried in vain; None if there is no such thing.

        That is units that cost unequally much, parts of channels whose lengths nothing tells, and bundles around
        convolutions whose groups cannot leave as a whole.
        """
        if self.unequal:
            return replace(self.policy, kept={**self.policy.kept, **self.unequal})
        if self.untold:
            return replace(self.policy, parts=self.policy.parts | self.untold)
        loose = {}
        for module, slots in self.follower.bundled:
            for root in self.roots(slots):
                reason = self.classes[root].reason
                if reason is not None:
                    loose[module] = f"its groups cannot leave as a whole: {reason}"
        return replace(self.policy, loose={**self.policy.loose, **loose}) if loose else None

    def _pin(self) -> None:
        for (name, dim, entry), why in self.policy.kept.items():
            if (name, dim) in self.units.slots:
                self.units.pin(torch.tensor([self.units.slots[name, dim][0] + entry]), why)
        everywhere = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        for name, parameter in self.model.named_parameters():
            if everywhere[id(parameter)] > 1:
                for dim in range(parameter.ndim):
                    if (name, dim) in self.units.slots:
                        slots = self.units.of(name, dim, parameter.shape[dim], "produce")
                        self.units.pin(slots, f"{name.rpartition('.')[0]!r} shares a parameter with another layer")

    def _classes(self) -> dict[int, _Class]:
        found = {
            root: _Class(entries, self.units.reason(root), self.units.pools(root))
            for root, entries in self.units.classes().items()
        }
        for width in self.follower.widths:
            if width.heads:
                for root in self.roots(width.slots):
                    found[root].module = width.module
        for _, slots in self.follower.bundled:
            for root in self.roots(slots):
                found[root].bundled = True
        return found

    def slots(self, param: str, dim: int) -> Tensor:
        """Those of one dimension of a tensor; none if it was not met."""
        first, length = self.units.slots.get((param, dim), (0, 0))
        return torch.arange(first, first + length)

    def roots(self, slots: Tensor) -> list[int]:
        """The classes of slots, those that are no unit's left out."""
        return [self.units.find(slot) for slot in slots.tolist() if slot > STATIC]

    def _groups(self) -> list[Group]:
        alike: dict[Any, list[int]] = {}
        for root, unit in self.classes.items():
            roles = {self.units.roles[key] for key in unit.entries}
            if unit.reason is None and not roles & {"produce", "affine"}:
                unit.reason = LOST
            if unit.reason is None and "consume" not in roles:
                unit.reason = UNREAD
            if unit.reason is None:
                key = frozenset((*place, len(entries)) for place, entries in unit.entries.items()), unit.module
                alike.setdefault(key, []).append(root)
        found: list[tuple[int, Group]] = []
        names: Counter[str] = Counter()
        for roots in alike.values():
            if len(roots) < 2:
                self.classes[roots[0]].reason = SINGLE
                continue
            writer = self._writer(roots)
            roots.sort(key=lambda root: self.classes[root].entries[writer])
            group = self._group(writer, roots, names)
            found.append((self._order(group), group))
            self.place |= {root: (group.id, number) for number, root in enumerate(roots)}
        return [group for _, group in sorted(found, key=lambda pair: pair[0])]

    def _order(self, group: Group) -> int:
        return min(self.usage.order.get(m.layer, 1_000_000) for m in group.of_role("produce", "affine"))

    def _writer(self, roots: list[int]) -> tuple[str, int]:
        """The first tensor that writes the units: of a layer, or a loose parameter if no layer does."""
        places = [place for place in self.classes[roots[0]].entries if self.units.roles[place] in ("produce", "affine")]

        def rank(place: tuple[str, int]) -> tuple[bool, bool, int]:
            layer = place[0].rpartition(".")[0]
            role = self.units.roles[place]
            return not isinstance(self.model.get_submodule(layer), ROOTS), role != "produce", self._turn(place[0])

        return min(places, key=rank)

    def _turn(self, param: str) -> int:
        layer = param.rpartition(".")[0]
        turn = self.usage.order.get(layer)
        return 1000 * turn if turn is not None else 10**9 + self.follower.order.get(param, 0)

    def _group(self, writer: tuple[str, int], roots: list[int], names: Counter[str]) -> Group:
        first = self.classes[roots[0]]
        kind: Kind = "head" if first.module is not None else "bundle" if first.bundled else "channel"
        name = first.module if first.module else writer[0].rpartition(".")[0] or writer[0]
        names[name] += 1
        if names[name] > 1:
            name = f"{name}/{names[name]}"
        members = []
        for place in sorted(first.entries, key=lambda p: (self._turn(p[0]), not p[0].endswith("weight"), p)):
            index = torch.tensor([self.classes[root].entries[place] for root in roots], dtype=torch.int64)
            whole = index.shape[1] == 1 and torch.equal(index.flatten(), torch.arange(self._length(place)))
            members.append(Member(place[0], place[1], None if whole else index, self.units.roles[place]))
        exact = not any(self.classes[root].pools for root in roots)
        kinds = [
            f"{type(self.model.get_submodule(m.layer)).__name__}:{m.role}:{m.dim}:{m.width()}"
            if kind != "channel"
            else f"{type(self.model.get_submodule(m.layer)).__name__}:{m.role}:{m.dim}"
            for m in members
        ]
        return Group(name, kind, len(roots), tuple(members), exact, "|".join([kind, *sorted(kinds)]))

    def _length(self, place: tuple[str, int]) -> int:
        return self.units.slots[place][1]

    def _explain(self) -> None:
        """Why the outputs of a layer stay whole."""
        written = {m.layer for g in self.groups for m in g.of_role("produce", "affine")}
        parameters = {id(p): name for name, p in self.model.named_parameters()}
        names = {id(m): name for name, m in reversed(list(self.model.named_modules()))}
        for name, module in self.model.named_modules():
            if isinstance(module, RECURRENT):
                self.skipped[name] = WHOLE if name in self.usage.order else UNUSED
            if not isinstance(module, (*ROOTS, Heads)) or names[id(module)] != name or name in written:
                continue
            dim = 1 if isinstance(module, nn.Embedding) or getattr(module, "transposed", False) else 0
            if dim and getattr(module, "groups", 1) > 1:  # where each writes one channel, only its inputs have slots
                dim = 0
            weight = module.in_proj_weight if isinstance(module, Heads) else module.weight
            place = parameters.get(id(weight), ""), dim
            reasons = [LOST if name in self.usage.order else UNUSED]
            if place in self.units.slots:
                first, length = self.units.slots[place]
                found = (self.classes[self.units.find(slot)].reason for slot in range(first, first + length))
                reasons = [reason for reason in found if reason] or [LOST]
            elif name in self.usage.order and weight.shape[dim] == 1:
                reasons = [SINGLE]
            self.skipped[name] = reasons[0]
        for module, reason in self.policy.still.items():
            self.skipped.setdefault(module, reason)
        for module, reason in self.policy.whole.items():
            self.skipped.setdefault(module, reason)
        for module, reason in self.policy.loose.items():
            self.skipped.setdefault(module, reason)
