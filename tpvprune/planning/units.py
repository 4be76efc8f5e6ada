"""Which entries of a network can only leave together: a union-find over the entries of all tensor dimensions.

A *slot* is one entry along one dimension of a parameter or buffer. Slots that one operation ties together are one
class, and a class is a unit of the graph unless something pins it. In the vectors of slots that follow the activations
through the network, `STATIC` stands for an entry whose place is given (the model's input, a constant), and `FREE` for
one that takes whatever length it meets (the filling of a pad).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tpvprune.members import Role

STATIC, FREE = 0, -1


class Units:
    """Slots, what ties them, and what pins them.

    Attributes:
        slots: first slot of each known dimension of a tensor, `(param, dim) -> (first, length)`.
        roles: what each of these dimensions does with its units.
        bundled: classes whose slots are tied because they are in one group of a convolution.
    """

    def __init__(self) -> None:
        self.slots: dict[tuple[str, int], tuple[int, int]] = {}
        self.roles: dict[tuple[str, int], Role] = {}
        self.parents = [STATIC]
        self._reasons: dict[int, str] = {}
        self._pools: set[int] = set()

    def of(self, param: str, dim: int, length: int, role: Role) -> Tensor:
        """The slots of one dimension of a tensor, `(length,)`; the first role it is met in stays."""
        if (param, dim) not in self.slots:
            self.slots[param, dim] = len(self.parents), length
            self.parents.extend(range(len(self.parents), len(self.parents) + length))
        self.roles.setdefault((param, dim), role)
        first, length = self.slots[param, dim]
        return torch.arange(first, first + length)

    def find(self, slot: int) -> int:
        """The slot that stands for the class of a slot."""
        root = slot
        while self.parents[root] != root:
            root = self.parents[root]
        while self.parents[slot] != root:
            self.parents[slot], slot = root, self.parents[slot]
        return root

    def tie(self, a: Tensor, b: Tensor, why: str) -> None:
        """Make one class of each pair of slots.

        Args:
            a: slots, `(n,)`.
            b: slots, `(n,)`.
            why: the reason where one of the two is static, so that the other cannot leave.
        """
        differ = (a != b) & (a != FREE) & (b != FREE)
        if not bool(differ.any()):
            return
        for x, y in torch.stack([a[differ], b[differ]], 1).unique(dim=0).tolist():
            if STATIC in (x, y):
                self._pin(max(x, y), why)
                continue
            x, y = sorted((self.find(x), self.find(y)))
            if x != y:
                self.parents[y] = x
                if y in self._reasons:
                    self._reasons.setdefault(x, self._reasons[y])
                if y in self._pools:
                    self._pools.add(x)

    def pin(self, slots: Tensor, why: str) -> None:
        """Keep the classes of these slots whole, for a reason."""
        for slot in slots.unique().tolist():
            if slot > STATIC:
                self._pin(slot, why)

    def _pin(self, slot: int, why: str) -> None:
        self._reasons.setdefault(self.find(slot), why)

    def pool(self, slots: Tensor) -> None:
        """Note that something other than the layers that read these slots depends on them: masking is not removal."""
        self._pools.update(self.find(slot) for slot in slots.unique().tolist() if slot > STATIC)

    def reason(self, slot: int) -> str | None:
        """Why the class of a slot must stay; None if it need not."""
        return self._reasons.get(self.find(slot))

    def pools(self, slot: int) -> bool:
        """Whether masking the class of a slot is not the same as removing it."""
        return self.find(slot) in self._pools

    def classes(self) -> dict[int, dict[tuple[str, int], list[int]]]:
        """All classes: for each dimension of a tensor the entries that belong to it."""
        found: dict[int, dict[tuple[str, int], list[int]]] = {}
        for key, (first, length) in self.slots.items():
            for entry in range(length):
                found.setdefault(self.find(first + entry), {}).setdefault(key, []).append(entry)
        return found


def modulo(slots: Tensor, period: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs that make one class of the slots that are the same modulo a period."""
    rows = slots.reshape(-1, period)
    return ((rows[0], row) for row in rows[1:])
