"""Images whose answer changed, kept small so that a report can show them without the images it was made from."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tpvprune.batches import is_classifier

SIDE = 96  # pixels of a thumbnail at most
SMOOTH = 64  # larger ones are photographs, and take less room as JPEG


@dataclass(frozen=True)
class Example:
    """One image on which two models answer differently.

    Attributes:
        number: its position among the images that were measured.
        before: class that the dense model answers.
        after: class that the other model answers.
        before_share: probability of `before` by the dense model.
        after_share: probability of `after` by the other model.
        kl: KL from the dense model's answer to the other's, in nats.
        label: the right class, or None.
        image: the thumbnail, as a data URI.
    """

    number: int
    before: int
    after: int
    before_share: float
    after_share: float
    kl: float
    label: int | None
    image: str

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; `Example(**form)` is its inverse."""
        return asdict(self)


class Changed:
    """Collects the examples of a measuring that changed most; give it to `report.compare` as `each`.

    Args:
        model: name of the model that is compared with the dense one.
        most: how many to keep.
        mean: that images were normalised with, one a channel.
        std: likewise.
    """

    def __init__(self, model: str, most: int = 12, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        self.model, self.most, self.scale = model, most, (tuple(mean), tuple(std))
        self.seen = self.changed = 0
        self._kept: list[tuple[float, int, Example]] = []

    def __call__(self, inputs: Tensor, reference: Tensor, outputs: Mapping[str, Tensor], labels: Tensor | None) -> None:
        """Look at one batch: `(batch, channels, h, w)` images and the logits `(batch, classes)` of both models."""
        start, self.seen = self.seen, self.seen + len(inputs)
        answer = outputs[self.model]
        if not is_classifier(answer) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
            return
        p, q = reference.double().log_softmax(1), answer.double().log_softmax(1)
        drift = (p.exp() * (p - q)).sum(1)
        before, after = reference.argmax(1), answer.argmax(1)
        for i in (before != after).nonzero().flatten().tolist():
            self.changed += 1
            kl = float(drift[i])
            if len(self._kept) == self.most and (not self.most or kl <= self._kept[0][0]):
                continue
            example = Example(
                number=start + i,
                before=int(before[i]),
                after=int(after[i]),
                before_share=float(p[i, before[i]].exp()),
                after_share=float(q[i, after[i]].exp()),
                kl=kl,
                label=None if labels is None or int(labels[i]) < 0 else int(labels[i]),
                image=thumbnail(inputs[i], *(part[: inputs.shape[1]] for part in self.scale)),
            )
            (heapq.heappushpop if len(self._kept) == self.most else heapq.heappush)(
                self._kept, (kl, -example.number, example)
            )

    def examples(self) -> tuple[Example, ...]:
        """Those that changed most, most first."""
        return tuple(example for *_, example in sorted(self._kept, key=lambda kept: kept[:2], reverse=True))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form: how many were seen and changed, and the examples."""
        return {
            "model": self.model,
            "seen": self.seen,
            "changed": self.changed,
            "examples": [example.to_json() for example in self.examples()],
        }


def thumbnail(image: Tensor, mean: Sequence[float] = (), std: Sequence[float] = ()) -> str:
    """A model's input as a small picture, in a data URI.

    Args:
        image: `(1 or 3, h, w)`, normalised.
        mean: that it was normalised with, one a channel. Where mean and std do not bring it back to between 0 and 1,
            it is stretched from its least to its largest value.
        std: likewise.
    """
    pixels = image.detach().double().cpu()
    if len(mean) == len(std) == len(pixels):
        shape = (-1, 1, 1)
        back = pixels * torch.tensor(std).double().view(shape) + torch.tensor(mean).double().view(shape)
        if float(back.min()) >= -0.01 and float(back.max()) <= 1.01:
            pixels = back
    if float(pixels.min()) < -0.01 or float(pixels.max()) > 1.01:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low)
    data = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(data[..., 0] if data.shape[2] == 1 else data)
    smooth = max(picture.size) > SMOOTH
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if smooth else "PNG", **({"quality": 80} if smooth else {"optimize": True}))
    kind = "jpeg" if smooth else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
