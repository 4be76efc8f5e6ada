"""Labels as cross-entropy reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpvprune.errors import DataError


def class_labels(labels: Tensor, samples: int, outputs: Sequence[int], mixed: bool = False) -> Tensor:
    """Numbers of classes `(batch, ...)` in int64, or shares of all classes shaped as the outputs.

    Args:
        labels: as they come with a batch.
        samples: inputs of the batch.
        outputs: what the model gives for a sample, `(classes, ...)`.
        mixed: whether pairs of images are mixed, which takes one number a sample.

    Raises:
        DataError: they are neither, there are more or fewer than inputs, or a number is of no class.
    """
    shape, wanted = tuple(labels.shape), (samples, *outputs[1:])
    if not outputs:
        raise DataError("finetune: label_weight is above zero and the model gives no logits of classes; set it to 0")
    if shape[:1] != (samples,):
        raise DataError(f"finetune: labels are {shape} for {samples} inputs of a batch; give one for each")
    if labels.is_floating_point() and shape == (samples, *outputs) and not mixed:
        return labels
    if labels.is_floating_point():
        told = "class numbers, labels.long(), or of shares labels.argmax(1)"
        raise DataError(f"finetune: labels are of {labels.dtype}, {shape}; give {told}")
    if mixed and len(wanted) > 1:
        raise DataError(f"finetune: mixup and cutmix mix one label a sample, and outputs are {wanted}; set both to 0")
    if shape != wanted:
        raise DataError(f"finetune: labels are {shape}, not {wanted}; of one-hot rows give labels.argmax(1)")
    if labels.numel() and int(labels.max()) >= outputs[0]:
        raise DataError(
            f"finetune: label {int(labels.max())} is none of the model's {outputs[0]} classes, 0 to {outputs[0] - 1}; "
            "give the labels that it was trained with, or set label_weight=0"
        )
    return labels.to(torch.int64)
