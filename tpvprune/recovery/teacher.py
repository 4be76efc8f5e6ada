"""What a distillation is taught: the dense model's answers, to an image alone or to its mirror image as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpvprune.batches import Selector, is_classifier, single_tensor
from tpvprune.errors import InputError


class Teacher:
    """Answers of the dense model.

    The mean of the answers to several views of an image is often nearer to the truth than each of them (Radosavovic
    2018, arXiv 1712.04440), so that a student of it can get beyond what the model says of the image alone.

    Args:
        model: the dense model.
        output: which part of what it returns is taught.
        mirrored: whether answers are the mean of those to an image and to its mirror image.
    """

    def __init__(self, model: nn.Module, output: Selector, mirrored: bool) -> None:
        self._model, self._output, self._mirrored = model, output, mirrored

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """`(batch, ...)`, as the model gives them; of a mirror image as well, the mean of both logits.

        Raises:
            InputError: the mean over mirror images is asked for, and inputs do not look like images `(batch, channels,
                height, width)`, or outputs not like logits `(batch, classes)`: places would move with the image.
        """
        if not self._mirrored:
            return self._answer(inputs)
        if inputs.ndim != 4:
            raise InputError(
                f"finetune: mirrored=True wants images (batch, channels, height, width), and inputs are "
                f"{tuple(inputs.shape)}; set mirrored=False"
            )
        mirror = self._answer(inputs.flip(-1))  # first: who watches the model's layers sees those of the image itself
        answer = self._answer(inputs)
        if not is_classifier(answer):
            raise InputError(
                f"finetune: mirrored=True wants logits (batch, classes), and outputs are {tuple(answer.shape)}; set "
                "mirrored=False"
            )
        wide = torch.promote_types(answer.dtype, torch.float32)  # a mean in half precision would be rounded once more
        return (answer.to(wide) + mirror.to(wide)) / 2

    def _answer(self, inputs: Tensor) -> Tensor:
        return single_tensor(self._model(inputs), self._model, self._output)
