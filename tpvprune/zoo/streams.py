"""Images out of timm's dataset factory: tar files, Hugging Face and torchvision sets by index, the rest as streams.

images.tar                          a tar file of images
hfds/NAME@SPLIT, torch/NAME@SPLIT   sets that are read by index
wds/FOLDER@shard-{0..9}.tar|5000    webdataset shards and how many samples they hold
hfids/NAME@SPLIT, tfds/NAME@SPLIT   streams
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset
from torch import Tensor

from tpvprune.errors import DataError
from tpvprune.zoo.pool import decoded

INDEXED, STREAMED = ("hfds", "torch"), ("wds", "hfids", "tfds")
TARS = (".tar", ".tgz", ".tar.gz")
BUFFER = 2048  # images that are held to be shuffled
Transform = Callable[[Any, bool], Tensor]


def from_factory(source: str | Path) -> bool:
    """Whether a source is one of those above; a folder of that name is a folder."""
    text = str(source)
    if Path(text).expanduser().is_dir():
        return False
    return text.endswith(TARS) or text.partition("/")[0].lower() in (*INDEXED, *STREAMED)


def shards(source: str | Path) -> list[Path] | None:
    """The files of a webdataset that its name tells of; None for other sources."""
    name, _, split = str(source).partition("@")
    kind, _, root = name.partition("/")
    if not from_factory(source) or kind.lower() != "wds":
        return None
    names = re.sub(r"\{[^}]*\}", "*", split.partition("|")[0])
    return sorted(Path(root).expanduser().glob(names)) if names else []


def streamed(source: str | Path) -> bool:
    """Whether a source can be read in its own order only."""
    return str(source).partition("/")[0].lower() in STREAMED


def dataset_of(source: str | Path, mode: str) -> Any:
    """Timm's dataset of a source.

    Args:
        source: see above.
        mode: "RGB" or "L".

    Raises:
        DataError: it cannot be opened; a package may be missing.
    """
    text = str(source)
    name, _, split = text.partition("@")
    kind, _, rest = name.partition("/")
    given: dict[str, Any] = {"split": split or "train", "input_img_mode": mode}
    if kind.lower() == "wds":
        given |= {"root": rest}
    elif kind.lower() == "torch":
        rest, _, root = rest.partition(":")
        given = {"split": split or "train", "root": root or "."}
        name = f"torch/{rest}"
    elif kind.lower() not in (*INDEXED, *STREAMED):
        name, given = "", {"root": str(Path(text).expanduser()), "search_split": False, "input_img_mode": mode}
    try:
        return _whole(create_dataset(name, **given))
    except (ImportError, NameError, AssertionError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(
            f"{text} cannot be opened ({type(error).__name__}: {error}); give an existing source, and install the "
            "package it is read with (webdataset, datasets, tfds-nightly)"
        ) from error


def _whole(dataset: Any) -> Any:
    """The dataset, none of it left to other processes.

    What is scored and what is measured on follows from an image's place among all, and a reader that deals shards out
    repeats some where they are unequal.
    """
    reader = getattr(dataset, "reader", None)
    for name, value in (("dist_rank", 0), ("dist_num_replicas", 1)):
        if hasattr(reader, name):
            setattr(reader, name, value)
    return dataset


def image_of(dataset: Any, place: int, mode: str) -> Any:
    """One image; where it cannot be read that is an error, and not another image."""
    reader = getattr(dataset, "reader", None)
    if reader is None:
        return dataset[place][0]
    return decoded(reader[place][0], mode)


class Targets(Sequence[int]):
    """Labels of a dataset that is read by index, looked up when they are asked for.

    Args:
        dataset: timm's.
        renumbered: what is given in place of its own numbers.
    """

    def __init__(self, dataset: Any, renumbered: Mapping[int, int] | None = None) -> None:
        self._dataset, self._renumbered = dataset, renumbered

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: Any) -> Any:
        reader = getattr(self._dataset, "reader", None)
        found = int((self._dataset if reader is None else reader)[place][1])
        return found if self._renumbered is None else self._renumbered[found]


class Stream:
    """Images that come in their own order; offers what a `Pool` does, without knowing one from another beforehand.

    Attributes:
        name: where the images come from.
        skipped: nothing: a stream leaves out what it cannot read by itself.
    """

    def __init__(self, name: str, dataset: Any, transform: Transform, labelled: bool) -> None:
        self.name, self.labelled = name, labelled
        self.skipped: dict[str, str] = {}
        self._dataset, self._transform = dataset, transform
        self._count = len(dataset)
        self._cuts: tuple[Callable[[int], bool] | int, ...] = ()  # parts, and numbers of first images, in turn

    def __len__(self) -> int:
        return self._count

    def part(self, mine: Callable[[int], bool]) -> Stream:
        """The images at the places, counted from 0, that `mine` says yes to."""
        return self._cut(mine, sum(map(mine, range(self._count))))

    def split(self) -> tuple[Stream, Stream]:
        """(even places, odd places): for scoring and recovery, for measuring."""
        return self.part(lambda place: place % 2 == 0), self.part(lambda place: place % 2 == 1)

    def sample(self, count: int | None, seed: int = 0) -> Stream:
        """The first `count` images: a stream cannot be drawn from without reading it."""
        if count is None or count >= self._count:
            return self
        return self._cut(count, count)

    def _cut(self, cut: Callable[[int], bool] | int, count: int) -> Stream:
        twin = copy.copy(self)
        twin._cuts, twin._count = (*self._cuts, cut), count
        return twin

    def images(self) -> Iterator[tuple[Any, int]]:
        """The images that are asked for, as they come, with labels or -1; nothing is read behind a last one."""
        seen = [0] * len(self._cuts)
        for image, label in self._dataset:
            for depth, cut in enumerate(self._cuts):
                place, seen[depth] = seen[depth], seen[depth] + 1
                if not isinstance(cut, int) and not cut(place):
                    break
            else:
                yield image, int(label) if self.labelled else -1
            if any(isinstance(cut, int) and had >= cut for cut, had in zip(self._cuts, seen, strict=True)):
                return

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool | str = False,
        workers: int = 0,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> StreamLoader:
        """Batches `(images (batch, channels, h, w), labels (batch,))`; shuffled within `BUFFER` images.

        Args:
            batch_size: images at once, of all processes together.
            shuffle: whether every pass has an order of its own.
            augment: whether images are read otherwise each time.
            workers: of no effect: a stream is read by the process itself.
            seed: of the order.
            share: `(rank, processes)`: of each batch the images at `rank`, `rank + processes` and so on are given; the
                others are read too.
        """
        return StreamLoader(self, self._transform, batch_size, shuffle, bool(augment), seed, share)


class StreamLoader:
    """Batches of a stream; can be read again and again.

    Attributes:
        shared: whether it gives this process's share of each batch; all of them give equally many batches then.
        stands_in: whether the last batch given is no share, as there was none for this process.
    """

    def __init__(
        self,
        stream: Stream,
        transform: Transform,
        batch_size: int,
        shuffle: bool,
        augment: bool,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.pool = stream
        self.generator = torch.Generator().manual_seed(seed)
        self.shared, self.stands_in = share[1] > 1, False
        self._share = share
        self._transform, self._size, self._shuffle, self._augment = transform, batch_size, shuffle, augment

    def __len__(self) -> int:
        return -(-len(self.pool) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        held: list[tuple[Any, int]] = []
        for item in self._ordered():
            held.append(item)
            if len(held) == self._size:
                yield self._batch(held)
                held = []
        if held:
            yield self._batch(held)

    def _batch(self, items: list[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        rank, world = self._share
        mine = items[rank::world]
        self.stands_in = not mine
        images, labels = zip(*(mine or items[:1]), strict=True)
        return torch.stack([self._transform(image, self._augment) for image in images]), torch.tensor(labels)

    def _ordered(self) -> Iterator[tuple[Any, int]]:
        if not self._shuffle:
            yield from self.pool.images()
            return
        held: list[tuple[Any, int]] = []
        for item in self.pool.images():
            held.append(item)
            if len(held) > BUFFER:
                yield held.pop(int(torch.randint(len(held), (), generator=self.generator)))
        for place in torch.randperm(len(held), generator=self.generator).tolist():
            yield held[place]
