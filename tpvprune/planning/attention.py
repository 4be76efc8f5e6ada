"""Attention blocks whose heads can leave, described one class at a time.

A fused query-key-value projection is reshaped, permuted and multiplied with itself: no index
mapping through it can be guessed from the autograd graph. So while a network is traced, such a
block is cut open at its projections, and its heads become a group of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.types import WORK, Group, Member

FUSED_QKV = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")


@dataclass(frozen=True)
class AttentionBlock:
    """One attention module with a fused `qkv` projection of layout (3, heads, head_dim).

    Attributes:
        name: qualified name in the model.
        module: the attention module.
        reason: why its heads cannot be pruned; empty if they can.
    """

    name: str
    module: nn.Module
    reason: str = ""

    @property
    def heads(self) -> int:
        """Number of heads."""
        return int(self.module.num_heads)  # type: ignore[arg-type]  # an int attribute of the known classes

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return int(self.module.head_dim)  # type: ignore[arg-type]  # an int attribute of the known classes

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    def cut_open(self, sink: list[Tensor]) -> Callable[..., Tensor]:
        """A forward that reads through `qkv` and writes through `proj`, with nothing joining the two.

        Args:
            sink: receives the outputs that would have been consumed inside the block.
        """
        module = self.module

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            sink.append(module.qkv(x))  # type: ignore[operator]
            if getattr(module, "gate", None) is not None:
                sink.append(module.gate(x))  # type: ignore[operator]
            inner = torch.zeros(*x.shape[:-1], self.width, dtype=x.dtype, device=x.device, requires_grad=True)
            return module.proj(module.norm(inner) if hasattr(module, "norm") else inner)  # type: ignore[operator]

        return forward

    def group(self) -> Group:
        """The heads as one group: `qkv` rows produce, `proj` columns consume."""
        per_head = torch.arange(self.width).reshape(self.heads, self.head_dim)
        fused = torch.cat([per_head + part * self.width for part in range(3)], dim=1)
        members = [Member(f"{self.name}.qkv.weight", 0, fused, "produce")]
        if self.module.qkv.bias is not None:  # type: ignore[union-attr]
            members.append(Member(f"{self.name}.qkv.bias", 0, fused, "produce"))
        exact = True
        for side, role in (("gate", "produce"), ("norm", "affine")):
            for param, _ in getattr(self.module, side, None).named_parameters() if self._has(side) else ():  # type: ignore[union-attr]
                members.append(Member(f"{self.name}.{side}.{param}", 0, per_head, role))  # type: ignore[arg-type]
                exact = exact and side != "norm"
        members.append(Member(f"{self.name}.proj.weight", 1, per_head, "consume"))
        members.append(Member(f"{self.name}{WORK}attention", 0, per_head, "work"))
        return Group(self.name, "head", self.heads, tuple(members), exact, f"head:{self.head_dim}")

    def _has(self, side: str) -> bool:
        return isinstance(getattr(self.module, side, None), nn.Module)

    def work(self, tokens: int) -> int:
        """Multiply-adds of the two attention products, per channel and example."""
        return 2 * tokens * tokens


def attention_blocks(model: nn.Module) -> Iterator[AttentionBlock]:
    """Every attention block of a known class, with the reason where its heads must stay."""
    for name, module in model.named_modules():
        if f"{type(module).__module__}.{type(module).__qualname__}" not in FUSED_QKV:
            continue
        reason = ""
        if not hasattr(module, "attn_dim"):
            reason = "this timm release reshapes attention to the input width; upgrade timm to prune its heads"
        elif int(module.num_heads) < 2:
            reason = "it has a single head"
        yield AttentionBlock(name, module, reason)


def unknown_attention(model: nn.Module) -> Iterator[str]:
    """Names of attention modules of no known class: their forward reshapes to a width that was fixed when built."""
    known = {block.name for block in attention_blocks(model)}
    for name, module in model.named_modules():
        projects = any(isinstance(child, (nn.Linear, _ConvNd)) for child in module.children())
        if isinstance(getattr(module, "num_heads", None), int) and projects and name not in known:
            yield name


class _Given(nn.Module):
    """In place of a projection: an output that is there already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def between_projections(module: nn.Module, width: int, make: Callable[[int], Tensor]) -> nn.Module:
    """A copy of an attention module that does what lies between its projections, with as many heads as fit.

    Args:
        module: of a known class.
        width: channels of all heads.
        make: what a projection to that many channels gives, `(batch, tokens, channels)`.
    """
    twin: Any = copy.deepcopy(module)
    twin.num_heads, twin.attn_dim = width // twin.head_dim, width
    twin.qkv, twin.proj = _Given(make(3 * width)), nn.Identity()
    if isinstance(getattr(twin, "norm", None), nn.Module):  # a layer of its own
        twin.norm = nn.Identity()
    if isinstance(getattr(twin, "gate", None), nn.Module):
        twin.gate = _Given(make(width))
    return twin
