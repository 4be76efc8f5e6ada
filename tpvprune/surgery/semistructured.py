"""2:4 sparse weights in the tensors that sparse tensor cores read."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from tpvprune.copies import copied
from tpvprune.errors import ModelError, PlanError
from tpvprune.kinds import as_verb
from tpvprune.plan import attach

logger = logging.getLogger(__name__)
CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores


@as_verb
def to_semi_structured(model: nn.Module) -> nn.Module:
    """A copy for inference whose 2:4 linear layers hold torch's semi-structured tensors: half the weights, and signs.

    What is 2:4 is read off the weights. Layers that are not, convolutions, and sizes and types that torch has no
    kernel for (its constraints are multiples of 16 to 64, in half precision or int8) stay as they are and are
    logged. The copy carries no plan and cannot be saved; save the model first.

    Args:
        model: on a CUDA device of compute capability 8.0 or more, its linear layers in float16 or bfloat16.

    Raises:
        ModelError: the model lies on another device.
        PlanError: no linear layer could be converted.
    """
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ModelError(
            f"the model is on {name}, and 2:4 kernels need a CUDA device of compute capability 8.0 or more (Ampere); "
            "move it there with model.cuda()"
        )
    fast = copied(model)
    refused: dict[str, str] = {}
    done = 0
    for name, module in fast.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if not is_two_of_four(module.weight):
            refused[name] = "not 2:4"
            continue
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage")
                packed = to_sparse_semi_structured(module.weight.detach().contiguous())
        except RuntimeError as error:
            refused[name] = str(error)
            continue
        module.weight = nn.Parameter(packed, requires_grad=False)
        done += 1
    for name, why in refused.items():
        logger.info("%s stays dense: %s", name, why)
    if not done:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3]) or "there is none"
        raise PlanError(
            f"no linear layer could be converted ({why}); mask them with sparsify(..., pattern='2:4') and use "
            "model.half() or model.bfloat16()"
        )
    attach(fast, None)
    return fast


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive weights along the inputs differ from zero.

    Args:
        weight: `(outputs, inputs)`.
    """
    rows, columns = weight.shape
    return columns % 4 == 0 and bool((weight.detach().reshape(rows, -1, 4) != 0).sum(2).le(2).all())
