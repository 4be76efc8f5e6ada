"""Small labelled images held on a device, varied as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tpvprune.zoo.pool import Pool


def tensors(pool: Pool) -> tuple[Tensor, Tensor]:
    """All images `(images, channels, height, width)`, channels last, and their labels."""
    items: list[Any] = [pool[position] for position in range(len(pool))]
    images = torch.stack([item[0] for item in items]).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor([item[1] for item in items])


class Varied:
    """Batches in a new order each time, every image shifted by up to an eighth of its side and flipped by chance."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int) -> None:
        self.images, self.labels, self.batch = images, labels, batch

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.labels), device=self.labels.device).split(self.batch):
            yield varied(self.images[chosen]), self.labels[chosen]


def varied(images: Tensor) -> Tensor:
    """Shifts (what lies beyond the edge is reflected) and flips, drawn for each image."""
    (count, channels, side, _), device = images.shape, images.device
    reach = side // 8
    along = torch.arange(side, device=device)
    rows, columns = (torch.randint(2 * reach + 1, (count, 1), device=device) + along for _ in range(2))
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns, columns.flip(1))
    which = torch.arange(count, device=device).view(-1, 1, 1, 1), torch.arange(channels, device=device).view(-1, 1, 1)
    padded = F.pad(images, [reach] * 4, mode="reflect")
    found = padded[(*which, rows.view(count, 1, side, 1), columns.view(count, 1, 1, side))]
    return found.contiguous(memory_format=torch.channels_last)
