"""What timm's attention does between its projections, so that it can be timed with fewer heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from tpvprune.copies import copied

FUSED_QKV = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")


def timed_attention(model: nn.Module) -> Iterator[str]:
    """Names of the attention modules of a class that `between_projections` knows."""
    for name, module in model.named_modules():
        known = f"{type(module).__module__}.{type(module).__qualname__}" in FUSED_QKV
        if known and hasattr(module, "attn_dim"):
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
    twin: Any = copied(module)
    twin.num_heads, twin.attn_dim = width // twin.head_dim, width
    twin.qkv, twin.proj = _Given(make(3 * width)), nn.Identity()
    if isinstance(getattr(twin, "norm", None), nn.Module):  # a layer of its own
        twin.norm = nn.Identity()
    if isinstance(getattr(twin, "gate", None), nn.Module):
        twin.gate = _Given(make(width))
    return twin
