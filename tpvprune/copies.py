"""Copies of models, and what stands in their way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tpvprune.errors import ModelError
from tpvprune.plan import attach, plan_of

M = TypeVar("M", bound=nn.Module)
TOLD = 3  # of what stands in the way
# Hooks that compute a tensor before each pass and keep it at the module: which attribute names it, and what undoes it.
COMPUTED: tuple[tuple[type, str, str], ...] = (
    (BasePruningMethod, "_tensor_name", "prune.remove"),
    (WeightNorm, "name", "remove_weight_norm"),
    (SpectralNorm, "name", "remove_spectral_norm"),
)


def copied(model: M) -> M:
    """A deep copy of a model.

    Tensors among plain attributes that were computed with gradients are what a pass has left there, for the next one to
    set anew: the copy holds them without their gradients.

    Raises:
        ModelError: a module holds something that cannot be copied, as a buffer that was computed with gradients, or a
            weight that a hook computes.
    """
    memo: dict[int, Any] = {}  # deepcopy takes from it what it would copy
    left = [t for m in model.modules() for key, value in _plain(m) if not _hooks(m, key) for t in _computed(value)]
    memo.update((id(tensor), tensor.detach().clone()) for tensor in left)
    try:
        found = copy.deepcopy(model, dict(memo))
    except Exception as error:  # whatever is held raises
        modules = list(model.named_modules())
        held = [(name, module, key, why) for name, module in modules for key, why in _uncopied(module, memo)]
        undo = [found for name, module, key, _ in held for found in _undoing(name, module, key)]
        told = undo or [_named(name, module, key, why) for name, module, key, why in held]
        if not told:  # memory, or a model's own way to be copied
            raise
        more = f"; and {len(told) - TOLD} more" if len(told) > TOLD else ""
        raise ModelError(f"{type(model).__name__} cannot be copied: {'; '.join(told[:TOLD])}{more}") from error
    if plan_of(model) is not None:  # classes with a copy of their own, as compiled models, copy what they know of
        attach(found, plan_of(model))
    return found


def check_bare(model: nn.Module, verb: str) -> None:
    """Refuse a model inside a wrapper that deals its batches out to devices.

    Raises:
        ModelError: names the wrapper.
    """
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        kind = type(model).__name__
        raise ModelError(f"{verb} takes the model that is inside of {kind}; give model.module, as the teacher too")


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes of a module itself that are none of its modules, parameters and buffers."""
    return [(key, value) for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")]


def _computed(value: Any) -> Iterator[Tensor]:
    """Tensors with a graph behind them, in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _computed(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _computed(item)


def _uncopied(module: nn.Module, memo: Mapping[int, Any]) -> Iterator[tuple[str, Exception]]:
    """Attributes and buffers of a module itself that cannot be copied, each with the error."""
    for key, value in [*_plain(module), *module._buffers.items()]:
        if isinstance(value, Tensor) and value.is_leaf:
            continue
        try:
            copy.deepcopy(value, dict(memo))
        except Exception as error:
            yield key, error


def _undoing(name: str, module: nn.Module, key: str) -> Iterator[str]:
    """How a tensor that a hook of PyTorch's computes becomes a parameter again, if it is one."""
    owner = f"model.get_submodule({name!r})" if name else "model"
    for undo in _hooks(module, key):
        yield f"{_place(name, module, key)} is computed; call torch.nn.utils.{undo}({owner}, {key!r})"


def _hooks(module: nn.Module, key: str) -> list[str]:
    """What undoes the hooks of PyTorch's that compute an attribute before each pass."""
    hooks = module._forward_pre_hooks.values()
    return [
        u for hook in hooks for kind, named, u in COMPUTED if isinstance(hook, kind) and getattr(hook, named) == key
    ]


def _named(name: str, module: nn.Module, key: str, error: Exception) -> str:
    if "graph leaves" in str(error):  # as PyTorch calls tensors that were not computed
        return f"{_place(name, module, key)} was computed with gradients; detach it, or compute it in forward"
    return f"{_place(name, module, key)} fails with {type(error).__name__} ({error}); take it off the model"


def _place(name: str, module: nn.Module, key: str) -> str:
    return f"{key!r} of {name!r}" if name else f"{key!r} of the {type(module).__name__} itself"


def doubled(value: Any) -> Any:
    """The same in float64: modules, tensors, and what holds them."""
    if isinstance(value, nn.Module):
        return copied(value).double()
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: doubled(item) for key, item in value.items()}
    return type(value)(map(doubled, value)) if type(value) in (tuple, list) else value
