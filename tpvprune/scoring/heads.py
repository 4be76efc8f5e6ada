"""Heads: cotangents `u` on a model's outputs with `E[u u^T] = M`, the metric drift is measured in.

A head is a frozen dataclass with `cotangent(output, generator)` for a random draw, independent per
sample, and `exact(output)` for a finite list whose outer products sum to `M`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tpvprune.errors import ModelError


@runtime_checkable
class Head(Protocol):
    """What a head offers; `testing.check_head` checks one of your own."""

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """One random cotangent, shaped as `output` `(batch, ...)`, with `E[u u^T] = M` per sample."""
        ...

    def exact(self, output: Tensor) -> Iterator[Tensor]:
        """Cotangents shaped as `output` whose outer products sum to `M` for every sample."""
        ...


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that a seed means the same on every device.
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (bits.to(like.device) * 2 - 1).to(like.dtype)


@dataclass(frozen=True)
class Logits:
    """`M = I`: squared distance of the outputs, each entry alike. For regression and embeddings too."""

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Rademacher signs, shaped as `output`."""
        return _rademacher(output, generator)

    def exact(self, output: Tensor) -> Iterator[Tensor]:
        """The unit vectors of one sample's outputs, one at a time."""
        for k in range(output[0].numel()):
            unit = torch.zeros_like(output).flatten(1)
            unit[:, k] = 1
            yield unit.view_as(output)


@dataclass(frozen=True)
class Softmax:
    """`M = diag(p) - p p^T`, the Fisher metric of the class probabilities `p`.

    Half the TPV under it is, to second order, KL(dense || changed) in nats (Arpit 2026,
    arXiv 2512.11089). Outputs are logits `(batch, classes)`.
    """

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """`sqrt(p) r - p <sqrt(p), r>` with `r` Rademacher, `(batch, classes)`."""
        p = self._probabilities(output)
        root = p.sqrt() * _rademacher(p, generator)
        return (root - p * root.sum(1, keepdim=True)).to(output.dtype)

    def exact(self, output: Tensor) -> Iterator[Tensor]:
        """`sqrt(p_k) (e_k - p)` for every class k, `(batch, classes)` each."""
        p = self._probabilities(output)
        for k in range(output.shape[1]):
            u = -p.clone()
            u[:, k] += 1
            yield (u * p[:, k : k + 1].sqrt()).to(output.dtype)

    @staticmethod
    def _probabilities(output: Tensor) -> Tensor:
        if output.ndim != 2 or output.shape[1] < 2:
            raise ModelError(
                f"the softmax head needs logits of shape (batch, 2 classes or more), not {tuple(output.shape)}; "
                "use head='logits' for other outputs"
            )
        wide = output if output.dtype == torch.float64 else output.float()
        return wide.softmax(1)


HEADS: dict[str, type] = {"softmax": Softmax, "logits": Logits}


def head_named(head: str | Head) -> Head:
    """A head from its name, or the head itself.

    Raises:
        ModelError: there is no head of that name.
    """
    if isinstance(head, str):
        if head not in HEADS:
            raise ModelError(f"there is no head {head!r}; choose one of {', '.join(sorted(HEADS))}")
        made: Head = HEADS[head]()
        return made
    return head
