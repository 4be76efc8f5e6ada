"""A training run's state as one file without pickled code: tensors beside a tree of plain values."""

from __future__ import annotations

import json
import random
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tpvprune.errors import CheckpointError
from tpvprune.files import write_bytes

FORMAT = 2
READ = (1, FORMAT)  # in the first, tuples are lists


def save_state(path: str | PathLike[str], state: dict[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values; the file is there whole or not at all."""
    tensors: dict[str, Tensor] = {}
    tree = _packed(state, tensors)
    about = {"format": FORMAT, "tree": tree}
    write_bytes(path, to_bytes(tensors or {"none": torch.zeros(1)}, {"state": json.dumps(about)}))


def load_state(path: str | PathLike[str]) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        CheckpointError: the file is damaged or something else.
    """
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        if about["format"] not in READ:
            raise KeyError(f"format {about['format']}")
        state: dict[str, Any] = _unpacked(about["tree"], tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{Path(path).name} holds no state of a training run ({error}); delete it") from error
    return state


def random_state() -> dict[str, Any]:
    """Where the global streams of random numbers stand: torch's, numpy's and Python's."""
    name, keys, place, gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, gauss, cached],
        "python": list(random.getstate()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to where `random_state` was."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_packed(item, tensors) for item in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (np.integer, np.floating)):
        return {"value": value.item()}
    raise TypeError(f"a {type(value).__name__} cannot be saved")


def _unpacked(packed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    kind, content = next(iter(packed.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpacked(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpacked(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "dtype":
        found = getattr(torch, content, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"torch has no type {content!r}")
        return found
    return content
