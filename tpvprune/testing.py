"""Contract suites for people who write a head, a perturbation or a criterion of their own.

Each raises `AssertionError` naming the promise that does not hold, so that one line in a test is enough:

    check_head(MyHead(), torch.randn(4, 10))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch
from tpvprune.errors import InputError
from tpvprune.scoring.criteria import Criterion
from tpvprune.scoring.engine import wide
from tpvprune.scoring.heads import Head
from tpvprune.scoring.perturb import Perturbation, moments_of
from tpvprune.types import Graph

DRAWS = 4000
STANDARD_ERRORS = 5.0
ENTRIES = 64  # of a part, at least
ROUNDING = 1e-5  # of the largest entry, for heads that compute in float32


def check_head(head: Head, output: Any) -> None:
    """Check a head on one batch of outputs.

    Args:
        head: yours.
        output: `(batch, ...)`, or a dict of such by name; a few samples with a few entries each.

    Raises:
        AssertionError: a shape is wrong, a seed does not repeat, samples are not independent or not drawn one after the
            other, or the random cotangents do not have the second moment that the exact ones sum to.
    """
    wide = _each(output, lambda value: value.double() if value.is_floating_point() else value)
    first = _drawn(head, wide, torch.Generator().manual_seed(1))
    again = _drawn(head, wide, torch.Generator().manual_seed(1))
    assert torch.equal(first, again), "the same seed gives another cotangent; draw from the generator given"
    samples, entries = first.shape
    metric = torch.zeros(samples, entries, entries, dtype=torch.float64)
    for u in head.exact(wide):
        flat = _flat(u, wide, "an exact cotangent")
        metric += torch.einsum("bi,bj->bij", flat, flat)
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack([_drawn(head, wide, generator) for _ in range(DRAWS)])
    products = torch.einsum("nbi,nbj->nbij", draws, draws)
    error = products.std(0) / DRAWS**0.5
    gap = (products.mean(0) - metric).abs()
    assert bool((gap <= STANDARD_ERRORS * error + 1e-9).all()), "E[u u^T] is not what exact() sums to"
    if samples > 1:
        cross = torch.einsum("ni,nj->nij", draws[:, 0], draws[:, 1])
        limit = STANDARD_ERRORS * cross.std(0) / DRAWS**0.5 + 1e-9
        assert bool((cross.mean(0).abs() <= limit).all()), "cotangents of different samples are correlated"
    _check_parts(head, wide, samples, entries)


def _check_parts(head: Head, output: Any, samples: int, entries: int) -> None:
    """A batch that is taken in parts gets the cotangents of the whole."""
    many = 2 * max(samples, -(-ENTRIES // entries))  # torch.randn draws few numbers one after the other, but not more
    rows = torch.arange(many) % samples

    def drawn(some: Tensor, generator: torch.Generator) -> Tensor:
        return _drawn(head, _each(output, lambda value: value[some]), generator)

    whole = drawn(rows, torch.Generator().manual_seed(3))
    for size in (many // 2, 1):
        generator = torch.Generator().manual_seed(3)
        parts = [drawn(some, generator) for some in rows.split(size)]
        near = float(whole.abs().max()) * ROUNDING
        assert bool(((torch.cat(parts) - whole).abs() <= near).all()), (
            "a batch taken in parts gets other cotangents than the whole; draw sample after sample, as torch.randint "
            "and torch.rand do where the samples come first in the shape (torch.randn does not)"
        )


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor changed, or each of a dict of them."""
    return {name: change(value) for name, value in output.items()} if isinstance(output, dict) else change(output)


def _drawn(head: Head, output: Any, generator: torch.Generator) -> Tensor:
    return _flat(head.cotangent(output, generator), output, "the cotangent")


def _flat(u: Any, output: Any, what: str) -> Tensor:
    """All entries of a cotangent, `(batch, entries)`, which has the outputs' names and shapes."""
    mine, wanted = (value if isinstance(value, dict) else {"": value} for value in (u, output))
    assert set(mine) == set(wanted), f"{what} is of the outputs {sorted(mine)}, the model's are {sorted(wanted)}"
    for name, value in wanted.items():
        at = f" of {name!r}" if name else ""
        assert mine[name].shape == value.shape, (
            f"{what}{at} is {tuple(mine[name].shape)}, the output {tuple(value.shape)}"
        )
    return torch.cat([mine[name].double().reshape(len(value), -1) for name, value in wanted.items()], 1)


def check_perturbation(perturbation: Perturbation, name: str, weight: Tensor) -> None:
    """Check a perturbation on one weight.

    Args:
        perturbation: yours.
        name: what the weight is called.
        weight: of any shape.

    Raises:
        AssertionError: the moments are no pair of tensors (or numbers, or None) that broadcast to the weight, are not
            finite or not repeatable, the variance is below zero, or the weight or the global random state was changed.
    """
    given, random = wide(weight.detach()).clone(), torch.get_rng_state()
    try:
        moments = moments_of(perturbation, name, given)
    except InputError as error:
        raise AssertionError(str(error)) from None
    perturbation.moments(name, given)  # which moments_of gives a copy
    assert torch.equal(given, wide(weight.detach())), "the weight was changed"
    assert torch.equal(random, torch.get_rng_state()), "the global random state was used; moments are no draws"
    for kind, moment, again in zip(("mean", "variance"), moments, moments_of(perturbation, name, given), strict=True):
        same = again is None if moment is None else again is not None and torch.equal(moment, again)
        assert same, f"the {kind} does not repeat"


def check_criterion(criterion: Criterion, model: nn.Module, batches: Iterable[Batch], graph: Graph) -> None:
    """Check a criterion on a small model.

    Args:
        criterion: yours.
        model: any model.
        batches: a list of its inputs.
        graph: traced from the model.

    Raises:
        AssertionError: scores are missing, misshapen, not finite or not repeatable, or the model, its gradients,
            modes, hooks or the global random state were changed.
    """
    state = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    random = torch.get_rng_state()
    scores = criterion.measure(model, batches, graph)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name!r} was changed"
    assert flags == [(p.requires_grad, p.grad is None) for p in model.parameters()], "gradients or their flags changed"
    assert modes == [m.training for m in model.modules()], "train / eval modes were changed"
    now = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    assert hooks == now, "hooks were left behind"
    assert torch.equal(random, torch.get_rng_state()), "the global random state was used; take a generator"
    assert scores.model_id == graph.model_id, "model_id is not the graph's"
    for group in graph.groups:
        value = scores.values.get(group.id)
        assert value is not None, f"group {group.id!r} has no scores"
        assert value.shape == (group.units,), f"group {group.id!r} needs shape ({group.units},), not {value.shape}"
    repeated = criterion.measure(model, batches, graph)
    for name, value in scores.values.items():
        assert torch.allclose(value, repeated.values[name]), f"scores of {name!r} do not repeat"
