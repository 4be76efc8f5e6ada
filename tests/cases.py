"""Small networks in float64 with random, non-trivial weights, and their groups written down by hand.

Every function builds one `Case`. Members are `(param, dim, role)`; `index` names the entries of each unit where
they are not the identity. None has 10,000 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

OUTPUT = "its outputs are the model's outputs"


@dataclass(frozen=True)
class Expected:
    """One group as a person reads it off the network."""

    id: str
    units: int
    members: frozenset[tuple[str, int, str]]
    exact_mask: bool = True
    kind: str = "channel"


@dataclass(frozen=True)
class Case:
    """A network, an example batch, and what `trace` should say of it."""

    model: nn.Module
    example: Tensor
    groups: tuple[Expected, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)  # layer: part of the reason
    index: Mapping[tuple[str, str, str], list[list[int]]] = field(default_factory=dict)  # (group, param, role)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, eval mode, and no weight, bias or statistic at a value (0 or 1) that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    def positive(tensor: Tensor) -> Tensor:
        return 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)

    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = max(1, parameter[0].numel())
                parameter.copy_(normal(parameter) / fan_in**0.5)
            else:
                parameter.copy_(0.5 + 0.3 * normal(parameter))  # so that no rectified unit is dead
        for module in model.modules():
            if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)):
                module.weight.copy_(positive(module.weight))
            if isinstance(module, _BatchNorm):
                module.running_mean.copy_(0.3 * normal(module.running_mean))
                module.running_var.copy_(positive(module.running_var))
    return model


def example(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(name: str, role: str, *, bias: bool = True) -> set[tuple[str, int, str]]:
    """Members of a convolution or linear layer on one side."""
    if role == "consume":
        return {(f"{name}.weight", 1, role)}
    return {(f"{name}.weight", 0, role)} | ({(f"{name}.bias", 0, role)} if bias else set())


def batchnorm(name: str) -> set[tuple[str, int, str]]:
    stats = {(f"{name}.running_mean", 0, "stat"), (f"{name}.running_var", 0, "stat")}
    return layer(name, "affine") | stats


def group(
    id: str, units: int, *sides: set[tuple[str, int, str]], exact: bool = True, kind: str = "channel"
) -> Expected:
    return Expected(id, units, frozenset().union(*sides), exact, kind)


def runs(count: int, width: int, start: int = 0) -> list[list[int]]:
    """Unit i owns the `width` entries from `start + i * width`."""
    return [[start + i * width + j for j in range(width)] for i in range(count)]


@case
def mlp() -> Case:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 4))
    return Case(
        randomise(net),
        example(5, 6),
        (
            group("0", 8, layer("0", "produce"), layer("2", "consume")),
            group("2", 7, layer("2", "produce"), layer("4", "consume")),
        ),
        {"4": OUTPUT},
    )


class ConvBN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.fc(x.mean((2, 3)))


@case
def conv_bn() -> Case:
    return Case(
        randomise(ConvBN()),
        example(4, 3, 8, 8),
        (
            group("conv1", 6, layer("conv1", "produce", bias=False), batchnorm("bn1"), layer("conv2", "consume")),
            group("conv2", 5, layer("conv2", "produce"), batchnorm("bn2"), layer("fc", "consume")),
        ),
        {"fc": OUTPUT},
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a1, self.a1_bn = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a2, self.a2_bn = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b1, self.b1_bn = nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5)
        self.b2, self.b2_bn = nn.Conv2d(5, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.down_bn = nn.Conv2d(6, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.a2_bn(self.a2(F.relu(self.a1_bn(self.a1(x))))))
        x = F.relu(self.down_bn(self.down(x)) + self.b2_bn(self.b2(F.relu(self.b1_bn(self.b1(x))))))
        return self.fc(x.mean((2, 3)))


def _conv_bn(name: str) -> set[tuple[str, int, str]]:
    return layer(name, "produce", bias=False) | batchnorm(f"{name}_bn")


@case
def residual() -> Case:
    readers = [layer(name, "consume") for name in ("a1", "b1", "down")]
    return Case(
        randomise(Residual()),
        example(4, 3, 8, 8),
        (
            group("stem", 6, _conv_bn("stem"), _conv_bn("a2"), *readers),
            group("a1", 4, _conv_bn("a1"), layer("a2", "consume")),
            group("down", 8, _conv_bn("down"), _conv_bn("b2"), layer("fc", "consume")),
            group("b1", 5, _conv_bn("b1"), layer("b2", "consume")),
        ),
        {"fc": OUTPUT},
    )


@case
def depthwise() -> Case:
    net = nn.Sequential()
    net.add_module("expand", nn.Conv2d(3, 6, 1, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(6))
    net.add_module("act1", nn.SiLU(inplace=True))
    net.add_module("dw", nn.Conv2d(6, 6, 3, padding=1, groups=6))
    net.add_module("bn2", nn.BatchNorm2d(6))
    net.add_module("act2", nn.SiLU(inplace=True))
    net.add_module("project", nn.Conv2d(6, 5, 1, bias=False))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(5, 4))
    expand = (layer("expand", "produce", bias=False), batchnorm("bn1"), layer("dw", "affine"), batchnorm("bn2"))
    return Case(
        randomise(net),
        example(4, 3, 6, 6),
        (
            group("expand", 6, *expand, layer("project", "consume")),
            group("project", 5, layer("project", "produce", bias=False), layer("fc", "consume")),
        ),
        {"fc": OUTPUT},
    )


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.bn = nn.BatchNorm2d(9)
        self.join = nn.Conv2d(9, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(torch.cat([self.left(x), self.right(x)], 1)))
        return self.fc(self.join(x).amax((2, 3)))


@case
def concat() -> Case:
    tail = (batchnorm("bn"), layer("join", "consume"))
    return Case(
        randomise(Concat()),
        example(4, 3, 6, 6),
        (
            group("left", 4, layer("left", "produce"), *tail),
            group("right", 5, layer("right", "produce"), *tail),
            group("join", 6, layer("join", "produce"), layer("fc", "consume")),
        ),
        {"fc": OUTPUT},
        {
            (name, param, role): runs(units, 1, start)
            for name, units, start in (("left", 4, 0), ("right", 5, 4))
            for param, _, role in frozenset().union(*tail)
        },
    )


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).tanh().chunk(2, 1)
        return self.fc(torch.cat([self.a(a), self.b(b)], 1).mean((2, 3)))


@case
def split() -> Case:
    # A half is as long as the other: unit j is channel j of both.
    both = [[j, j + 4] for j in range(4)]
    first = layer("conv", "produce")
    return Case(
        randomise(Split()),
        example(4, 3, 5, 5),
        (
            group("conv", 4, first, layer("a", "consume"), layer("b", "consume")),
            group("a", 3, layer("a", "produce"), layer("fc", "consume")),
            group("b", 5, layer("b", "produce"), layer("fc", "consume")),
        ),
        {"fc": OUTPUT},
        {("a", "fc.weight", "consume"): runs(3, 1), ("b", "fc.weight", "consume"): runs(5, 1, 3)}
        | {("conv", param, role): both for param, _, role in first},
    )


class Uneven(Split):
    """A layer of which one part of three channels and one of five go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).tanh().split([3, 5], 1)
        return self.fc(torch.cat([self.a(a), self.b(b)], 1).mean((2, 3)))


@case
def uneven() -> Case:
    return Case(
        randomise(Uneven()),
        example(4, 3, 5, 5),
        (
            group("a", 3, layer("a", "produce"), layer("fc", "consume")),
            group("b", 5, layer("b", "produce"), layer("fc", "consume")),
        ),
        {"conv": "takes a part of its channels", "fc": OUTPUT},
        {("a", "fc.weight", "consume"): runs(3, 1), ("b", "fc.weight", "consume"): runs(5, 1, 3)},
    )


@case
def flatten() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 4)
    )
    return Case(
        randomise(net),
        example(4, 2, 3, 3),
        (
            group("0", 4, layer("0", "produce"), layer("3", "consume")),
            group("3", 6, layer("3", "produce"), layer("5", "consume")),
        ),
        {"5": OUTPUT},
        {("0", "3.weight", "consume"): runs(4, 9)},
    )


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.last = nn.Conv2d(6, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.last(F.relu(self.grouped(x)))
        return self.fc(x.mean((2, 3)))


@case
def grouped() -> Case:
    # Unit j is channel j of both groups.
    two = [[j, j + 4] for j in range(4)]
    three = [[j, j + 3] for j in range(3)]
    first = layer("conv1", "produce") | batchnorm("bn1")
    second = layer("grouped", "produce") | layer("last", "consume")
    return Case(
        randomise(Grouped()),
        example(4, 3, 5, 5),
        (
            group("conv1", 4, first, layer("grouped", "consume")),
            group("grouped", 3, second),
            group("last", 5, layer("last", "produce"), layer("fc", "consume")),
        ),
        {"fc": OUTPUT},
        {("conv1", param, role): two for param, _, role in first}
        | {("conv1", "grouped.weight", "consume"): runs(4, 1)}
        | {("grouped", param, role): three for param, _, role in second},
    )


@case
def vit() -> Case:
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 5}
    net = timm.create_model("vit_tiny_patch16_224", pretrained=False, **size)
    stream = layer("patch_embed.proj", "produce") | layer("norm", "affine") | layer("head", "consume")
    stream |= {("cls_token", 2, "produce"), ("pos_embed", 2, "produce")}
    inner, index = [], {}
    for i in range(2):
        block = f"blocks.{i}"
        stream |= layer(f"{block}.norm1", "affine") | layer(f"{block}.norm2", "affine")
        stream |= layer(f"{block}.attn.qkv", "consume") | layer(f"{block}.mlp.fc1", "consume")
        stream |= layer(f"{block}.attn.proj", "produce") | layer(f"{block}.mlp.fc2", "produce")
        work = {(f"{block}.attn#attention", 0, "work")}
        heads = layer(f"{block}.attn.qkv", "produce"), layer(f"{block}.attn.proj", "consume"), work
        hidden = layer(f"{block}.mlp.fc1", "produce"), layer(f"{block}.mlp.fc2", "consume")
        inner += [group(f"{block}.attn", 4, *heads, kind="head"), group(f"{block}.mlp.fc1", 64, *hidden)]
        # Rows of the fused projection: queries, keys and values of all four heads of four channels each.
        fused = [q + k + v for q, k, v in zip(runs(4, 4), runs(4, 4, 16), runs(4, 4, 32), strict=True)]
        index[f"{block}.attn", f"{block}.attn.qkv.weight", "produce"] = fused
        index[f"{block}.attn", f"{block}.attn.qkv.bias", "produce"] = fused
        index[f"{block}.attn", f"{block}.attn.proj.weight", "consume"] = runs(4, 4)
        index[f"{block}.attn", f"{block}.attn#attention", "work"] = runs(4, 4)
    first = group("patch_embed.proj", 16, stream, exact=False)
    return Case(randomise(net), example(3, 3, 8, 8), (first, *inner), {"head": OUTPUT}, index)


class Stream(nn.Module):
    """A residual stream of channels-last features with layer norm in front of each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm1, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm2, self.fc = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.fc(self.norm2(x).mean(1))


@case
def layernorm_stream() -> Case:
    norms = layer("norm1", "affine") | layer("norm2", "affine")
    sides = layer("embed", "produce"), layer("down", "produce"), norms, layer("up", "consume"), layer("fc", "consume")
    return Case(
        randomise(Stream()),
        example(4, 3, 5),
        (
            group("embed", 8, *sides, exact=False),
            group("up", 12, layer("up", "produce"), layer("down", "consume")),
        ),
        {"fc": OUTPUT},
    )


class HandAttention(nn.Module):
    """Uses the weight of its projection by hand, with a bias joined from parts, and takes the width of what it gives
    from what it is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(6, 18, bias=False), nn.Linear(6, 6)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
        self.register_buffer("k_bias", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(input=x, weight=self.qkv.weight, bias=bias).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 6, 3), HandAttention()
        self.mix, self.fc = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.attn(x.flatten(2).mT).mT.reshape(x.shape))
        return self.fc(F.conv2d(x, self.mix.weight, padding=1).mean((2, 3)))


@case
def by_hand() -> Case:
    writes = layer("stem", "produce") | layer("attn.proj", "produce")
    reads = {("attn.qkv.weight", 1, "consume"), ("mix.weight", 1, "consume")}
    parts = {(f"attn.{name}", 0, "produce") for name in ("qkv.weight", "q_bias", "v_bias")}
    heads = parts | {("attn.k_bias", 0, "stat"), ("attn#attention", 0, "work"), ("attn.proj.weight", 1, "consume")}
    index = {("attn", name, role): runs(3, 2) for name, _, role in heads}
    # Rows of the fused projection: queries, keys and values of all three heads of two channels each.
    fused = [q + k + v for q, k, v in zip(runs(3, 2), runs(3, 2, 6), runs(3, 2, 12), strict=True)]
    index["attn", "attn.qkv.weight", "produce"] = fused
    groups = (
        group("stem", 6, writes, reads),
        group("attn", 3, heads, kind="head"),
        group("mix", 5, {("mix.weight", 0, "produce")}, layer("fc", "consume")),
    )
    return Case(randomise(ByHand()), example(3, 3, 5, 5), groups, {"fc": OUTPUT}, index)


class Multihead(nn.Module):
    """PyTorch's own attention: in its encoder layer, and between two sequences with masks of both sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 4, 12, activation="gelu", batch_first=True)
        self.cross, self.fc = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.embed(x)).transpose(0, 1)
        unseen = torch.arange(len(x)).expand(x.shape[1], -1) == len(x) - 1
        masks = {"key_padding_mask": unseen, "attn_mask": torch.ones(len(x), len(x)).triu(1) > 0}
        return self.fc(self.cross(x.relu(), x, x, need_weights=False, **masks)[0].mean(0))


@case
def multihead() -> Case:
    groups, index = [], {}
    for name, heads, width in (("layer.self_attn", 4, 2), ("cross", 2, 4)):
        writes, reads = {(f"{name}.in_proj_{kind}", 0, "produce") for kind in ("weight", "bias")}, f"{name}.out_proj"
        work = {(f"{name}#attention", 0, "work")}
        groups.append(group(name, heads, writes, work, layer(reads, "consume"), kind="head"))
        # Rows of the one weight: queries, keys and values of all heads.
        parts = (runs(heads, width, start) for start in (0, 8, 16))
        fused = [q + k + v for q, k, v in zip(*parts, strict=True)]
        index |= {(name, param, role): fused for param, _, role in writes}
        index[name, f"{reads}.weight", "consume"] = index[name, f"{name}#attention", "work"] = runs(heads, width)
    hidden = group("layer.linear1", 12, layer("layer.linear1", "produce"), layer("layer.linear2", "consume"))
    last = group("cross.out_proj", 8, layer("cross.out_proj", "produce"), layer("fc", "consume"))
    stream = dict.fromkeys(("embed", "layer.self_attn.out_proj", "layer.linear2"), "a weight that is no layer's")
    ordered = groups[0], hidden, last, groups[1]  # a module ends after those in it
    return Case(randomise(Multihead()), example(3, 4, 5), ordered, {**stream, "fc": OUTPUT}, index)


@case
def groupnorm() -> Case:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 4),
    )  # fmt: skip
    first = layer("0", "produce") | layer("1", "affine")
    two = [[j, j + 4] for j in range(4)]
    return Case(
        randomise(net),
        example(4, 3, 6, 6),
        (
            group("0", 4, first, layer("3", "consume"), exact=False),
            group("3", 5, layer("3", "produce"), layer("6", "consume")),
        ),
        {"6": OUTPUT},
        {("0", param, role): two for param, _, role in first | layer("3", "consume")},
    )


class Shared(nn.Module):
    """Two layers with one weight, and one layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.tied1, self.tied2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied2.weight = self.tied1.weight
        self.middle = nn.Linear(6, 9)
        self.back = nn.Linear(9, 7)
        self.twice = nn.Linear(7, 7)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied2(self.tied1(self.embed(x)).tanh()).tanh()
        x = self.back(self.middle(x).tanh()).tanh()
        x = self.twice(self.twice(x).tanh()).tanh()
        return self.fc(x)


@case
def shared() -> Case:
    return Case(
        randomise(Shared()),
        example(4, 5),
        (
            group("middle", 9, layer("middle", "produce"), layer("back", "consume")),
            group(
                "back",
                7,
                layer("back", "produce"),
                layer("twice", "produce"),
                layer("twice", "consume"),
                layer("fc", "consume"),
            ),
        ),
        {"embed": "shares a parameter", "tied1": "shares a parameter", "tied2": "shares a parameter", "fc": OUTPUT},
    )


class Positions(nn.Module):
    """Patches, position embeddings, a layer scale and a residual branch, without a normaliser that pools."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.pos = nn.Parameter(torch.zeros(1, 4, 8))
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        x = x + self.down(F.gelu(self.up(x)))
        return self.fc(F.gelu(x).mean(1))


@case
def positions() -> Case:
    writers = layer("patch", "produce"), layer("down", "produce"), {("pos", 2, "produce")}
    return Case(
        randomise(Positions()),
        example(4, 3, 8, 8),
        (
            group("patch", 8, *writers, layer("up", "consume"), layer("fc", "consume")),
            group("up", 10, layer("up", "produce"), layer("down", "consume")),
        ),
        {"fc": OUTPUT},
    )


class InputResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.fc = nn.Linear(6, 6), nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x + self.first(x).tanh()).tanh())


@case
def input_residual() -> Case:
    return Case(
        randomise(InputResidual()),
        example(4, 6),
        (group("hidden", 7, layer("hidden", "produce"), layer("fc", "consume")),),
        {"first": "added to the model's input", "fc": OUTPUT},
    )


class Activations(nn.Module):
    """A transposed convolution, a 1-D convolution, PReLU with a slope per channel, an instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.act = nn.ConvTranspose1d(3, 6, 2, stride=2), nn.PReLU(6)
        self.conv, self.norm = nn.Conv1d(6, 5, 3, padding=1), nn.InstanceNorm1d(5, affine=True)
        self.narrow = nn.ConvTranspose1d(5, 4, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.widen(x))
        x = self.narrow(F.gelu(self.norm(self.conv(x))))
        return self.fc(F.gelu(x).mean(2))


@case
def transposed() -> Case:
    widen = {("widen.weight", 1, "produce"), ("widen.bias", 0, "produce")}
    narrow = {("narrow.weight", 1, "produce"), ("narrow.bias", 0, "produce")}
    return Case(
        randomise(Activations()),
        example(4, 3, 6),
        (
            group("widen", 6, widen, {("act.weight", 0, "affine")}, layer("conv", "consume")),
            group("conv", 5, layer("conv", "produce"), layer("norm", "affine"), {("narrow.weight", 0, "consume")}),
            group("narrow", 4, narrow, layer("fc", "consume")),
        ),
        {"fc": OUTPUT},
    )


class ScaledBranch(nn.Module):
    """A residual branch scaled by a parameter of the block itself, as ConvNeXt does it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gamma = nn.Linear(6, 9), nn.Linear(9, 6), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(F.gelu(self.up(x)))


@case
def layerscale() -> Case:
    net = nn.Sequential()
    net.add_module("embed", nn.Linear(5, 6))
    net.add_module("block", ScaledBranch())
    net.add_module("act", nn.GELU())
    net.add_module("fc", nn.Linear(6, 4))
    up, down = layer("block.up", "consume"), layer("block.down", "produce")
    return Case(
        randomise(net),
        example(4, 5),
        (
            group(
                "embed", 6, layer("embed", "produce"), up, down, {("block.gamma", 0, "affine")}, layer("fc", "consume")
            ),
            group("block.up", 9, layer("block.up", "produce"), layer("block.down", "consume")),
        ),
        {"fc": OUTPUT},
    )
