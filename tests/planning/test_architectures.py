"""Networks from elsewhere: torchvision, transformers, a U-Net, two inputs and outputs, a recurrent head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import gap, plan_without, random_gone

SOME = 0.3  # of the units of every group


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else [out]
    return [value for value in values if isinstance(value, Tensor)]


def checked(model: nn.Module, inputs: Any, share: float = SOME) -> tuple[tp.Graph, nn.Module]:
    """Cut some of every group: the function is that of the masked model where it should be, costs are as counted."""
    graph = tp.trace(model, inputs if isinstance(inputs, Mapping) else inputs if len(inputs) > 1 else inputs[0])
    gone = random_gone(graph, 0, share)
    small = tp.apply(model, plan_without(graph, gone))
    exact = {group.id: gone[group.id] for group in graph.groups if group.exact_mask}
    assert exact
    plan = plan_without(graph, exact)
    for cut, masked, dense in zip(
        run(tp.apply(model, plan), inputs), run(tp.mask(model, plan), inputs), run(model, inputs), strict=True
    ):
        assert gap(cut, masked) < tolerances.SAME_FUNCTION
        assert cut.shape == dense.shape
    for cut, dense in zip(run(small, inputs), run(model, inputs), strict=True):
        assert cut.shape == dense.shape
        assert bool(cut.isfinite().all())
    keep = plan_without(graph, gone).keep
    assert sum(p.numel() for p in small.parameters()) == graph.params(keep)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(small, inputs)
    batch = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0])
    assert graph.macs(keep) == pytest.approx(counter.get_total_flops() / 2 / batch, rel=1e-6)
    return graph, small


VISION = {
    "resnet18": 64, "mobilenet_v3_small": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "regnet_y_400mf": 64,
    "googlenet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "inception_v3": 96, "vgg11": 64,
}  # fmt: skip
QUICK = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VISION])
def test_classifiers_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = randomise(getattr(models, name)(weights=None, **more))
    graph, _ = checked(model, (example(2, 3, VISION[name], VISION[name]),))
    assert set(graph.skipped.values()) <= {
        "its outputs are the model's outputs",
        "it is not used in the forward pass",
        "it has a single unit",
    }


SEGMENTATION = ["lraspp_mobilenet_v3_large", pytest.param("fcn_resnet50", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models.segmentation")
    model = randomise(getattr(models, name)(weights=None, weights_backbone=None))
    inputs = example(2, 3, 64, 64)
    graph, _ = checked(model, (inputs,))
    assert set(graph.skipped.values()) == {"its outputs are the model's outputs"}
    scores = tp.score(model, [inputs], graph, tp.TPV(head="logits", output="out"))
    assert all(float(values.min()) >= 0 and float(values.max()) > 0 for values in scores.values.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification", "ViTModel"])
def test_encoders_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    if kind == "ViTModel":
        config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
        inputs: dict[str, Tensor] = {"pixel_values": example(2, 3, 16, 16)}
    else:
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
        ids = torch.arange(20).reshape(2, 10)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = randomise(getattr(transformers, kind)(config))
    graph, _ = checked(model, inputs)
    assert [g.units for g in graph.groups if g.kind == "head"] == [3, 3]
    assert [g.units for g in graph.groups if g.units == 40] == [40, 40]
    output = "logits" if "Classification" in kind else "pooler_output"
    scores = tp.score(model, [inputs], graph, tp.TPV(head="logits", output=output))
    plan = tp.allocate(scores, graph, tp.Budget(macs=0.6))
    assert graph.macs(plan.keep) <= 0.6 * graph.macs()


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(self.block(a, b) for a, b in ((3, 6), (6, 8), (8, 10)))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in ((10, 7), (8, 5)))
        self.up = nn.ModuleList(self.block(a, b) for a, b in ((7 + 8, 8), (5 + 6, 6)))
        self.last = nn.Conv2d(6, 2, 1)

    @staticmethod
    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for rise, block, skip in zip(self.rise, self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([rise(x), skip], dim=1))
        return self.last(x)


def test_a_u_net_with_concatenations() -> None:
    model, inputs = randomise(UNet()), example(2, 3, 16, 16)
    graph, small = checked(model, (inputs,))
    assert len(graph.groups) == 12
    assert set(graph.skipped) == {"last"}
    scores = tp.score(model, [inputs], graph, tp.TPV(head="logits"))
    plan = tp.allocate(scores, graph, tp.Budget(macs=0.5))
    fitted = tp.reconstruct(tp.apply(model, plan), [inputs], model)
    assert (fitted(inputs) - model(inputs)).norm() < (tp.apply(model, plan)(inputs) - model(inputs)).norm()
    assert small.up[0][0].in_channels == small.rise[0].out_channels + small.down[1][3].out_channels


class TwoSided(nn.Module):
    """Two inputs and two outputs around shared features."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.number = nn.Conv2d(3, 8, 3), nn.Linear(4, 8)
        self.mix, self.first, self.second = nn.Linear(8, 10), nn.Linear(10, 3), nn.Linear(18, 2)

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = F.relu(self.image(image).mean((2, 3)) + self.number(number))
        mixed = F.relu(self.mix(x))
        return self.first(mixed), {"second": self.second(torch.cat([mixed, x], 1))}


@pytest.mark.parametrize("by_name", [False, True])
def test_two_inputs_and_two_outputs(by_name: bool) -> None:
    model, image, number = randomise(TwoSided()), example(3, 3, 6, 6), example(3, 4, seed=2)
    inputs: Any = {"image": image, "number": number} if by_name else (image, number)
    graph = tp.trace(model, inputs)
    assert {g.id: g.units for g in graph.groups} == {"image": 8, "mix": 10}
    plan = plan_without(graph, random_gone(graph, 1))
    cut, masked = tp.apply(model, plan)(image, number), tp.mask(model, plan)(image, number)
    assert gap(cut[0], masked[0]) < tolerances.SAME_FUNCTION
    assert gap(cut[1]["second"], masked[1]["second"]) < tolerances.SAME_FUNCTION


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 3)
        self.rnn, self.hidden, self.fc = kind(6, 5, batch_first=True), nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(F.relu(self.conv2(F.relu(self.conv1(x)))).mT)
        return self.fc(F.relu(self.hidden(x[:, -1])))


def test_what_is_around_a_recurrent_kernel_is_cut() -> None:
    model, inputs = randomise(Recurrent(nn.LSTM)).float(), example(2, 3, 12).float()
    graph = tp.trace(model, inputs)
    assert {g.id: g.units for g in graph.groups} == {"conv1": 8, "conv2": 6, "hidden": 7}
    assert graph.skipped["rnn"] == "the units of recurrent layers stay"
    plan = plan_without(graph, random_gone(graph, 0))
    assert gap(tp.apply(model, plan)(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_IN_FLOAT32


def test_a_recurrent_layer_made_of_products_reads_what_is_left() -> None:
    model, inputs = randomise(Recurrent()), example(2, 3, 12)
    graph, small = checked(model, (inputs,))
    assert {g.id: g.units for g in graph.groups} == {"conv1": 8, "conv2": 6, "hidden": 7}
    assert small.rnn.input_size == small.conv2.out_channels < 6
