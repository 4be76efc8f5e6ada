"""Units cut from a copy of a network, and whether what is left gives what the network gives with them masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import device_of
from tpvprune.copies import copied, doubled
from tpvprune.layers import cut, registered
from tpvprune.members import Group, Opening
from tpvprune.plan import Plan
from tpvprune.planning.cost import tensors_of
from tpvprune.planning.scalars import Scalars, changed, keeping
from tpvprune.planning.seen import Limit, Site
from tpvprune.source import base_of, functions, method_of, owner_of
from tpvprune.types import Graph

LEEWAY = 0.05  # of what the masks change: a wrong index changes about as much as they do
NOISE = 1e-5  # of the largest output, for what rounding adds
EXACT = 1e-7  # likewise in float64, where even networks that make much of rounding add less
FOLLOWS = "the code of {} makes a number of their width, {:g} with all of them"
DIFFERS = "without them the network does not give what it gives with them masked"


@dataclass(frozen=True)
class Failure:
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


class Stage:
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

    def fails(self, groups: Iterable[Group], uneven: bool = False) -> Failure | None:
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
            return Failure(module, why, _site(self.model, error))
        if [t.shape for t in got] != [t.shape for t in self.dense]:
            return Failure(None, "without them the outputs have another shape")
        other = changed(self.scalars.used, scalars.used, self.free)
        if other is not None:
            used, number = other
            code = repr(used.module) if used.module else repr(type(self.model).__name__)
            kept = keeping(self.scalars.used, used, number)
            return Failure(None, FOLLOWS.format(code, used.numbers[number]), keeping=kept)
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
        return None if same else Failure(None, DIFFERS)

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
