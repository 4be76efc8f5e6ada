"""Milliseconds of two models in turns, and what is said of them; with clocks that say what is found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests.fakeclock import FakeClock
from tests.helpers import assert_same_state, built, plan_without, random_gone
from tpvprune.deploy import runtime
from tpvprune.deploy.reasons import Case, Causes, causes_of, findings_of, is_product
from tpvprune.planning.cost import Usage


def pruned(name: str) -> nn.Module:
    b = built(name)
    return tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 0)))


def test_two_models_are_timed_in_turns_at_every_batch() -> None:
    b, small = built("conv_bn"), pruned("conv_bn")
    small.train()
    state = copy.deepcopy(small.state_dict())
    with FakeClock().running() as clock:
        told = tp.bench(
            small, b.inputs[:1], against=b.model, batches=(1, 3), runtimes=["eager"], rounds=4, warmup=2, clock=clock
        )
        timed = [kind for kind, *_ in clock.calls]
        clock.calls.clear()
        seconds = {}
        for name, model in (("dense", b.model), ("pruned", small.eval())):
            start = clock()
            model(b.inputs[:1])
            seconds[name] = clock() - start
    assert len(set(timed)) == 1, "nothing but whole models is called"
    assert [(t.model, t.batch) for t in told.timings] == [(m, n) for n in (1, 3) for m in ("dense", "pruned")]
    for name, taken in seconds.items():
        assert told.at(name, "eager", 1).ms == pytest.approx(taken * 1e3, rel=1e-6)
        assert told.at(name, "eager", 1).low == told.at(name, "eager", 1).high
    assert told.speedup("eager", 1) == pytest.approx(seconds["dense"] / seconds["pruned"], rel=1e-6)
    assert told.models["pruned"]["macs"] == small._tpvprune_plan.macs < told.models["dense"]["macs"] == b.graph.macs()
    assert told.models["pruned"]["params"] == sum(p.numel() for p in small.parameters())
    assert told.measured["threads"] == torch.get_num_threads()
    assert told.measured["device"].startswith("cpu: ")
    assert told.measured["input"] == [list(b.inputs.shape[1:])]
    assert_same_state(small.state_dict(), state)
    with pytest.raises(tp.InputError, match="pruned was not measured in eager at batch 2"):
        told.at("pruned", "eager", 2)


def test_modes_are_given_back() -> None:
    small = pruned("mlp").train()
    tp.bench(small, built("mlp").inputs, against=built("mlp").model, batches=[1], runtimes=["eager"], rounds=1)
    assert all(module.training for module in small.modules())


def test_onnxruntime_runs_both_models() -> None:
    b, small = built("conv_bn"), pruned("conv_bn").float()
    dense = copy.deepcopy(b.model).float()
    told = tp.bench(small, b.inputs.float(), against=dense, batches=[2], runtimes=["onnxruntime"], rounds=2, warmup=1)
    assert [(t.model, t.runtime, t.batch) for t in told.timings] == [(m, "onnxruntime", 2) for m in ("dense", "pruned")]
    assert all(0 < t.low <= t.ms <= t.high for t in told.timings)
    assert told.skipped == {}


@pytest.mark.slow
def test_compiled_models_are_timed() -> None:
    b, small = built("conv_bn"), pruned("conv_bn").float()
    dense = copy.deepcopy(b.model).float()
    told = tp.bench(small, b.inputs.float(), against=dense, batches=(1, 2), runtimes=["compiled"], rounds=2, warmup=1)
    assert told.skipped == {}
    assert len(told.timings) == 4


def test_what_cannot_run_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    b = built("mlp")

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(runtime, "missing_packages", lambda: ["onnx"])
    told = tp.bench(pruned("mlp"), b.inputs, against=b.model, batches=[1], rounds=1)
    assert {t.runtime for t in told.timings} == {"eager"}
    assert told.skipped["compiled"] == "RuntimeError: no compiler"
    assert "pip install 'tpvprune[export]'" in told.skipped["onnxruntime"]
    with pytest.raises(tp.ModelError, match="does not run on an example"):
        tp.bench(pruned("mlp"), torch.zeros(2, 3), against=b.model)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"runtimes": ["tensorrt"]}, "'tensorrt' is none of eager, compiled, onnxruntime"),
        ({"runtimes": []}, "is none of"),
        ({"batches": [0]}, "at least 1"),
        ({"rounds": 0}, "at least 1"),
        ({"batches": 4}, r"bench: batches=4 is one number; give a list, batches=\[4\]"),
        ({"runtimes": "eager"}, r"bench: runtimes='eager' is one string; give a list, runtimes=\['eager'\]"),
    ],
)
def test_wrong_settings_are_refused(wrong, told) -> None:
    with pytest.raises(tp.InputError, match=told):
        tp.bench(pruned("mlp"), built("mlp").inputs, against=built("mlp").model, **wrong)


def case(batch: int, dense: float, pruned: float, spread: float = 0.0, runtime: str = "eager") -> Case:
    return Case(runtime, batch, (dense - spread, dense, dense + spread), (pruned - spread, pruned, pruned + spread))


def test_nothing_is_said_where_milliseconds_fell_along() -> None:
    assert findings_of([case(1, 10, 6), case(8, 80, 45)], 100, 50, Causes(odd=1, light={1: 1, 8: 1})) == ()


def test_each_cause_is_named_where_it_was_found() -> None:
    causes = Causes(odd=0.6, odd_layers=("a", "b", "c", "d"), light={1: 0.7, 8: 0.1}, layers=9)
    first, widths, memory, batch = findings_of([case(1, 10, 9), case(8, 20, 11)], 100, 50, causes)
    assert first == "eager, batch 1: multiply-adds fell by 50%, milliseconds by 10% only"
    assert "60% of the multiply-adds left are in 4 layers" in widths
    assert "(a, b, c, ...)" in widths
    assert "70% at batch 1 of" in memory
    assert "takes 9 ms at batch 1 and 1.38 ms at 8 in eager" in batch
    assert "starting 9 layers" in batch
    slower, none = findings_of([case(1, 10, 12)], 100, 50, Causes())
    assert slower.endswith("milliseconds rose by 20%")
    assert none.startswith("no usual cause")


def test_what_lies_within_the_spread_is_no_difference() -> None:
    (told, _) = findings_of([case(1, 10, 5, spread=3)], 100, 50, Causes())
    assert "milliseconds vary by more than they differ (10 before, 5 now)" in told


def test_where_nothing_left_no_time_is_expected() -> None:
    assert findings_of([case(1, 10, 10)], 100, 99, Causes()) == ("multiply-adds fell by 1%, so no time is saved",)
    # 188 in place of 100 are 88 % more.
    assert findings_of([case(1, 10, 19)], 100, 188, Causes()) == ("multiply-adds rose by 88%, so no time is saved",)
    _, zeros = findings_of([case(1, 10, 10)], 100, 100, Causes(zeros=1234))
    assert "1,234 weights are held at zero" in zeros


def test_causes_are_read_off_the_model() -> None:
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1)).eval()
    graph = tp.trace(dense, torch.zeros(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    for kept, odd in ((8, ()), (9, ("0", "3"))):
        small = tp.apply(dense, plan_without(graph, {"0": list(range(kept, 16))}))
        with FakeClock().running() as clock, torch.no_grad():
            usage = Usage(small, (x,), {})
            found = causes_of(small, dense, usage, {2: ((x,), {})}, clock=clock)
        assert found.odd_layers == odd
        assert found.odd == pytest.approx(1.0 if odd else 0.0)
        assert found.layers == 4
        product, norm = 1e-3 * (3 * kept + kept * 24), 1e-2 * kept
        point = 1e-4 * 2 * kept * 36
        assert found.light[2] == pytest.approx((norm + point) / (product + norm + point))
    masked = tp.mask(dense, plan_without(graph, {"0": [0]}))
    for model in (masked, nn.Sequential(masked)):
        assert causes_of(model, dense, usage, {}).zeros == 24, "one input channel of the last layer"
    both = nn.Sequential(masked)
    graph = tp.weight_graph(both, layers=["0.3"])
    over = tp.mask(both, plan_without(graph, {"0.3.weight": [0, 1, 2]}))  # of which one is zero already
    assert causes_of(over, dense, usage, {}).zeros == sum(int((p == 0).sum()) for p in over[0][3].parameters()) == 26


def test_depthwise_layers_move_data() -> None:
    assert is_product(nn.Conv2d(8, 8, 3))
    assert is_product(nn.Conv2d(8, 8, 3, groups=2))
    assert not is_product(nn.Conv2d(8, 8, 3, groups=8))
    assert not is_product(nn.ReLU())
