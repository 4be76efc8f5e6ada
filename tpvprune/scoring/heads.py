"""Heads: cotangents `u` on a model's outputs with `E[u u^T] = M`, the metric drift is measured in.

A head is a frozen dataclass with `cotangent(output, generator)` for a random draw, independent per
sample, and `exact(output)` for a finite list whose outer products sum to `M`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tpvprune.errors import ModelError
from tpvprune.scoring.engine import wide


@runtime_checkable
class Head(Protocol):
    """What a head offers; `testing.check_head` checks one of your own.

    A head of several outputs (`Several`) takes and gives dicts of tensors in place of tensors.
    """

    def cotangent(self, output: Any, generator: torch.Generator) -> Any:
        """One random cotangent, shaped as `output` `(batch, ...)`, with `E[u u^T] = M` per sample.

        Numbers are drawn from `generator` sample after sample, so that a batch taken in two parts gets the same.
        """
        ...

    def exact(self, output: Any) -> Iterator[Any]:
        """Cotangents shaped as `output` whose outer products sum to `M` for every sample."""
        ...


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that a seed means the same on every device.
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (bits.to(like.device) * 2 - 1).to(like.dtype)


@dataclass(frozen=True)
class Logits:
    """`M = I`: squared distance of the outputs, each entry alike. For regression and features too."""

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Rademacher signs, shaped as `output`."""
        return _rademacher(_single(output, "logits"), generator)

    def exact(self, output: Tensor) -> Iterator[Tensor]:
        """The unit vectors of one sample's outputs, one at a time."""
        output = _single(output, "logits")
        for k in range(output[0].numel()):
            unit = output.new_zeros(len(output), output[0].numel())
            unit[:, k] = 1
            yield unit.view_as(output)

    def slope(self, output: Tensor, reference: Tensor) -> Tensor:
        """Gradient of half the squared distance from `reference`, at `output`."""
        return output - reference


@dataclass(frozen=True)
class Softmax:
    """`M = diag(p) - p p^T`, the Fisher metric of the class probabilities `p`.

    Half the TPV under it is, to second order, KL(dense || changed) in nats (Arpit 2026,
    arXiv 2512.11089). Outputs are logits `(batch, classes)`.
    """

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """`sqrt(p) r - p <sqrt(p), r>` with `r` Rademacher, `(batch, classes)`."""
        p = _probabilities(output, "softmax")
        root = p.sqrt() * _rademacher(p, generator)
        return (root - p * root.sum(1, keepdim=True)).to(output.dtype)

    def exact(self, output: Tensor) -> Iterator[Tensor]:
        """`sqrt(p_k) (e_k - p)` for every class k, `(batch, classes)` each."""
        p = _probabilities(output, "softmax")
        for k in range(output.shape[1]):
            u = -p.clone()
            u[:, k] += 1
            yield (u * p[:, k : k + 1].sqrt()).to(output.dtype)

    def slope(self, output: Tensor, reference: Tensor) -> Tensor:
        """Gradient of KL(reference || output) in the logits `output`: the difference of the probabilities."""
        p, q = (_probabilities(value, "softmax") for value in (output, reference))
        return (p - q).to(output.dtype)


@dataclass(frozen=True)
class Probabilities:
    """`M = A A` with `A = diag(p) - p p^T`: squared distance of the class probabilities.

    Unlike `Softmax` it hardly minds what happens to classes that are improbable anyway.
    """

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """`A r` with `r` Rademacher, `(batch, classes)`."""
        p = _probabilities(output, "probabilities")
        drawn = p * _rademacher(p, generator)
        return (drawn - p * drawn.sum(1, keepdim=True)).to(output.dtype)

    def exact(self, output: Tensor) -> Iterator[Tensor]:
        """`p_k (e_k - p)` for every class k, `(batch, classes)` each."""
        p = _probabilities(output, "probabilities")
        for k in range(output.shape[1]):
            u = -p.clone()
            u[:, k] += 1
            yield (u * p[:, k : k + 1]).to(output.dtype)


@dataclass(frozen=True)
class Margin:
    """Squared change of the margin between the top class and a runner-up drawn from the others by probability."""

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """`e_top - e_j` or its negative, with `j` drawn by its probability among the rest, `(batch, classes)`."""
        top, others = self._others(output)
        steps = others.double().cumsum(1)
        drawn = torch.rand(len(output), 2, generator=generator, dtype=torch.float64).to(steps.device)
        runner = torch.searchsorted(steps, drawn[:, :1] * steps[:, -1:], right=True).clamp(max=output.shape[1] - 1)
        # Past the last class of any weight stands a class of none, or the top class itself.
        runner = torch.where(others.gather(1, runner) > 0, runner, others.argmax(1, keepdim=True))
        u = torch.zeros_like(output).scatter_(1, top, 1.0)
        # Without the sign the mean would not vanish, and products of different samples with it.
        return u.scatter_(1, runner, -1.0) * torch.where(drawn[:, 1:] < 0.5, -1.0, 1.0).to(u)

    def exact(self, output: Tensor) -> Iterator[Tensor]:
        """`sqrt(q_j) (e_top - e_j)` for every class j, `q_j` its probability among the rest."""
        top, others = self._others(output)
        for j in range(output.shape[1]):
            u = torch.zeros_like(output).scatter_(1, top, 1.0)
            u[:, j] -= 1
            yield u * others[:, j : j + 1].sqrt().to(output.dtype)

    @staticmethod
    def _others(output: Tensor) -> tuple[Tensor, Tensor]:
        logits = wide(_logits(output, "margin"))
        top = logits.argmax(1, keepdim=True)
        return top, logits.scatter(1, top, -torch.inf).softmax(1)


@dataclass(frozen=True)
class Cosine:
    """Squared distance of embeddings scaled to length one: to second order twice one minus their cosine.

    Outputs are embeddings `(batch, ...)`, compared whole.
    """

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """`(r - f <f, r>) / |output|` with `f` the embedding scaled to length one, shaped as `output`."""
        return self._onto_sphere(output, _rademacher(_single(output, "cosine"), generator))

    def exact(self, output: Tensor) -> Iterator[Tensor]:
        """The same of the unit vectors of one sample's outputs, one at a time."""
        for unit in Logits().exact(_single(output, "cosine")):
            yield self._onto_sphere(output, unit)

    @staticmethod
    def _onto_sphere(output: Tensor, vector: Tensor) -> Tensor:
        flat, u = (wide(value).reshape(len(output), -1) for value in (output, vector))
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        if bool((length == 0).any()):
            raise ModelError("the cosine head met an embedding of length zero; use head='logits' for such outputs")
        direction = flat / length
        tangent = (u - direction * (direction * u).sum(1, keepdim=True)) / length
        return tangent.view_as(output).to(output.dtype)


@dataclass(frozen=True)
class Function:
    """Drift of any differentiable function of the output, in the metric of another head.

    Attributes:
        function: takes the output `(batch, ...)` (or the dict of outputs) and gives a tensor with a row a sample.
        head: the metric on what it gives.
    """

    function: Callable[[Any], Tensor]
    head: str | Head = "logits"

    def cotangent(self, output: Any, generator: torch.Generator) -> Any:
        """The pull-back of one random cotangent, shaped as `output`."""
        return next(self._pulled(output, lambda head, value: iter([head.cotangent(value, generator)])))

    def exact(self, output: Any) -> Iterator[Any]:
        """The pull-backs of the exact cotangents, shaped as `output`."""
        return self._pulled(output, lambda head, value: head.exact(value))

    def _pulled(self, output: Any, cotangents: Callable[[Head, Tensor], Iterator[Tensor]]) -> Iterator[Any]:
        named = output if isinstance(output, dict) else {"": output}
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_(True) for name, value in named.items()}
            value = self.function(leaves if isinstance(output, dict) else leaves[""])
        rows = len(next(iter(leaves.values())))
        if not isinstance(value, Tensor) or not value.requires_grad or value.ndim == 0 or len(value) != rows:
            raise ModelError("the function of a head must give a differentiable tensor with a row a sample")
        for u in cotangents(head_named(self.head), value.detach()):
            found = torch.autograd.grad(
                value, list(leaves.values()), u, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            pulled = dict(zip(leaves, found, strict=True))
            yield pulled if isinstance(output, dict) else pulled[""]


@dataclass(frozen=True)
class Several:
    """A head for each of several outputs; the metric is block-diagonal, so that their drifts add up.

    Attributes:
        heads: output's name to head. Outputs that are not named do not count.
    """

    heads: Mapping[str, str | Head]

    def cotangent(self, output: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """One independent cotangent for each output, shaped as the outputs.

        Each output has a stream of numbers of its own, grown from `generator`.
        """
        self._check(output)
        drawn = {name: torch.zeros_like(value) for name, value in output.items()}
        rows = len(next(iter(output.values())))
        seeds = torch.randint(0, 2**62, (rows, len(self.heads)), generator=generator)
        for number, (name, head) in enumerate(self.heads.items()):
            streams = [torch.Generator().manual_seed(seed) for seed in seeds[:, number].tolist()]
            own = [head_named(head).cotangent(output[name][i : i + 1], one) for i, one in enumerate(streams)]
            drawn[name] = torch.cat(own)
        return drawn

    def exact(self, output: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The exact cotangents of one output after the other, zero for the rest."""
        self._check(output)
        for name, head in self.heads.items():
            for u in head_named(head).exact(output[name]):
                yield {key: u if key == name else torch.zeros_like(value) for key, value in output.items()}

    def _check(self, output: Any) -> None:
        if not isinstance(output, dict):
            raise ModelError("head Several is for models that return several outputs by name; this one returns one")
        lacks = [name for name in self.heads if name not in output]
        if lacks or not self.heads:
            raise ModelError(
                f"head Several names {', '.join(map(repr, lacks)) or 'no output'}; the model returns "
                f"{', '.join(map(repr, output))}"
            )


def _single(output: Any, name: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the {name} head needs one tensor, the model returns {', '.join(map(repr, output))}; name "
            "the one that counts with output='key', or give a head of each with Several"
        )
    return output


def _logits(output: Any, name: str) -> Tensor:
    output = _single(output, name)
    if output.ndim != 2 or output.shape[1] < 2:
        raise ModelError(
            f"the {name} head needs logits of shape (batch, 2 classes or more), not {tuple(output.shape)}; "
            "use head='logits' for other outputs"
        )
    return output


def _probabilities(output: Tensor, name: str) -> Tensor:
    return wide(_logits(output, name)).softmax(1)


HEADS: dict[str, type] = {
    "softmax": Softmax,
    "logits": Logits,
    "features": Logits,
    "probabilities": Probabilities,
    "margin": Margin,
    "cosine": Cosine,
}


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
