"""A Kronecker-factored preconditioner (Martens and Grosse 2015, arXiv 1503.05671)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.errors import InputError
from tpvprune.patches import patches, some_of
from tpvprune.reads import read_by
from tpvprune.recovery.fits import COLUMNS
from tpvprune.recovery.linear import REFITTED, TRANSPOSED, is_product
from tpvprune.recovery.settings import GaussNewton

WIDEST = 8192  # inputs of a layer up to which their second moments are inverted, and not their diagonal alone
LEAST_BENT = 1e-9  # mean curvature of a vector of parameters that are moved, as a share of the most that one has
FLOOR = 0.1  # of the mean: what a preconditioner's diagonal, seen in few draws, is held above

Vector = dict[str, Tensor]


class Factors:
    """A preconditioner: for weights of layers the second moments of inputs and of output gradients, else a diagonal.

    Args:
        model: the pruned one.
        theta: parameters that are moved.
        settings: damping and positions.
        masks: of weights that stay zero.
    """

    def __init__(self, model: nn.Module, theta: Vector, settings: GaussNewton, masks: Mapping[str, Tensor]) -> None:
        modules = {n: m for n, m in model.named_modules() if isinstance(m, REFITTED) and f"{n}.weight" in theta}
        # The weights of transposed ones have other axes, and those of code of its own another curvature: the diagonal.
        self._layers: dict[str, Any] = {
            n: m for n, m in modules.items() if not isinstance(m, TRANSPOSED) and is_product(m)
        }
        self._settings, self._masks = settings, masks
        self._read: dict[str, Tensor] = {}
        self._told: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._squares: Vector = {}
        self._inverse: dict[str, tuple[Tensor, Tensor]] = {}
        self._damping: dict[str, float] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take second moments of what layers read, and of the gradients of what they give, while this is on."""
        layers = self._layers.items()
        handles = [layer.register_forward_hook(self._hook(name), with_kwargs=True) for name, layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._add_inputs(name, layer, read_by(args, kwargs).detach())
            if output.requires_grad:
                output.register_hook(lambda gradient: self._add_gradients(name, layer, gradient.detach()))

        return hook

    def _add_inputs(self, name: str, layer: Any, value: Tensor) -> None:
        reads = max(1, value[0].numel() * layer.weight[0].numel() // max(1, layer.weight.shape[1]))
        for part in value.split(max(1, COLUMNS // reads)):
            columns = patches(layer, part)
            columns = columns[..., some_of(columns.shape[3], self._settings.positions)]
            rows = _wide(columns.permute(1, 2, 0, 3).flatten(2))  # (groups, inputs, rows)
            wide = rows.shape[1] > WIDEST
            moments = rows.square().sum(2) if wide else rows @ rows.mT
            self._read[name] = self._read.get(name, 0) + moments.double()
            self._rows[name] = self._rows.get(name, 0) + rows.shape[2]

    def _add_gradients(self, name: str, layer: Any, gradient: Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1]).T if isinstance(layer, nn.Linear) else gradient.transpose(0, 1)
        grouped = _wide(flat.reshape(int(getattr(layer, "groups", 1)), -1, gradient.numel() // len(flat)))
        self._told[name] = self._told.get(name, 0) + (grouped @ grouped.mT).double()

    def add(self, gradients: Vector) -> None:
        """Take in the gradient of one batch under random signs: its squares are the curvature's diagonal on average."""
        for name, gradient in gradients.items():
            if not self._of_layer(name):
                self._squares[name] = self._squares.get(name, 0) + gradient.double().square()

    def finish(self, times: float) -> None:
        """Invert.

        Args:
            times: how many times more samples there are than were looked at.

        Raises:
            InputError: the damping does not bear second moments up that are singular but for rounding.
        """
        share = self._settings.damping
        for name in self._layers:
            if name not in self._told:
                continue
            read, told = self._read[name] / self._rows[name], self._told[name] * times
            middle = [float((m if m.ndim == 2 else m.diagonal(dim1=1, dim2=2)).mean()) for m in (read, told)]
            if not min(middle) > 0:
                continue
            self._damping[f"{name}.weight"] = share * middle[0] * middle[1]
            dtype = torch.promote_types(self._layers[name].weight.dtype, torch.float32)
            try:
                inverse = [_inverted(m, share**0.5 * f).to(dtype) for m, f in zip((read, told), middle, strict=True)]
            except torch.linalg.LinAlgError as error:
                raise InputError(
                    f"refine: second moments of layer {name!r} cannot be inverted with damping={share:g}; give a "
                    "larger damping, as GaussNewton(damping=1e-3)"
                ) from error
            self._inverse[f"{name}.weight"] = inverse[0], inverse[1]
        means = {name: float(square.mean()) * times for name, square in self._squares.items()}
        least = LEAST_BENT * max(means.values(), default=0.0)
        for name, square in self._squares.items():
            mean = means[name]
            if mean > least:  # else rounding alone: a key's bias, say, which softmax takes out
                self._damping[name] = share * mean
                self._squares[name] = square * times + max(share, FLOOR) * mean

    def solve(self, vector: Vector) -> Vector:
        """The preconditioner's inverse times a vector; zero where nothing is known to bend."""
        found = {}
        for name, value in vector.items():
            if name not in self._damping:
                found[name] = torch.zeros_like(value)
            elif name in self._inverse:
                read, told = self._inverse[name]
                rows = value.to(told.dtype).reshape(len(told), told.shape[-1], -1)  # (groups, outputs, inputs)
                moved = told @ rows
                moved = moved * read.unsqueeze(1) if read.ndim == 2 else moved @ read
                found[name] = moved.reshape(value.shape).to(value.dtype)
            else:
                found[name] = value / self._squares[name].to(value.dtype)
            if name in self._masks:
                found[name] = found[name] * self._masks[name].to(value.device)
        return found

    def damped(self, product: Vector, vector: Vector) -> Vector:
        """A product with the curvature, the damping added."""
        return {name: value + self._damping.get(name, 0.0) * vector[name] for name, value in product.items()}

    def _of_layer(self, name: str) -> bool:
        layer, _, last = name.rpartition(".")
        return last == "weight" and layer in self._layers


def _wide(value: Tensor) -> Tensor:
    """In single precision at least: sums of squares in half precision are not positive definite."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _inverted(moments: Tensor, damping: float) -> Tensor:
    """Of `(groups, n, n)` or of diagonals `(groups, n)`."""
    if moments.ndim == 2:
        return 1 / (moments + damping)
    eye = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(moments + damping * eye))
