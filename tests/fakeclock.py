"""A clock that moves when modules are called, by a known function of their widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

PRODUCT, NORM, POINT, HEADS = 1e-3, 1e-2, 1e-4, 3e-3
POINTWISE = (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.AdaptiveAvgPool2d)


def seconds(module: nn.Module, x: Any) -> float:
    """What one call of a module itself takes, without the modules in it."""
    if type(module).__name__ == "Attention":
        return HEADS * int(module.attn_dim)  # type: ignore[arg-type]
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)):
        return NORM * module.weight.numel()
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim > 1:
        return PRODUCT * weight.shape[0] * weight.shape[1]
    return POINT * x.numel() if isinstance(module, POINTWISE) else 0.0


def is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) or type(module).__name__ == "Attention"


@dataclass
class FakeClock:
    """Tells the seconds that the calls so far have taken.

    Attributes:
        inside: a module that is called by another takes this many times what it takes alone.
        light: the same for what is not a matrix product, on top.
        rest: seconds that the outermost call of `whole` takes beyond all modules.
        whole: the model.
        calls: what was called from outside: kind, shapes of its tensors, shape of its input.
    """

    inside: float = 1.0
    light: float = 1.0
    rest: float = 0.0
    whole: nn.Module | None = None
    now: float = 0.0
    depth: int = 0
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def _before(self, module: nn.Module, args: Any) -> None:
        if self.depth == 0 and args and isinstance(args[0], torch.Tensor):
            self.calls.append(called(module, args[0]))
        self.depth += 1

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        taken = seconds(module, args[0] if args else None) * (self.inside if self.depth else 1.0)
        self.now += taken if is_product(module) else taken * self.light
        self.now += self.rest if module is self.whole else 0.0

    @contextmanager
    def running(self) -> Iterator[FakeClock]:
        """Let it see every module's calls."""
        handles = [
            torch_modules.register_module_forward_pre_hook(self._before),
            torch_modules.register_module_forward_hook(self._after),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def called(module: nn.Module, x: torch.Tensor) -> tuple[Any, ...]:
    """A call, as far as its widths go."""
    tensors = sorted((k, tuple(t.shape)) for k, t in module.state_dict().items())
    return type(module).__name__, tuple(tensors), tuple(x.shape)
