"""Measuring itself, with clocks that say what is found."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.fakeclock import FakeClock
from tpvprune.timing import MOST_REPEATS, latencies, measured_latency, milliseconds, milliseconds_inside

CPU = torch.device("cpu")


class Script:
    """A clock that a run moves by the next of the seconds it is given, the last one for ever."""

    def __init__(self, **seconds: list[float]) -> None:
        self.seconds, self.now, self.order = seconds, 0.0, []

    def run(self, name: str) -> None:
        self.order.append(name)
        left = self.seconds[name]
        self.now += left.pop(0) if len(left) > 1 else left[0]

    def __call__(self) -> float:
        return self.now


def test_the_median_of_what_follows_the_warm_up_counts() -> None:
    clock = Script(a=[9, 9, 1, 5, 2], b=[9, 9, 4, 3, 8])
    runs = {name: partial(clock.run, name) for name in "ab"}
    assert milliseconds(runs, CPU, rounds=3, clock=clock) == pytest.approx({"a": 2000, "b": 4000})
    assert clock.order == list("ab" * 5)


def test_what_is_short_is_repeated_and_divided() -> None:
    clock = Script(a=[1e-4], b=[1e-9], c=[4e-4])
    runs = {name: partial(clock.run, name) for name in "abc"}
    assert milliseconds(runs, CPU, rounds=2, warmup=1, clock=clock) == pytest.approx({"a": 0.1, "b": 1e-6, "c": 0.4})
    assert [clock.order.count(name) for name in "abc"] == [1 + 2 * 5, 1 + 2 * MOST_REPEATS, 3]


class Nested(nn.Module):
    """Calls a layer twice, and itself takes as long as `own` says."""

    def __init__(self, clock: Script) -> None:
        super().__init__()
        self.inner, self.clock = nn.Identity(), clock
        self.inner.register_forward_hook(lambda *_: clock.run("inner"))

    def forward(self, x: Tensor) -> Tensor:
        self.clock.run("own")
        return self.inner(self.inner(x))


def test_modules_are_timed_inside_without_what_they_call() -> None:
    clock = Script(own=[50, 1, 3, 2], inner=[50, 50, 7])
    model = nn.Sequential(Nested(clock), nn.Identity())
    found = milliseconds_inside(
        {"outer": model[0], "inner": model[0].inner}, lambda: model(torch.ones(1)), CPU, rounds=3, warmup=1, clock=clock
    )
    assert found == pytest.approx({"outer": 2000, "inner": 14000})
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    assert len(model[0].inner._forward_hooks) == 1  # its own


def test_a_whole_model_is_measured_in_eval_mode_and_left_as_it_was(conv_bn) -> None:
    with FakeClock().running() as clock:
        modes = []
        model = nn.Sequential(copy.deepcopy(conv_bn.model), nn.Linear(4, 4, dtype=torch.float64))
        model.train()
        model[1].register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
        found = measured_latency(model, conv_bn.inputs, rounds=2, clock=clock)
        parts = 1e-3 * (6 * 3 + 5 * 6 + 4 * 5 + 4 * 4) + 1e-2 * (6 + 5)
        assert found == pytest.approx(1e3 * parts)
        assert set(modes) == {(False, False)}
        assert model.training
        assert model[1].training
        assert measured_latency(model, (conv_bn.inputs,), rounds=1, clock=clock) == pytest.approx(1e3 * parts)
    assert set(latencies({"a": model}, conv_bn.inputs, rounds=1)) == {"a"}
    with pytest.raises(tp.ModelError, match="example input is a str"):
        measured_latency(model, "image", rounds=1)
