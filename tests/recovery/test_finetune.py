from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tpvprune as tp
from tests.helpers import assert_same_state, built, gap, outputs, plan_without, random_gone
from tpvprune.plan import plan_of

QUICK = tp.Finetune(epochs=3, lr=1e-2)


def cut(name: str = "conv_bn", share: float = 0.4) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """(dense, pruned, batches) in float32, the dense model with statistics that fit the batches."""
    b = built(name)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(16, *b.inputs.shape[1:], generator=generator) for _ in range(4)]
    model = tp.reestimate_batchnorm(copy.deepcopy(b.model).float(), batches)
    return model, tp.apply(model, plan_without(b.graph, random_gone(b.graph, 1, share))), batches


def kl(model: nn.Module, teacher: nn.Module, batches: list[Tensor]) -> float:
    x = torch.cat(batches)
    p, q = outputs(teacher, x).log_softmax(1), outputs(model, x).log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "vit"])
def test_distillation_lowers_kl_without_labels(name: str) -> None:
    model, small, batches = cut(name)
    settings = tp.Finetune(epochs=12, lr=1e-2, norms="train")  # what was cut is not refitted
    found = tp.finetune(small, batches, model, settings)
    assert kl(found, model, batches) < 0.8 * kl(small, model, batches)


def test_models_given_are_untouched_and_modes_kept() -> None:
    model, small, batches = cut()
    model.train()
    small.fc.weight.requires_grad_(False)
    states = [copy.deepcopy(m.state_dict()) for m in (model, small)]
    found = tp.finetune(small, batches, model, QUICK)
    for m, state in zip((model, small), states, strict=True):
        assert_same_state(m.state_dict(), state)
        assert all(p.grad is None for p in m.parameters())
    assert all(m.training for m in model.modules())
    assert [m.training for m in found.modules()] == [m.training for m in small.modules()]
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in small.parameters()]
    assert all(p.grad is None for p in found.parameters())
    assert plan_of(found).diff(plan_of(small)) == {}


def test_the_same_seed_gives_the_same_result() -> None:
    model, small, batches = cut()
    data = TensorDataset(torch.cat(batches))

    def once(seed: int) -> nn.Module:
        loader = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return tp.finetune(small, loader, model, QUICK)

    assert_same_state(once(1).state_dict(), once(1).state_dict())
    assert gap(once(1).fc.weight.detach(), once(2).fc.weight.detach()) > 0


def test_one_shot_iterators_are_refused() -> None:
    model, small, batches = cut()
    for one_shot in (iter(batches), (b for b in batches)):
        with pytest.raises(tp.DataError, match="give a list or a DataLoader"):
            tp.finetune(small, one_shot, model, QUICK)
    with pytest.raises(tp.DataError, match="there is no batch"):
        tp.finetune(small, [], model, QUICK)


def test_labels_are_needed_only_if_asked_for() -> None:
    model, small, batches = cut()
    labelled = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches]
    plain = tp.finetune(small, batches, model, QUICK)
    assert_same_state(tp.finetune(small, labelled, model, QUICK).state_dict(), plain.state_dict())
    asks = tp.Finetune(epochs=3, lr=1e-2, label_weight=1.0)
    x = torch.cat(batches)
    before, after = (
        float(outputs(m, x).softmax(1)[:, 0].mean()) for m in (small, tp.finetune(small, labelled, model, asks))
    )
    assert after > before
    for missing in (batches, [(x, torch.full((len(x),), -1)) for x in batches], [(x, None) for x in batches]):
        with pytest.raises(tp.DataError, match="label_weight is above zero"):
            tp.finetune(small, missing, model, asks)


def test_frozen_norms_keep_their_statistics() -> None:
    model, small, batches = cut()
    frozen = tp.finetune(small, batches, model, tp.Finetune(epochs=1, norms="freeze"))
    trained = tp.finetune(small, batches, model, tp.Finetune(epochs=1, norms="train"))
    assert torch.equal(frozen.bn1.running_mean, small.bn1.running_mean)
    assert not torch.equal(trained.bn1.running_mean, small.bn1.running_mean)


def test_accumulation_equals_a_larger_batch() -> None:
    # Norms are frozen and the optimiser is plain, so that only the mean gradient counts.
    model, small, batches = cut("mlp")
    pairs = [torch.cat(batches[:2]), torch.cat(batches[2:])]
    same = {"epochs": 2, "lr": 1e-2, "optimizer": "sgd", "clip": 1e6, "norms": "freeze"}
    single = tp.finetune(small, pairs, model, tp.Finetune(**same))
    halves = tp.finetune(small, batches, model, tp.Finetune(**same, accumulate=2))
    for a, b in zip(single.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_schedule_ends_at_zero_and_epochs_are_logged() -> None:
    model, small, batches = cut("mlp")
    told, log = [], []
    tp.finetune(small, batches, model, QUICK, progress=lambda *what: told.append(what), log=log.append)
    assert told == [("finetune", n, 12) for n in range(1, 13)]
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert log[0]["loss"] > log[-1]["loss"] > 0
    assert log[-1]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_loss_that_is_nan_is_an_error() -> None:
    model, small, batches = cut("mlp")
    with pytest.raises(tp.NonFiniteError, match="lower lr"):
        tp.finetune(small, [torch.full_like(batches[0], torch.nan)], model, QUICK)


def test_float16_weights_are_said_to_be_the_cause() -> None:
    model, small, batches = cut("mlp")
    with torch.no_grad():
        small[0].bias[0] = -100  # a channel that is never on, and without gradients
    half = [x.half() for x in batches]
    with pytest.raises(tp.NonFiniteError, match=r"float16.* model.float\(\)"):
        tp.finetune(small.half(), half, model.half(), QUICK)
    with pytest.raises(tp.InputError, match=r"precision='fp16' keeps weights in float32"):
        tp.finetune(small, half, model, tp.Finetune(precision="fp16"))
    small, model = small.float(), model.float()
    tp.finetune(small, batches, model, tp.Finetune(epochs=1, precision="bf16"))  # as the error says


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0}, {"lr": 0}, {"weight_decay": -1}, {"temperature": 0}, {"label_weight": 1.5}, {"warmup": 1},
        {"clip": 0}, {"accumulate": 0}, {"norms": "melt"}, {"precision": "fp8"}, {"epochs": 1.5}, {"accumulate": 1.5},
        {"lr": float("inf")}, {"lr": float("nan")}, {"lr": "0.1"}, {"temperature": float("inf")}, {"features": "fc"},
        {"mixup": float("inf")}, {"weight_decay": float("inf")}, {"feature_weight": float("inf")}, {"patience": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(tp.InputError, match=next(iter(change))):
        tp.Finetune(**change)


def test_an_unknown_optimiser_is_named() -> None:
    model, small, batches = cut("mlp")
    with pytest.raises(tp.InputError, match="optimizer='sgdd' is no optimiser of timm; did you mean sgd"):
        tp.finetune(small, batches, model, tp.Finetune(optimizer="sgdd"))
    for name in ("adahessian", "lookahead_adahessian"):
        with pytest.raises(tp.InputError, match=f"'{name}' takes second derivatives"):
            tp.finetune(small, batches, model, tp.Finetune(optimizer=name))


def test_recover_runs_what_is_asked_in_order() -> None:
    model, small, batches = cut()
    stages: list[str] = []
    found = tp.recover(
        small, batches, teacher=model, batchnorm=True, finetune_with=QUICK, progress=lambda s, *_: stages.append(s)
    )
    assert list(dict.fromkeys(stages)) == ["reconstruct", "batchnorm", "finetune"]
    refitted = tp.reconstruct(small, batches, model)
    by_hand = tp.finetune(tp.reestimate_batchnorm(refitted, batches), batches, model, QUICK)
    assert_same_state(found.state_dict(), by_hand.state_dict())
    only = tp.recover(small, batches, teacher=model, finetune_with=None)
    assert_same_state(only.state_dict(), refitted.state_dict())
    other = [torch.cat(batches)]
    apart = tp.recover(
        small, batches, teacher=model, reconstruct_with=None, finetune_with=QUICK, finetune_batches=other
    )
    assert_same_state(apart.state_dict(), tp.finetune(small, other, model, QUICK).state_dict())


def test_recover_refuses_what_it_cannot_read_again() -> None:
    model, small, batches = cut()
    with pytest.raises(tp.DataError, match="read once only"):
        tp.recover(small, iter(batches), teacher=model)


@pytest.mark.parametrize("frozen", ["some", "all"])
def test_frozen_parameters_stay_unless_all_are(frozen: str) -> None:
    model, small, batches = cut()
    chosen = {"conv1.weight", "fc.bias"} if frozen == "some" else {name for name, _ in small.named_parameters()}
    for name in chosen:
        small.get_parameter(name).requires_grad_(False)
    settings = tp.Finetune(epochs=2, lr=1e-2, weight_decay=0.1, ema=0.5)
    found = tp.finetune(small, batches, model, settings)
    moved = {name for name, p in found.named_parameters() if not torch.equal(p, small.get_parameter(name))}
    everything = {name for name, _ in small.named_parameters()}
    assert moved == (everything - chosen if frozen == "some" else everything)
    assert {name for name, p in found.named_parameters() if not p.requires_grad} == chosen
