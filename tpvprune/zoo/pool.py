"""An ordered set of images, and batches of it.

The rule that keeps measuring honest: sorted by path, even positions are for scoring and recovery, odd positions only
for measuring.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from tpvprune.errors import DataError

logger = logging.getLogger(__name__)
BAD_SHARE = 0.1
BROKEN = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@contextmanager
def opened(file: Any) -> Iterator[Image.Image]:
    """An image file.

    Raises:
        OSError: or another of `BROKEN`: it cannot be read, or, inside, decoded.
    """
    try:
        with Image.open(file) as image:
            yield image
    except RuntimeError as error:  # of the decoder of AVIF
        raise OSError(str(error)) from error


def decoded(file: Any, mode: str) -> Image.Image:
    """The picture in a file, its channels as asked; raises what `opened` does."""
    with opened(file) as image:
        return image.convert(mode)


@dataclass(frozen=True)
class _Broken:
    """Stands in a batch for an image that could not be read."""

    name: str
    why: str


class Pool(Dataset[Any]):
    """An ordered set of images with optional labels; items are `((channels, h, w), label or -1)`.

    Attributes:
        name: where the images come from, for messages and reports.
        skipped: what could not be read, name to reason; shared by all pools cut from one source.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[int, bool], Tensor],
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        skipped: dict[str, str] | None = None,
    ) -> None:
        self.name, self.positions = name, list(range(len(names)))
        self._read, self._names, self._labels = read, names, labels
        self.skipped = {} if skipped is None else skipped
        self.augment = False

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labelled(self) -> bool:
        """Whether items carry labels."""
        return self._labels is not None

    def __getitem__(self, item: int) -> tuple[Tensor, int] | _Broken:
        position = self.positions[item]
        try:
            image = self._read(position, self.augment)
        except BROKEN as error:
            return _Broken(self._names[position], str(error))
        return image, -1 if self._labels is None else self._labels[position]

    def skip(self, broken: _Broken) -> None:
        """Count an unreadable image.

        Raises:
            DataError: more than 10 % of the source cannot be read.
        """
        self.skipped[broken.name] = broken.why
        self.check_skipped()
        logger.warning("%s: skipped %s: %s", self.name, broken.name, broken.why)

    def check_skipped(self) -> None:
        """See whether too many images could not be read.

        Raises:
            DataError: more than 10 % of the source cannot be read.
        """
        total = len(self._names) + sum(name not in self._names for name in self.skipped)
        if len(self.skipped) > BAD_SHARE * total:
            name, why = list(self.skipped.items())[-1]
            raise DataError(
                f"{self.name}: {len(self.skipped)} of {total} images cannot be read, the last is {name} "
                f"({why}); at most {BAD_SHARE:.0%} are skipped, so take them out or give other images"
            )

    def _with(self, positions: Sequence[int]) -> Pool:
        twin = copy.copy(self)
        twin.positions = list(positions)
        return twin

    def split(self) -> tuple[Pool, Pool]:
        """(even positions, odd positions): for scoring and recovery, for measuring."""
        return self._with(self.positions[::2]), self._with(self.positions[1::2])

    def part(self, mine: Callable[[int], bool]) -> Pool:
        """The images at the places, counted from 0, that `mine` says yes to."""
        return self._with([position for place, position in enumerate(self.positions) if mine(place)])

    def sample(self, count: int | None, seed: int = 0) -> Pool:
        """At most `count` images, drawn without replacement, in their old order."""
        if count is None or count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self._with([self.positions[i] for i in sorted(chosen.tolist())])

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        workers: int = 0,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> Loader:
        """Batches `(images (batch, channels, h, w), labels (batch,))`; broken images are left out.

        Args:
            batch_size: images at once, of all processes together.
            shuffle: whether every pass has an order of its own.
            augment: whether images are read otherwise each time.
            workers: processes that read.
            seed: of the order.
            share: `(rank, processes)`: of each batch the images at `rank`, `rank + processes` and so on are read.
        """
        pool = self._with(self.positions)
        pool.augment = augment
        return Loader(pool, batch_size, shuffle, workers, seed, share)


class _Shares(Sampler[list[int]]):
    """This process's images of each batch; none of a batch that has fewer than there are processes."""

    def __init__(self, whole: BatchSampler, share: tuple[int, int]) -> None:
        self._whole, self._share = whole, share

    def __len__(self) -> int:
        return len(self._whole)

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = self._share
        for batch in self._whole:
            yield batch[rank::world]


class Loader:
    """A DataLoader that leaves broken images out and counts them; can be read again and again.

    Attributes:
        shared: whether it gives this process's share of each batch; all of them give equally many batches then.
        stands_in: whether the last batch given is no share, because nothing of it was this process's, or can be read.
    """

    def __init__(
        self, pool: Pool, batch_size: int, shuffle: bool, workers: int, seed: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.pool, self.shared, self.stands_in = pool, share[1] > 1, False
        generator = torch.Generator().manual_seed(seed)
        order = RandomSampler(pool, generator=generator) if shuffle else SequentialSampler(pool)
        batches = _Shares(BatchSampler(order, batch_size, drop_last=False), share)
        self._inner = DataLoader(
            pool,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            generator=generator,
            worker_init_fn=partial(_reseed, share[0]) if share[0] else None,
        )

    @property
    def generator(self) -> torch.Generator:
        """What shuffles; where it stands decides what the next pass gives."""
        return self._inner.generator

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        before: tuple[Tensor, Tensor] | None = None
        for images, labels, broken in self._inner:
            for one in broken:
                if one.name not in self.pool.skipped:
                    self.pool.skip(one)
            self.stands_in = images is None
            if images is None and self.shared:  # the other processes have a batch here
                images, labels = before if before is not None else self._one()
            if images is not None:
                yield images, labels
                before = images, labels

    def _one(self) -> tuple[Tensor, Tensor]:
        """A batch of one image, the first that can be read."""
        for place in range(len(self.pool)):
            images, labels, broken = _collate([self.pool[place]])
            if not broken:
                assert images is not None
                return images, labels
        raise DataError(f"{self.pool.name}: no image can be read; give other images")


def _reseed(rank: int, worker: int) -> None:
    """Random numbers of a process's workers that are not those of another process's."""
    seed = torch.initial_seed() + 1_000_003 * rank
    torch.manual_seed(seed)
    random.seed(seed)


def _collate(items: list[Any]) -> tuple[Tensor | None, Tensor, list[_Broken]]:
    broken = [item for item in items if isinstance(item, _Broken)]
    good = [item for item in items if not isinstance(item, _Broken)]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good]), broken
