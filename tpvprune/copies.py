"""Copies of models, and what stands in their way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tpvprune.errors import ModelError

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

    Raises:
        ModelError: a module holds something that cannot be copied, as a tensor that was computed with gradients.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever is held raises
        held = [(name, module, key, why) for name, module in model.named_modules() for key, why in _uncopied(module)]
        undo = [found for name, module, key, _ in held for found in _undoing(name, module, key)]
        found = undo or [_named(name, module, key, why) for name, module, key, why in held]
        if not found:  # memory, or a model's own way to be copied
            raise
        more = f"; and {len(found) - TOLD} more" if len(found) > TOLD else ""
        raise ModelError(f"{type(model).__name__} cannot be copied: {'; '.join(found[:TOLD])}{more}") from error


def _uncopied(module: nn.Module) -> Iterator[tuple[str, Exception]]:
    """Attributes and buffers of a module itself that cannot be copied, each with the error."""
    own = {key: value for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")}
    for key, value in {**own, **module._buffers}.items():
        if isinstance(value, Tensor) and value.is_leaf:
            continue
        try:
            copy.deepcopy(value)
        except Exception as error:
            yield key, error


def _undoing(name: str, module: nn.Module, key: str) -> Iterator[str]:
    """How a tensor that a hook of PyTorch's computes becomes a parameter again, if it is one."""
    for hook in module._forward_pre_hooks.values():
        for kind, named, undo in COMPUTED:
            if isinstance(hook, kind) and getattr(hook, named) == key:
                owner = f"model.get_submodule({name!r})" if name else "model"
                yield f"{_place(name, module, key)} is computed; call torch.nn.utils.{undo}({owner}, {key!r})"


def _named(name: str, module: nn.Module, key: str, error: Exception) -> str:
    if "graph leaves" in str(error):  # as PyTorch calls tensors that were not computed
        return f"{_place(name, module, key)} was computed with gradients; detach it, or compute it in forward"
    return f"{_place(name, module, key)} fails with {type(error).__name__} ({error}); take it off the model"


def _place(name: str, module: nn.Module, key: str) -> str:
    return f"{key!r} of {name!r}" if name else f"{key!r} of the {type(module).__name__} itself"
