"""Distillation beside its defaults: features, averages, mixtures, early ends, stops in the middle."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import tpvprune as tp
from tests.helpers import Versioned, assert_same_state, gap, outputs, plan_without
from tests.recovery.test_finetune import cut, kl
from tpvprune.errors import CheckpointError
from tpvprune.recovery import finetune as module
from tpvprune.recovery.state import load_state, random_state, save_state, set_random_state


def loader(batches: list[Tensor], seed: int = 1) -> DataLoader:
    data = TensorDataset(torch.cat(batches))
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(seed))


class Noisy(nn.Module):
    """A network whose training draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.a(x))))


def noisy() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Noisy().eval()
    batches = [torch.randn(16, 6) for _ in range(3)]
    return model, tp.apply(model, plan_without(tp.trace(model, batches[0]), {"a": [0, 3, 5, 7]})), batches


SETTINGS = {
    "plain": {},
    "ema": {"ema": 0.9},
    "mixup": {"mixup": 0.4, "cutmix": 0.0},
    "accumulated": {"accumulate": 2},
    "momentum": {"optimizer": "momentum", "schedule": "step"},
    "kinds of numbers in its state": {"optimizer": "adafactorbv"},
    "a stream of its own in its state": {"optimizer": "kron"},
}


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stop", [4, 6, 7, 11])
def test_a_stopped_run_goes_on_to_the_same_result(
    name: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, small, batches = noisy()
    settings = tp.Finetune(epochs=3, lr=1e-2, **SETTINGS[name])

    def once(save: Path | None, stop: int = 0) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(7)
        losses: list[float] = []

        def tell(stage: str, done: int, total: int | None) -> None:
            if done == stop:
                raise KeyboardInterrupt

        try:
            found = tp.finetune(
                small, loader(batches), model, settings, save=save, save_every=1, progress=tell,
                log=lambda told: losses.append(told["loss"]),
            )  # fmt: skip
        except KeyboardInterrupt:
            return small, losses
        return found, losses

    monkeypatch.setattr("numpy.random.beta", lambda a, b: 0.3)  # numpy's stream is not seeded here
    whole, losses = once(None)
    _, first = once(tmp_path, stop)
    assert (tmp_path / "last.safetensors").is_file()
    torch.manual_seed(99)  # whatever was drawn since must not matter
    learnt = []
    real = module._Training._learn
    monkeypatch.setattr(module._Training, "_learn", lambda self, *a: (learnt.append(1), real(self, *a))[1])
    again, rest = once(tmp_path)
    assert_same_state(again.state_dict(), whole.state_dict())
    assert losses == first + rest
    assert 18 - stop <= len(learnt) <= 18 - stop + settings.accumulate
    assert gap(whole.a.weight, small.a.weight) > 1e-3


@pytest.mark.parametrize("stop", [4, 6])
@pytest.mark.parametrize("batched", [False, True])
def test_orders_that_samplers_draw_are_drawn_again(batched: bool, stop: int, tmp_path: Path) -> None:
    model, small, batches = noisy()
    data = TensorDataset(torch.cat(batches))

    def once(save: Path | None, stop: int = 0) -> nn.Module:
        torch.manual_seed(7)
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
        read = DataLoader(data, batch_sampler=BatchSampler(sampler, 8, False)) if batched else None
        read = read or DataLoader(data, 8, sampler=sampler)

        def tell(stage: str, done: int, total: int | None) -> None:
            if done == stop:
                raise KeyboardInterrupt

        return tp.finetune(small, read, model, tp.Finetune(epochs=2, lr=1e-2), save=save, save_every=1, progress=tell)

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path, stop + 1)
    assert_same_state(once(tmp_path).state_dict(), once(None).state_dict())
    with pytest.raises(CheckpointError, match="had 1 generators of their own, and these have 0"):
        tp.finetune(small, DataLoader(data, 8), model, tp.Finetune(epochs=2, lr=1e-2), save=tmp_path)


def test_workers_that_persist_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, small, batches = noisy()
    read = DataLoader(TensorDataset(torch.cat(batches)), 8, num_workers=1, persistent_workers=True)
    tp.finetune(small, read, model, tp.Finetune(epochs=1))
    assert "persistent_workers" not in caplog.text
    tp.finetune(small, read, model, tp.Finetune(epochs=1), save=tmp_path)
    assert "persistent_workers=False where the result has to be the same" in caplog.text


@pytest.mark.parametrize("settings", [{"ema": 0.9}, {"patience": 2}])
def test_modules_that_ask_for_a_version_of_their_state_are_taught(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Versioned(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(16, 6) for _ in range(2)]
    small = tp.apply(model, plan_without(tp.trace(model, batches[0]), {"0": [0, 3]}))
    held = {"held_out": batches} if "patience" in settings else {}
    finetune = partial(tp.finetune, small, batches, model, tp.Finetune(epochs=1, **settings), save=tmp_path, **held)
    assert_same_state(finetune().state_dict(), finetune().state_dict())


def test_a_finished_run_is_not_run_again_and_another_is_refused(tmp_path: Path) -> None:
    model, small, batches = noisy()
    settings = tp.Finetune(epochs=1)
    found = tp.finetune(small, batches, model, settings, save=tmp_path)
    told: list[Any] = []
    again = tp.finetune(small, batches, model, settings, save=tmp_path, progress=lambda *a: told.append(a))
    assert_same_state(found.state_dict(), again.state_dict())
    assert told == []
    with pytest.raises(CheckpointError, match="another folder"):
        tp.finetune(small, batches, model, tp.Finetune(epochs=2), save=tmp_path)
    (tmp_path / "last.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="holds no state of a training run"):
        tp.finetune(small, batches, model, settings, save=tmp_path)


def test_a_moving_average_is_the_average_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, batches = cut("mlp")
    seen: list[dict[str, Tensor]] = []
    real = module.Masks.weights

    def after_step(self: Any) -> None:
        real(self)
        seen.append({n: p.detach().clone() for n, p in student[0].named_parameters()})

    student: list[nn.Module] = []
    init = module._Training.__init__
    monkeypatch.setattr(
        module._Training, "__init__", lambda self, *a: (init(self, *a), student.append(self.student))[0]
    )
    monkeypatch.setattr(module.Masks, "weights", after_step)
    found = tp.finetune(small, batches, model, tp.Finetune(epochs=3, lr=1e-2, ema=0.8))
    average = seen[0]  # timm starts from the weights of the first step
    for step, weights in enumerate(seen[1:], 1):
        decay = min(0.8, 1 - (1 + step) ** (-2 / 3))
        average = {n: decay * average[n] + (1 - decay) * weights[n] for n in average}
    for name, value in found.named_parameters():
        torch.testing.assert_close(value.detach(), average[name], rtol=0, atol=1e-5)
    plain = tp.finetune(small, batches, model, tp.Finetune(epochs=3, lr=1e-2))
    assert gap(next(plain.parameters()), next(found.parameters())) > 1e-4


def test_features_come_closer_if_they_are_asked_to() -> None:
    model, small, batches = cut("conv_bn")
    from tpvprune.plan import plan_of

    rows = plan_of(small).kept_entries("conv2.weight", 0)
    assert len(rows) < model.conv2.out_channels
    held: dict[str, Tensor] = {}

    def distance(net: nn.Module) -> float:
        handles = [
            m.conv2.register_forward_hook(lambda a, b, out, k=k: held.__setitem__(k, out))
            for k, m in (("mine", net), ("wanted", model))
        ]
        x = torch.cat(batches)
        outputs(net, x), outputs(model, x)
        for handle in handles:
            handle.remove()
        return float((held["mine"] - held["wanted"][:, rows]).square().mean())

    same = {"epochs": 10, "lr": 1e-2, "norms": "freeze"}
    plain = tp.finetune(small, batches, model, tp.Finetune(**same))
    asked = tp.finetune(small, batches, model, tp.Finetune(**same, features=("conv2",), feature_weight=10.0))
    assert distance(asked) < 0.5 * distance(plain)
    assert not any(m._forward_hooks for m in [*asked.modules(), *model.modules()])
    with pytest.raises(tp.InputError, match="'conv9' is no module"):
        tp.finetune(small, batches, model, tp.Finetune(features=("conv9",), feature_weight=1.0))
    with pytest.raises(tp.InputError, match="features"):
        tp.Finetune(feature_weight=1.0)


def test_training_ends_when_held_out_images_say_so_and_gives_back_the_best(tmp_path: Path) -> None:
    model, small, batches = cut("mlp")
    held = [torch.randn(32, *batches[0].shape[1:], generator=torch.Generator().manual_seed(8))]
    with torch.no_grad():
        for parameter in small.parameters():  # far off, so that there is something to learn
            parameter.mul_(-1)
    settings = tp.Finetune(epochs=40, lr=0.3, clip=1e3, schedule="constant", warmup=0.0, patience=2)
    told: list[dict[str, float]] = []
    found = tp.finetune(small, batches, model, settings, held_out=held, log=told.append, save=tmp_path)
    measured = [entry["held_out"] for entry in told]
    best = measured.index(min(measured))
    assert len(told) == best + 3 < 40
    assert kl(found, model, held) == pytest.approx(min(measured), rel=1e-4)
    assert min(measured) < measured[-1]
    assert load_state(tmp_path / "best.safetensors")["held_out"] == min(measured)
    with pytest.raises(tp.InputError, match="give held_out"):
        tp.finetune(small, batches, model, settings)


def test_the_model_given_comes_back_if_no_epoch_is_closer(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, small, batches = cut("mlp")
    held = [torch.randn(32, *batches[0].shape[1:], generator=torch.Generator().manual_seed(8))]
    wild = tp.Finetune(epochs=2, lr=3.0, clip=1e3, schedule="constant", warmup=0.0, ema=0.5)
    told: list[dict[str, float]] = []
    found = tp.finetune(small, batches, model, wild, held_out=held, log=told.append, save=tmp_path)
    assert_same_state(found.state_dict(), small.state_dict())
    before = kl(small, model, held)
    assert [entry["held_out_before"] for entry in told] == [pytest.approx(before, rel=1e-4)] * 2
    assert min(entry["held_out"] for entry in told) > before
    assert "no epoch came closer" in caplog.text
    assert "lower lr=3" in caplog.text
    again = tp.finetune(small, batches, model, wild, held_out=held, save=tmp_path)  # from the state of the end
    assert_same_state(again.state_dict(), small.state_dict())
    gone = tp.finetune(small, batches, model, wild)
    assert kl(gone, model, held) > before


def test_a_sample_alone_is_learnt_from_with_the_statistics_there_are() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    torch.manual_seed(0)
    batches = [torch.randn(n, 4) for n in (8, 1)]
    small = tp.apply(model, plan_without(tp.trace(model, batches[0]), {"0": [1, 4]}))
    found = tp.finetune(small, batches, model, tp.Finetune(epochs=1, lr=1e-2, norms="train"))
    assert found[1].num_batches_tracked == small[1].num_batches_tracked + 1
    assert not torch.equal(found[3].weight, small[3].weight)


def test_labels_count_on_held_out_images_as_they_do_in_training() -> None:
    model, small, batches = cut("mlp")
    images = torch.randn(32, *batches[0].shape[1:], generator=torch.Generator().manual_seed(8))
    labels = torch.arange(32) % 3
    told: list[dict[str, float]] = []
    labelled = [(b, torch.zeros(len(b), dtype=torch.int64)) for b in batches]
    settings = tp.Finetune(epochs=1, lr=1e-9, label_weight=0.25)
    tp.finetune(small, labelled, model, settings, held_out=[(images, labels)], log=told.append)
    expected = 0.75 * kl(small, model, [images]) + 0.25 * float(F.cross_entropy(outputs(small, images), labels))
    assert told[0]["held_out_before"] == pytest.approx(expected, rel=1e-4)
    tp.finetune(small, labelled, model, settings, held_out=[images], log=told.append)
    assert told[1]["held_out_before"] == pytest.approx(kl(small, model, [images]), rel=1e-4)


def test_mixtures_are_answered_by_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    model, small, batches = cut("conv_bn")
    before = [b.clone() for b in batches]
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    monkeypatch.setattr("numpy.random.beta", lambda a, b: 0.25)
    tp.finetune(small, batches, model, tp.Finetune(epochs=1, mixup=1.0))
    mixed = [s for s in seen if len(s) > 1]
    for got, plain in zip(mixed, batches, strict=True):
        torch.testing.assert_close(got, 0.25 * plain + 0.75 * plain.flip(0))
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))
    odd = [b[:5] for b in batches]
    seen.clear()
    tp.finetune(small, odd, model, tp.Finetune(epochs=1, cutmix=1.0))
    assert [len(s) for s in seen if len(s) > 1] == [4] * 4


@pytest.mark.parametrize("schedule", ["cosine", "tanh", "step", "multistep", "poly", "constant"])
def test_schedules_are_timms(schedule: Any) -> None:
    model, small, batches = cut("mlp")
    told: list[dict[str, float]] = []
    settings = tp.Finetune(epochs=6, lr=0.02, schedule=schedule, warmup=0.2)
    tp.finetune(small, batches, model, settings, log=told.append)
    rates = [entry["lr"] for entry in told]
    assert rates[-1] == 0.02 if schedule == "constant" else rates[-1] < 0.005
    assert all(entry["samples_per_second"] > 0 for entry in told)
    assert told[-1]["seconds_left"] == 0


@pytest.mark.parametrize(
    "change",
    [{"ema": 1.0}, {"mixup": -1}, {"cutmix": -1}, {"patience": 0}, {"schedule": "square"}, {"feature_weight": -1}],
    ids=str,
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(tp.InputError, match=next(iter(change))):
        tp.Finetune(**change)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "a": [1, 2.5, None, "x", True], "b": {3: torch.arange(4), "c": {"d": torch.zeros(2, dtype=torch.bfloat16)}},
        "inf": float("inf"), "random": random_state(), "kinds": (torch.bfloat16, (1, [2, ()])),
    }  # fmt: skip
    save_state(tmp_path / "s.safetensors", state)
    found = load_state(tmp_path / "s.safetensors")
    assert found["a"] == state["a"]
    assert found["inf"] == float("inf")
    assert found["kinds"] == state["kinds"]
    assert torch.equal(found["b"][3], state["b"][3])
    assert found["b"]["c"]["d"].dtype == torch.bfloat16
    import random

    import numpy as np

    drawn = torch.rand(3), np.random.rand(3), random.random()
    set_random_state(found["random"])
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2] == again[2]
    with pytest.raises(TypeError, match="cannot be saved"):
        save_state(tmp_path / "t.safetensors", {"a": object()})
    assert not (tmp_path / "t.safetensors").exists()


def test_a_write_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": 1})

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        save_state(path, {"a": 2})
    monkeypatch.undo()
    assert load_state(path) == {"a": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["s.safetensors"]


def test_models_given_are_untouched() -> None:
    model, small, batches = cut()
    states = [copy.deepcopy(m.state_dict()) for m in (model, small)]
    tp.finetune(small, batches, model, tp.Finetune(epochs=1, ema=0.9, mixup=0.2, features=("fc",), feature_weight=1.0))
    for m, state in zip((model, small), states, strict=True):
        assert_same_state(m.state_dict(), state)


@pytest.mark.parametrize("fails", [False, True])
def test_an_accelerator_of_the_caller_stays_as_it_was(fails: bool) -> None:
    model, small, batches = noisy()
    theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4, cpu=True)
    before = dict(theirs.state.__dict__), dict(theirs.gradient_state.__dict__)

    def stop(stage: str, done: int, total: int | None) -> None:
        if fails:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
            tp.finetune(small, batches, model, tp.Finetune(epochs=1), held_out=batches, progress=stop)
        assert (theirs.state.__dict__, theirs.gradient_state.__dict__) == before
        assert (theirs.mixed_precision, theirs.gradient_accumulation_steps) == ("bf16", 4)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_half_precision_is_of_both_models() -> None:
    model, small, batches = noisy()
    seen: list[torch.dtype] = []
    handle = model.a.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    tp.finetune(small, batches, model, tp.Finetune(epochs=1, precision="bf16"), held_out=batches)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
