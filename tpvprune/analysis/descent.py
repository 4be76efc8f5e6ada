"""Plain gradient steps on a copy of a model's weights, for noises that come from training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tpvprune.analysis.distance import squared
from tpvprune.batches import Batch, Outputs, Selector, finite_outputs, model_inputs, select_output
from tpvprune.copies import copied
from tpvprune.errors import ModelError, NonFiniteError
from tpvprune.scoring.activations import backward
from tpvprune.scoring.engine import wide
from tpvprune.scoring.heads import Head
from tpvprune.scoring.probing import detached

Weights = Mapping[str, Tensor]
CHUNK = 256  # inputs of a backward pass


def in_float32(model: nn.Module) -> nn.Module:
    """The model itself; of one in half precision a copy in float32, which takes the same inputs.

    Its layers widen what they are given: a model may cast its inputs to half precision by itself.

    Raises:
        ModelError: it cannot be copied.
    """

    def halves(module: nn.Module, recurse: bool) -> bool:
        return any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters(recurse))

    def widened(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tuple(map(_widened, args)), {name: _widened(value) for name, value in kwargs.items()}

    if not halves(model, recurse=True):
        return model
    finer = copied(model)
    for module in [module for module in finer.modules() if module is finer or halves(module, recurse=False)]:
        module.register_forward_pre_hook(widened, with_kwargs=True)
    return finer.float()


def _widened(value: Any) -> Any:
    return wide(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def gathered(model: nn.Module, batches: Iterable[Batch], output: Selector) -> tuple[Tensor, Any]:
    """All inputs `(n, ...)`, and what the model makes of them."""
    inputs, outputs = [], []
    with torch.no_grad():
        for batch in model_inputs(model, batches, "read"):
            inputs.append(batch)
            outputs.append(finite_outputs(model, batch, output))
    return torch.cat(inputs), _cat(outputs)


def _cat(outputs: list[Any]) -> Outputs:
    if isinstance(outputs[0], dict):
        return {name: torch.cat([one[name] for one in outputs]) for name in outputs[0]}
    return torch.cat(outputs)


def rows(outputs: Outputs, places: Any) -> Outputs:
    """Some samples of outputs."""
    if isinstance(outputs, dict):
        return {name: value[places] for name, value in outputs.items()}
    return outputs[places]


def mean_gradient(
    model: nn.Module,
    weights: Weights,
    inputs: Tensor,
    cotangent: Callable[[Outputs, slice], Outputs],
    output: Selector,
) -> dict[str, Tensor]:
    """Gradient in the weights of the mean over samples of `u . f(x)`, per parameter.

    Args:
        model: says what is computed.
        weights: the parameters to compute it with.
        inputs: `(n, ...)`.
        cotangent: `u` of the outputs of a slice of the samples.
        output: of the model.

    Raises:
        ModelError: none of the parameters reaches the outputs.
        NonFiniteError: the outputs hold NaN or infinity.
    """
    leaves = {name: value.detach().requires_grad_(True) for name, value in weights.items()}
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    for start in range(0, len(inputs), CHUNK):
        part = slice(start, min(len(inputs), start + CHUNK))
        with torch.enable_grad():
            found = select_output(functional_call(model, leaves, (inputs[part],)), output, model)
        u = cotangent(detached(found), part)
        gradients = backward(found, u, list(leaves.values()), keep_graph=False)
        if all(gradient is None for gradient in gradients):
            told = ", ".join(list(leaves)[:8])
            raise ModelError(f"of the parameters that may move ({told}) none reaches the outputs; name others")
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.detach() / len(inputs)
    if not all(bool(torch.isfinite(value).all()) for value in total.values()):
        raise NonFiniteError("the weights ran away while they were trained: make lr smaller")
    return total


@torch.no_grad()
def movements_at(
    model: nn.Module, weights: Weights, inputs: Tensor, reference: Outputs, head: Head, output: Selector
) -> Tensor:
    """How far other weights move the outputs, `(n,)`."""
    found = []
    for start in range(0, len(inputs), CHUNK):
        part = slice(start, min(len(inputs), start + CHUNK))
        changed = select_output(functional_call(model, dict(weights), (inputs[part],)), output, model)
        found.append(squared(head, rows(reference, part), changed).cpu())
    moved = torch.cat(found)
    if not bool(torch.isfinite(moved).all()):
        raise NonFiniteError("the weights ran away while they were trained: make lr smaller")
    return moved
