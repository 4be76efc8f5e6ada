"""Batches that do not fit into memory are taken in parts, with the same result."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.helpers import built, gap, plan_without
from tests.scoring.test_side_effects import assert_unchanged, fingerprint
from tpvprune.scoring.engine import Parts, stream
from tpvprune.scoring.layout import Layout

SUMS = 1e-12
"""Relative to the largest score: float64 sums over samples in another order."""


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> Iterator[None]:
    """What was there before is not collected again each time that memory runs out."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Layout._run

    def run(self: Layout, inputs: Tensor, which: list[int]) -> Any:
        told = isinstance(self._model, Small) and self._model.room != 2
        if told:
            self._model.looked_at += 1
        try:
            return plain(self, inputs, which)
        finally:
            if told:
                self._model.looked_at -= 1

    monkeypatch.setattr(Layout, "_run", run)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Small(nn.Module):
    """A model on a machine whose memory holds `room` samples; where it runs out is chosen."""

    def __init__(self, inner: nn.Module, room: int | None = None, where: str = "forward") -> None:
        super().__init__()
        self.inner, self.room, self.where, self.sizes, self.looked_at = inner, room, where, [], 0

    def forward(self, x: Tensor) -> Tensor:
        if self.looked_at:  # a few samples are run to see where they lie
            return self.inner(x)
        self.sizes.append(len(x))
        full = self.room is not None and len(x) > self.room
        if full and self.where == "forward":
            self.inner(x[:1])  # hooks have been called by then
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if full and self.where == "cpu":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to")
        y = self.inner(x)
        if full and self.where == "after":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _Backward.apply(y) if full and self.where == "backward" else y


@cache
def traced(name: str) -> tp.Graph:
    return tp.trace(Small(copy.deepcopy(built(name).model)), built(name).inputs)


def small(name: str, room: int | None = None) -> tuple[Small, tp.Graph]:
    return Small(copy.deepcopy(built(name).model), room), traced(name)


def data(name: str) -> list[tuple[Tensor, Tensor]]:
    """Batches of 7, 7 and 5 samples, with labels."""
    generator = torch.Generator().manual_seed(1)
    shape = built(name).inputs.shape[1:]
    return [
        (torch.randn(n, *shape, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator))
        for n in (7, 7, 5)
    ]


CRITERIA: dict[str, Callable[[], Any]] = {
    "probes": lambda: tp.TPV(probes=3),
    "logits": lambda: tp.TPV(head="logits", probes=2, seed=4),
    "margin": lambda: tp.TPV(head="margin", probes=2),
    "exact": lambda: tp.TPV(probes="exact"),
    "all": lambda: tp.TPV(over="all", probes=2),
    "reference": lambda: tp.TPV(reference=copy.deepcopy(built("conv_bn").model)),
    "batched": lambda: tp.TPV(engine="batched", probes=3),
    "batched exact": lambda: tp.TPV(engine="batched", probes="exact"),
    "per sample": lambda: tp.TPV(engine="per_sample", probes=3, perturbation="isotropic"),
    "jbr": lambda: tp.JBR(confidence=0.3),
    "taylor": tp.Taylor,
    "fisher": tp.Fisher,
    "jacobian": tp.Jacobian,
    "variance": tp.Variance,
    "wanda": tp.Wanda,
}


def assert_same(a: tp.Scores, b: tp.Scores) -> None:
    assert a.tally.to_json() == b.tally.to_json()
    assert a.manifest == b.manifest
    for one, other in ((a.values, b.values), (a.stderr, b.stderr), *zip(a.halves, b.halves, strict=True)):
        for key, value in (other or {}).items():
            assert gap(one[key], value) <= SUMS * float(value.abs().max()), key
    assert (a.sensitivities is None) == (b.sensitivities is None)
    if b.sensitivities is not None:
        torch.testing.assert_close(a.sensitivities.rows, b.sensitivities.rows, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.sensitivities.linear, b.sensitivities.linear, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("room", [1, 3, 5])
@pytest.mark.parametrize("kind", CRITERIA)
def test_batches_in_parts_give_the_same_scores(kind: str, room: int, caplog: pytest.LogCaptureFixture) -> None:
    model, graph = small("conv_bn")
    whole = tp.score(model, data("conv_bn"), graph, CRITERIA[kind]())
    assert set(model.sizes) == {7, 5}
    assert not caplog.records
    model.room, model.sizes = room, []
    with caplog.at_level(logging.WARNING, "tpvprune"):
        found = tp.score(model, data("conv_bn"), graph, CRITERIA[kind]())
    assert_same(found, whole)
    # 7, then 3, then (for 1) 1: halves that fail are told of once, and what fits is kept to.
    tried = [7, 3, 1] if room == 1 else [7, 3]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"out of memory with {a} samples at once; going on with {b}, same result" for a, b in pairwise(tried)
    ]
    assert model.sizes == [*tried[:-1], *([1] * 19 if room == 1 else [3, 3, 1, 3, 3, 1, 3, 2])]


@pytest.mark.parametrize("kind", ["probes", "exact", "per sample", "variance"])
def test_the_samples_that_are_looked_at_need_not_fit(kind: str) -> None:
    model, graph = small("conv_bn")
    whole = tp.score(model, data("conv_bn"), graph, CRITERIA[kind]())
    model.room = 2
    assert_same(tp.score(model, data("conv_bn"), graph, CRITERIA[kind]()), whole)


@pytest.mark.parametrize("engine", ["batched", "per_sample"])
def test_single_weights_in_parts(engine: str) -> None:
    model, _ = small("conv_bn")
    graph = tp.weight_graph(model)
    whole = tp.score(model, data("conv_bn"), graph, tp.TPV(engine=engine, probes=2))
    model.room = 3
    assert_same(tp.score(model, data("conv_bn"), graph, tp.TPV(engine=engine, probes=2)), whole)


@pytest.mark.parametrize("weights", [False, True])
def test_compensated_scores_in_parts(weights: bool) -> None:
    model, graph = small("conv_bn")
    graph = tp.weight_graph(model) if weights else graph
    whole = tp.score(model, data("conv_bn"), graph, tp.TPV(compensated=True))
    model.room, model.where = 3, "after"  # what was seen until then does not count
    found = tp.score(model, data("conv_bn"), graph, tp.TPV(compensated=True))
    for key, value in whole.values.items():
        assert gap(found.values[key], value) <= SUMS * float(value.abs().max()), key


def test_factored_scores_in_parts_are_the_same() -> None:
    model, _ = small("conv_bn")
    graph = tp.weight_graph(model)
    whole = tp.score(model, data("conv_bn"), graph, tp.TPV(engine="factored", probes=2))
    model.room = 3
    found = tp.score(model, data("conv_bn"), graph, tp.TPV(engine="factored", probes=2))
    for key, value in whole.values.items():
        assert gap(found.values[key], value) <= SUMS * float(value.max())


@pytest.mark.parametrize("where", ["forward", "backward", "cpu"])
@pytest.mark.parametrize("kind", ["probes", "batched", "per sample", "jbr", "variance"])
def test_wherever_memory_runs_out_nothing_is_left_behind(kind: str, where: str) -> None:
    if kind == "variance" and where == "backward":
        return  # it has no backward pass
    model, graph = small("conv_bn")
    whole = tp.score(model, data("conv_bn"), graph, CRITERIA[kind]())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad_(False)
    model.train()
    model.room, model.where = 3, where
    before = fingerprint(model)
    assert_same(tp.score(model, data("conv_bn"), graph, CRITERIA[kind]()), whole)
    assert_unchanged(model, before)
    model.room = 0
    with pytest.raises(RuntimeError, match="memory"):
        tp.score(model, data("conv_bn"), graph, CRITERIA[kind]())
    assert_unchanged(model, before)


def test_a_sample_that_does_not_fit_is_an_error() -> None:
    model, graph = small("mlp", room=0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        tp.score(model, data("mlp"), graph)
    assert model.sizes == [7, 3, 1]


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    calls = []

    def run(part: slice) -> None:
        calls.append(part)
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        Parts()(4, run)
    assert calls == [slice(0, 4)]


def test_the_drift_of_a_plan_in_parts() -> None:
    model, graph = small("conv_bn")
    plan = plan_without(graph, {graph.groups[0].id: [0, 2]})
    whole = tp.TPV(probes=2).drift(model, data("conv_bn"), plan)
    model.room = 2
    assert tp.TPV(probes=2).drift(model, data("conv_bn"), plan) == pytest.approx(whole, rel=SUMS)


def test_parts_are_consecutive_and_streams_are_put_back() -> None:
    parts, generators = Parts(), [stream(0, 0, probe) for probe in range(2)]
    wanted = [torch.rand(11, generator=stream(0, 0, probe), dtype=torch.float64) for probe in range(2)]
    sizes = iter([None, None, 2, None, 1, 1, 1, 1, 1, 1, 1, 1, 1])  # fits twice at 2, then no longer

    def run(part: slice) -> tuple[slice, list[Tensor]]:
        drawn = [torch.rand(part.stop - part.start, generator=g, dtype=torch.float64) for g in generators]
        fits = next(sizes)
        if fits is None or fits < part.stop - part.start:
            raise torch.OutOfMemoryError("out of memory")
        return part, drawn

    found = parts(11, run, generators)
    assert [p for part, _ in found for p in range(part.start, part.stop)] == list(range(11))
    for probe in range(2):
        assert torch.equal(torch.cat([drawn[probe] for _, drawn in found]), wanted[probe])
    assert parts.limit == 1


def test_streams_differ_between_seeds_batches_and_probes() -> None:
    keys = [(s, b, p) for s in range(3) for b in range(3) for p in range(3)] + [(1, 11, 1), (11, 1, 1), (1, 1, 11)]
    drawn = {tuple(torch.randint(0, 2**40, (2,), generator=stream(*key)).tolist()) for key in keys}
    assert len(drawn) == len(keys)
    assert torch.equal(torch.rand(3, generator=stream(1, 2, 3)), torch.rand(3, generator=stream(1, 2, 3)))
