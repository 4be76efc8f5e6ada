"""Mistakes that were made once: each test names what a user would have met."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import tpvprune as tp
from tests.helpers import Built
from tpvprune.report import compare
from tpvprune.zoo.data import input_size


def test_a_single_output_is_not_called_a_perfect_softmax():
    model = timm.create_model("test_resnet", num_classes=1).eval()
    inputs = torch.randn(4, 3, 32, 32)
    graph = tp.trace(model, inputs)
    with pytest.raises(tp.ModelError, match="head='logits'"):
        tp.score(model, [inputs], graph)
    scores = tp.score(model, [inputs], graph, tp.TPV(head="logits"))
    assert max(float(value.max()) for value in scores.values.values()) > 0
    other = copy.deepcopy(model)
    nn.init.constant_(other.get_classifier().bias, 3.0)
    assert compare({"other": other}, model, [inputs])[0]["other"]["mse"] > 1
    tuned = tp.finetune(other, [inputs], model, tp.Finetune(epochs=3, lr=0.01))
    assert compare({"t": tuned}, model, [inputs])[0]["t"]["mse"] < compare({"o": other}, model, [inputs])[0]["o"]["mse"]


def test_a_timm_model_of_other_arguments_is_not_rebuilt_as_the_standard_one(tmp_path):
    torch.manual_seed(0)
    make = lambda: timm.create_model("test_resnet", num_classes=10, act_layer="gelu").eval()  # noqa: E731
    model, inputs = make(), torch.randn(2, 3, 64, 64)
    graph = tp.trace(model, inputs)
    small = tp.apply(model, tp.allocate(tp.score(model, [inputs], graph), graph, tp.Budget(macs=0.6)))
    tp.save(small, tmp_path)
    with pytest.raises(tp.CheckpointError, match="skeleton"):
        tp.load(tmp_path)
    torch.testing.assert_close(tp.load(tmp_path, skeleton=make())(inputs), small(inputs))


def test_leftover_batches_of_an_accumulation_still_count(mlp: Built):
    inputs = mlp.inputs
    other = copy.deepcopy(mlp.model)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    tuned = tp.finetune(other, [inputs] * 3, mlp.model, tp.Finetune(epochs=1, lr=0.01, accumulate=4, warmup=0.0))
    moved = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), other.parameters(), strict=True)]
    assert any(moved)


def test_precisions_can_follow_each_other_and_leave_no_wrapper(mlp: Built):
    model = copy.deepcopy(mlp.model).float()
    inputs = mlp.inputs.float()
    for precision in ("no", "bf16", "no"):
        tuned = tp.finetune(model, [inputs], model, tp.Finetune(epochs=1, precision=precision))
        assert "forward" not in tuned.__dict__
        assert tuned(inputs).dtype == torch.float32


def test_input_channels_are_a_convolutions_and_not_a_position_embeddings():
    model = nn.Sequential()
    model.pos_embed = nn.Parameter(torch.zeros(1, 14, 14, 8))
    model.append(nn.Conv2d(3, 8, 3))
    assert input_size(model, 32) == (3, 32, 32)


def test_held_out_batches_are_checked_before_any_work(mlp: Built):
    with pytest.raises(tp.DataError, match="once only"):
        tp.prune(mlp.model, [mlp.inputs], tp.Budget(macs=0.6), held_out=iter([mlp.inputs]))


def test_an_inplace_activation_between_convolution_and_norm_is_seen():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(6),
    )
    model = nn.Sequential(net, nn.Flatten(), nn.Linear(6 * 4 * 4, 3)).double().eval()
    inputs = torch.randn(8, 2, 8, 8, dtype=torch.float64)
    graph = tp.trace(model, inputs)
    keep = {graph.groups[0].id: torch.arange(8) < 5}
    small = tp.apply(model, tp.Plan(keep, graph))
    refitted = tp.reconstruct(small, [inputs], model)
    assert torch.equal(refitted[0][4].running_mean, small[0][4].running_mean)


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "name: a\nmodel: {name: b}\nseed: 2024-99-99\n"])
def test_odd_yaml_is_refused_by_name(text):
    from tpvprune.recipe import parse_recipe

    with pytest.raises(tp.RecipeError, match=r"f\.yaml"):
        parse_recipe(text, "f.yaml")


def test_a_description_cannot_smuggle_a_checkpoint_in():
    from tpvprune.zoo.models import create_model

    with pytest.raises(tp.ModelError, match="checkpoint_path"):
        create_model("test_resnet", args={"checkpoint_path": "evil.pth"})


def test_many_small_batches_take_few_threads(conv_bn: Built, monkeypatch):
    from tpvprune.recovery import reconstruct as module

    seen = []
    strands = module.strands
    monkeypatch.setattr(module, "strands", lambda m, b, *rest: seen.append(len(b)) or strands(m, b, *rest))
    plan = tp.Plan({g.id: torch.arange(g.units) > 0 for g in conv_bn.graph.groups}, conv_bn.graph)
    small = tp.apply(conv_bn.model, plan)
    many = [conv_bn.inputs[:1] + i for i in range(40)]
    one = [torch.cat(many)]
    a, b = (tp.reconstruct(small, batches, conv_bn.model) for batches in (many, one))
    assert max(seen) <= module.MOST_STRANDS
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)
