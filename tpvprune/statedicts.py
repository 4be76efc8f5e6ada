"""Plain dicts of tensors as states of models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def fill(model: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load tensors that bear the names and shapes of a model's own.

    Files hold no versions, and some modules (torchvision's `MNASNet`) refuse a state without one, or take it for one of
    an old layout.

    Args:
        model: its parameters and buffers are written.
        tensors: by name, each shaped as the model's.
        strict: whether all of the model's have to be there.
    """
    state = OrderedDict(tensors)
    state._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]  # torch keeps it there
    model.load_state_dict(state, strict=strict)
