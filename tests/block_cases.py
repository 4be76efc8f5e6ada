"""Small networks in float64 with residual blocks, and which of them can be skipped as a person sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests.cases import example, randomise


@dataclass(frozen=True)
class BlockCase:
    """A network, an example batch, its blocks, and per block the groups that lie within it."""

    model: nn.Module
    example: Tensor
    blocks: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, str] = field(default_factory=dict)  # block: part of the reason

    @property
    def inputs(self) -> Tensor:
        return self.example


class Basic(nn.Module):
    """Closed by a rectifier; works in place, as timm's do."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, hidden, 3, stride, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down(x)
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        x += shortcut
        return F.relu(x, inplace=True)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.stage1 = nn.Sequential(Basic(6, 4, 6), Basic(6, 5, 6))
        self.stage2 = nn.Sequential(Basic(6, 6, 8, 2), Basic(8, 5, 8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(F.relu(self.bn(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """A linear bottleneck with a depthwise convolution and a gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.dw = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn, self.gate = nn.BatchNorm2d(hidden), nn.Conv2d(hidden, hidden, 1)
        self.project = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn(self.dw(F.silu(self.expand(x)))))
        return x + self.project(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())


class Mixing(nn.Module):
    """Tokens mixed by their likeness, in products that belong to no layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.out((y @ y.mT).softmax(-1) @ y)


def stages() -> BlockCase:
    inner = {name: (f"{name}.conv1",) for name in ("stage1.0", "stage1.1", "stage2.1")}
    return BlockCase(randomise(Stages()), example(3, 3, 8, 8), inner)


def inverted() -> BlockCase:
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 5, 3, bias=False))
    net.add_module("norm", nn.BatchNorm2d(5))
    net.add_module("a", Inverted(5, 8))
    net.add_module("b", Inverted(5, 7))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(5, 4))
    return BlockCase(randomise(net), example(3, 3, 6, 6), {"a": ("a.expand",), "b": ("b.expand",)})


def mixing() -> BlockCase:
    net = nn.Sequential()
    net.add_module("embed", nn.Linear(4, 6))
    net.add_module("a", Mixing(6))
    net.add_module("b", Mixing(6))
    net.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(30, 4)))
    return BlockCase(randomise(net), example(3, 5, 4), {"a": (), "b": ()})


def vit() -> BlockCase:
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 4, "num_classes": 5}
    net = timm.create_model("vit_tiny_patch16_224", pretrained=False, **size)
    blocks = {f"blocks.{i}": (f"blocks.{i}.attn", f"blocks.{i}.mlp.fc1") for i in range(3)}
    return BlockCase(randomise(net), example(3, 3, 8, 8), blocks)


def convnext() -> BlockCase:
    net = timm.create_model("test_convnext", pretrained=False, depths=(1, 2, 1, 1), dims=(6, 8, 6, 6), num_classes=5)
    names = [f"stages.{i}.blocks.{j}" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))]
    return BlockCase(randomise(net), example(2, 3, 64, 64), {name: (f"{name}.mlp.fc1",) for name in names})


CASES: dict[str, Callable[[], BlockCase]] = {make.__name__: make for make in (stages, inverted, mixing, vit, convnext)}
NAMES = tuple(CASES)


@dataclass(frozen=True)
class BuiltBlocks:
    case: BlockCase
    graph: tp.Graph

    @property
    def model(self) -> nn.Module:
        return self.case.model

    @property
    def inputs(self) -> Tensor:
        return self.case.example

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(self.case.blocks)


@cache
def built(name: str) -> BuiltBlocks:
    """The model is shared between tests: copy it before changing it."""
    case = CASES[name]()
    return BuiltBlocks(case, tp.trace(case.model, case.example, depth=True))


class Passing(nn.Module):
    """Gives back what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def skipping(model: nn.Module, blocks: tuple[str, ...] | list[str]) -> nn.Module:
    """A copy whose forward pass goes around the blocks, written without the library."""
    out = copy.deepcopy(model)
    for name in blocks:
        owner, _, key = name.rpartition(".")
        out.get_submodule(owner)._modules[key] = Passing()
    return out


def gone_with(built: BuiltBlocks, blocks: tuple[str, ...] | list[str], seed: int) -> dict[str, list[int]]:
    """These blocks, and some units of every group of channels or heads."""
    generator = torch.Generator().manual_seed(seed)
    gone: dict[str, list[int]] = {name: [0] for name in blocks}
    for group in built.graph.groups:
        if group.kind != "block":
            count = max(1, group.units // 3)
            gone[group.id] = sorted(torch.randperm(group.units, generator=generator)[:count].tolist())
    return gone
