"""What models of timm say of their own widths: `feature_info`, and the numbers that a new classifier is made by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tpvprune.planning.units import STATIC
from tpvprune.types import FEATURES

NAMES = ("num_features", "head_hidden_size", "embed_dim", "in_features", "hidden_size")


def infos(model: nn.Module) -> list[dict[str, Any]]:
    """`feature_info` of a model of timm, empty for others."""
    given: Any = getattr(model, FEATURES, None)
    found = getattr(given, "info", given)  # of models made with features_only
    known = isinstance(found, list) and all(isinstance(i, dict) and {"num_chs", "module"} <= set(i) for i in found)
    return found if known else []


def _classifier(model: Any) -> Any:
    return model.get_classifier() if callable(getattr(model, "get_classifier", None)) else None


def told(
    model: nn.Module,
    outputs: Mapping[str, tuple[Tensor, Mapping[int, Tensor]]],
    read: Callable[[str], Tensor | None],
) -> Iterable[tuple[str, Tensor]]:
    """Places where a model says how wide something is, and the slots that lie there.

    Args:
        model: any.
        outputs: by module, what it gave last and the slots along its axes.
        read: the slots along the axis that the weight of a layer reads.
    """
    last: tuple[int, Tensor] | None = None
    for number, info in enumerate(infos(model)):
        tensor, axes = outputs.get(info["module"], (None, {}))
        fits = [a for a in (1, -1) if tensor is not None and tensor.ndim > 1 and tensor.shape[a] == info["num_chs"]]
        there = [] if tensor is None else [axes[a % tensor.ndim] for a in fits if a % tensor.ndim in axes]
        # A height may happen to be as long as there are channels; units lie along the latter alone.
        slots = next((s for s in there if bool((s > STATIC).any())), there[0] if there else None)
        last = None
        if slots is not None:
            last = info["num_chs"], slots
            yield f"{FEATURES}[{number}]", slots
    classifier = _classifier(model)
    name = next((n for n, m in model.named_modules() if m is classifier), None) if classifier is not None else None
    slots = read(name) if name is not None else None
    around = name.split(".")[:-1] if name is not None else []
    places = {".".join(around[:depth]) for depth in range(len(around) + 1)}
    for place in sorted(places):
        for key in NAMES:
            value = vars(model.get_submodule(place)).get(key)
            path = f"{place}.{key}".removeprefix(".")
            if type(value) is int and slots is not None and value == len(slots):
                yield path, slots
            elif type(value) is int and last is not None and value == last[0] and key == "num_features":
                yield path, last[1]
