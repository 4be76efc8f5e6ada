"""Models of timm stay models of timm: what they say of their widths, new classifiers, features, no classifier."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import tpvprune as tp
from tests.helpers import plan_without, random_gone

SIZES = {"test_vit": 160, "mobilenetv3_small_050": 64, "densenet121": 64}
NAMED = ("test_resnet", "test_vit", "test_convnext", "test_byobnet", "test_efficientnet", "mobilenetv3_small_050")


def made(name: str, **args: object) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, **args).eval()
    return model, torch.randn(2, 3, SIZES.get(name, 64), SIZES.get(name, 64))


def halved(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    graph = tp.trace(model, inputs[:1])
    return tp.apply(model, plan_without(graph, random_gone(graph, 0)))


@pytest.mark.parametrize("name", [*NAMED, pytest.param("densenet121", marks=pytest.mark.slow)])
def test_feature_info_and_a_new_classifier_know_the_new_widths(name: str) -> None:
    model, inputs = made(name, num_classes=7)
    before = copy.deepcopy(model.feature_info)
    small = halved(model, inputs)
    assert model.feature_info == before
    modules = dict(small.named_modules())
    for info, dense in zip(small.feature_info, before, strict=True):
        seen: list[int] = []
        handle = modules[info["module"]].register_forward_hook(lambda m, a, out, seen=seen: seen.extend(out.shape[1:]))
        with torch.no_grad():
            small(inputs)
        handle.remove()
        assert info["num_chs"] in (seen[0], seen[-1])
        assert info["num_chs"] < dense["num_chs"]
    small.reset_classifier(5)
    with torch.no_grad():
        assert small.eval()(inputs).shape == (2, 5)
    assert small.get_classifier().in_features == small.head_hidden_size


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_without_a_classifier_what_comes_out_keeps_its_width_and_the_rest_is_cut(name: str) -> None:
    model, inputs = made(name, num_classes=0)
    small = halved(model, inputs)
    with torch.no_grad():
        assert small(inputs).shape == model(inputs).shape == (2, model.num_features)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_features_keep_their_widths_and_what_lies_between_is_cut(name: str) -> None:
    model, inputs = made(name, features_only=True)
    small = halved(model, inputs)
    with torch.no_grad():
        dense, found = model(inputs), small(inputs)
    assert [f.shape for f in found] == [f.shape for f in dense]
    assert small.feature_info.channels() == model.feature_info.channels() == [f.shape[1] for f in found]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_classifier_of_other_classes_can_be_had_from_a_saved_model(tmp_path) -> None:
    model, inputs = made("test_resnet", num_classes=7)
    small = halved(model, inputs)
    tp.save(small, tmp_path / "out")
    again = tp.load(tmp_path / "out", skeleton=timm.create_model("test_resnet", num_classes=7))
    assert again.feature_info == small.feature_info
    again.reset_classifier(3)
    with torch.no_grad():
        assert again(inputs).shape == (2, 3)


def test_a_height_that_equals_the_channels_is_not_taken_for_them() -> None:
    model, inputs = made("test_mambaout", num_classes=3)  # channels last, and 16 of them at 16 x 16 positions
    small = halved(model, inputs)
    assert model.stages[0](model.stem(inputs)).shape[1:] == (16, 16, 16)
    with torch.no_grad():
        left = small.stages[0](small.stem(inputs)).shape[-1]
    assert small.feature_info[0]["num_chs"] == left < 16
