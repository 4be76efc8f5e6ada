"""Fingerprints of models, by which a file, or a later run, knows them again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

LOOKED_AT = 256  # entries of a tensor that a quick fingerprint looks at


def weights_digest(model: nn.Module) -> str:
    """A quick fingerprint of a model's parameters and buffers: of evenly spaced entries of each."""
    named = [*model.named_parameters(), *model.named_buffers()]
    about = ";".join(f"{name}{tuple(tensor.shape)}" for name, tensor in named)
    with torch.no_grad():
        entries = [tensor.reshape(-1)[:: max(1, tensor.numel() // LOOKED_AT)].double() for _, tensor in named]
        if len({tensor.device for tensor in entries}) > 1:
            entries = [tensor.cpu() for tensor in entries]
        looked_at = torch.cat(entries) if entries else torch.zeros(0)  # one copy from a device, not hundreds
    return entries_digest(about, tuple(looked_at.shape), looked_at)


def state_digest(model: nn.Module) -> str:
    """A fingerprint of all entries of a model's parameters and buffers, and of their kinds."""
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(_flat(tensor).data)
    return found.hexdigest()


def entries_digest(before: str, shape: tuple[int, ...], entries: Tensor) -> str:
    """A fingerprint of a text, and of a tensor by its shape and some of its entries."""
    data = entries.cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(before.encode() + str(shape).encode() + data).hexdigest()


def tensor_digest(value: Tensor) -> str:
    """A fingerprint of all entries of a tensor, of its kind and shape."""
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)};".encode())
    found.update(_flat(value).data)
    return found.hexdigest()


def samples_digest(inputs: Tensor) -> int:
    """A fingerprint of samples, `(batch, ...)`, whatever their order; fingerprints of several batches add up."""
    return sum(int(tensor_digest(sample), 16) for sample in inputs)


def raw_bytes(value: Tensor) -> bytes:
    """All entries of a tensor as they lie in memory, whatever their kind."""
    return _flat(value).tobytes()


def _flat(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
