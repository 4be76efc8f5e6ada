"""Squared length of a change of outputs in a head's metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpvprune.batches import Outputs
from tpvprune.scoring.heads import Head, Logits, Softmax


def squared(head: Head, reference: Outputs, changed: Outputs) -> Tensor:
    """`d^T M d` of every sample, `(batch,)` in float64: `d` the change, `M` the metric at the reference."""
    if isinstance(reference, Tensor) and isinstance(changed, Tensor):
        difference = changed.double() - reference.double()
        if isinstance(head, Logits):
            return difference.flatten(1).square().sum(1)
        if isinstance(head, Softmax):
            p = reference.double().softmax(1)
            return (p * difference.square()).sum(1) - (p * difference).sum(1).square()
    wide = _double(reference)
    total = torch.zeros(len(next(iter(_tensors(reference)))), dtype=torch.float64)
    for u in head.exact(wide):
        along = sum(
            (one * (new.double() - old.double())).flatten(1).sum(1)
            for one, new, old in zip(_tensors(u), _tensors(changed), _tensors(reference), strict=True)
        )
        assert isinstance(along, Tensor)
        total = total.to(along.device) + along.square()
    return total


def _tensors(outputs: Any) -> list[Tensor]:
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def _double(outputs: Outputs) -> Outputs:
    if isinstance(outputs, dict):
        return {name: value.double() for name, value in outputs.items()}
    return outputs.double()
