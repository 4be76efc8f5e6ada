"""Cuts against those of torch-pruning, which walks the autograd graph (Fang 2023, arXiv 2301.12900), where it can."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import tpvprune as tp
from tests.cases import example, randomise
from tests.helpers import built, gap, outputs, plan_without

torch_pruning = pytest.importorskip("torch_pruning")

CASES = ("mlp", "conv_bn", "residual", "depthwise", "concat", "flatten", "layernorm_stream", "grouped")
MODELS = {"resnet10t": 64, "mobilenetv2_035": 64, "convnext_atto": 64}


def theirs(model: nn.Module, inputs: torch.Tensor, root: str, channels: list[int]) -> nn.Module:
    """torch-pruning's model without these channels of a layer."""
    small = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(small.requires_grad_(True), inputs, verbose=False)
        layer = small.get_submodule(root)
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, cut, channels).prune()
    return small


def assert_cut_the_same(model: nn.Module, inputs: torch.Tensor, graph: tp.Graph, name: str) -> None:
    group = graph[name]
    writer = next(m for m in group.of_role("produce") if m.layer == name)
    units = sorted({0, group.units // 2})
    if len(units) == group.units:
        units = units[:1]
    small = tp.apply(model, plan_without(graph, {name: units}))
    other = theirs(model, inputs, name, writer.entries(group.units)[units].flatten().tolist())
    assert {k: p.shape for k, p in small.named_parameters()} == {k: p.shape for k, p in other.named_parameters()}
    assert gap(outputs(small, inputs), outputs(other, inputs)) <= 1e-10 * float(outputs(model, inputs).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_every_group_of_a_small_net_is_cut_as_torch_pruning_cuts_it(name: str) -> None:
    b = built(name)
    for group in b.graph.groups:
        assert_cut_the_same(b.model, b.inputs, b.graph, group.id)


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_timm_models_are_cut_as_torch_pruning_cuts_them(name: str) -> None:
    model = randomise(timm.create_model(name, pretrained=False, num_classes=5))
    inputs = example(1, 3, MODELS[name], MODELS[name])
    graph = tp.trace(model, inputs)
    for group in graph.groups[:: max(1, len(graph.groups) // 6)]:
        assert_cut_the_same(model, inputs, graph, group.id)
