"""Count what a network costs by running it once, so that every plan's cost follows from tensor shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tpvprune.batches import plain_attention
from tpvprune.calls import running
from tpvprune.errors import ModelError

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Attention and recurrent layers made of matrix products, which every counter knows.

    Args:
        model: to be run; without recurrent layers in it no more is switched off than `plain_attention` does.
    """
    with plain_attention():
        if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
            yield
            return
        backends: Any = torch.backends
        before = backends.mkldnn.enabled, backends.cudnn.enabled
        try:  # each has one kernel for a whole LSTM
            backends.mkldnn.enabled = backends.cudnn.enabled = False
            yield
        finally:
            backends.mkldnn.enabled, backends.cudnn.enabled = before


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (list, tuple)) else []


class Usage:
    """What one forward pass uses, and how often.

    Attributes:
        order: the number of each module's first call.
        inputs: shape of each tensor that the model is called on, without its first dimension.
        total: all multiply-adds per example.
        spent: multiply-adds per example from the start to the end of each module's calls.

    Raises:
        ModelError: the model cannot be run on these arguments.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.order: dict[str, int] = {}
        self.spent: dict[str, int] = {}
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if not tensors or tensors[0].ndim == 0 or tensors[0].shape[0] == 0:
            lists = any(isinstance(v, (list, tuple)) and tensors_of(v) for v in (*args, *kwargs.values()))
            wrap = (
                f"; put {type(model).__name__} into a module that takes one batch and calls it on a list made of that"
            )
            raise ModelError(f"the example input holds no tensor with a batch dimension{wrap if lists else ''}")
        self.batch = tensors[0].shape[0]
        self.inputs = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
        counter = FlopCounterMode(display=False)
        named = [(n, m) for n, m in model.named_modules() if n]
        handles = [m.register_forward_hook(self._hook(n)) for n, m in named]
        flops: dict[str, int] = {}
        for name, module in named:
            handles += [module.register_forward_pre_hook(_clock(name, -1, flops, counter))]
            handles += [module.register_forward_hook(_clock(name, 1, flops, counter))]
        try:
            with running(model, (args, kwargs)), torch.no_grad(), plain_kernels(model), counter:
                model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self.total = self._per_example(counter.get_total_flops() // 2)
        self.spent = {name: self._per_example(count // 2) for name, count in flops.items()}

    def _per_example(self, count: int) -> int:
        return count // self.batch if count % self.batch == 0 else round(count / self.batch)

    def _hook(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.order.setdefault(name, len(self.order))

        return hook


def _clock(name: str, sign: int, flops: dict[str, int], counter: FlopCounterMode) -> Any:
    """A hook that adds (or, before a module's call, takes away) what was counted by then."""

    def hook(*_: Any) -> None:
        flops[name] = flops.get(name, 0) + sign * counter.get_total_flops()

    return hook
