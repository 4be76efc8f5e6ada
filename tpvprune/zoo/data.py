"""Images by name: a folder in any tree, an array file, or scikit-learn's digits."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform, resolve_data_config
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torchvision import transforms

from tpvprune.errors import DataError
from tpvprune.zoo.models import source_of, was_recorded
from tpvprune.zoo.pool import BAD_SHARE, BROKEN, Pool, decoded, opened
from tpvprune.zoo.streams import TARS, Stream, Targets, dataset_of, from_factory, image_of, shards, streamed

logger = logging.getLogger(__name__)


def source_state(source: str | Path) -> str:
    """Changes whenever an image is added, removed or rewritten; looks at names, sizes and times only."""
    path, files = Path(source).expanduser(), shards(source)
    if files is None:
        files = sorted(_files(path, hidden=True)) if path.is_dir() else [path] if path.is_file() else []
    lines = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _files(folder: Path, hidden: bool = False) -> list[Path]:
    """All files below a folder, by symbolic links as well; a folder that several lead to once."""
    found, seen = list[Path](), set[str]()
    for root, dirs, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            dirs.clear()
            continue
        seen.add(real)
        # What is no link comes first: it stands under its own name then.
        linked = [name for name in sorted(dirs) if (Path(root) / name).is_symlink()]
        dirs[:] = [name for name in sorted(dirs) if name not in linked] + linked
        dirs[:] = [name for name in dirs if hidden or not name.startswith(".")]
        found += [Path(root) / name for name in names if hidden or not name.startswith(".")]
    return [file for file in found if file.is_file()]


def overlap(one: str | Path, other: str | Path) -> bool:
    """Whether two image sources are the same, or one lies within the other."""
    if str(one) == str(other):
        return True
    a, b = Path(one).expanduser().resolve(), Path(other).expanduser().resolve()
    return a == b or a in b.parents or b in a.parents


def input_size(model: nn.Module, size: int | None = None) -> tuple[int, int, int]:
    """`(channels, height, width)` a model expects, with height and width replaced by `size` if given."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels = config.get("input_size", (3,))[0]
    if was_recorded(model):
        channels = (source_of(model) or {}).get("args", {}).get("in_chans", channels)
    else:  # not always the images' own: some models fold space into channels first
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), channels)
    embed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = config.get("input_size", (3, 224, 224))[1:]
    if embed is not None:
        height, width = embed
    return (channels, size, size) if size else (channels, height, width)


def open_pool(
    source: str | Path, model: nn.Module, *, size: int | None = None, labels: str | Path | None = None
) -> Pool | Stream:
    """Open images by name.

    Args:
        source: a folder of images in any tree, an `.npz` / `.npy` array file, `digits`, or a tar file or name of
            timm's dataset factory (see `zoo.streams`).
        model: says which preprocessing fits (timm's data configuration).
        size: height and width in pixels, in place of the model's own; arrays must have it.
        labels: None, "folders" (a class per parent folder, in the order of timm: numbers in names count as such), or
            a class-map file with a folder name per line in label order. Arrays and digits carry their own, for which
            "own" can be given and nothing else; named sets give their own if anything is asked for.

    Raises:
        DataError: nothing there, no image, more than 10 % unreadable, or labels that do not fit.
    """
    shape = input_size(model, size)
    if str(source) == "digits":
        return _with_own(_digits(shape), labels)
    if from_factory(source):
        return _factory(source, model, shape, labels)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in (".npz", ".npy"):
        return _with_own(_arrays(path, model, shape, size), labels)
    if path.is_file() and _is_image(path):
        raise DataError(f"{source} is one image; give the folder that it is in, {path.parent}")
    if not path.is_dir():
        raise DataError(
            f"no folder of images at {source}; give a folder, a tar file, an .npz or .npy file, 'digits', or a set of "
            "timm's factory, as hfds/NAME@SPLIT, torch/NAME@SPLIT or wds/FOLDER@shard-{0..9}.tar|5000"
        )
    return _folder(path, model, shape, labels)


def _with_own(pool: Pool, labels: str | Path | None) -> Pool:
    """A pool that carries its own labels if any, for which no others can be given."""
    if labels is not None and str(labels) != "own":
        own = "has labels of its own" if pool.labelled else "is in no folders; labels of arrays stand beside x, as y"
        raise DataError(f"labels={labels} (--labels) cannot be taken for {pool.name}, which {own}; leave them out")
    if labels is not None and not pool.labelled:
        raise DataError(f"{pool.name} has no labels of its own; save them beside x, as y, or leave labels out")
    return pool


def _digits(shape: tuple[int, int, int]) -> Pool:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits need scikit-learn; python -m pip install 'tpvprune[demo]'") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    images = nn.functional.interpolate(images, size=shape[1:], mode="bilinear", align_corners=False)
    images = images.expand(-1, shape[0], -1, -1)
    return Pool("digits", _shifting(images), list(map(str, range(len(images)))), data.target.tolist())


def _shifting(images: Tensor) -> Callable[[int, bool], Tensor]:
    """Read from a tensor; augmentation is a shift of up to an eighth of the side."""

    def read(position: int, augment: bool) -> Tensor:
        image = images[position]
        if augment:
            reach = max(1, image.shape[-1] // 8)
            dy, dx = torch.randint(-reach, reach + 1, (2,)).tolist()
            image = image.roll((dy, dx), (1, 2))
        return image

    return read


def _arrays(path: Path, model: nn.Module, shape: tuple[int, int, int], size: int | None) -> Pool:
    channels = shape[0]
    try:
        loaded = np.load(path, allow_pickle=False)
        images = loaded if isinstance(loaded, np.ndarray) else loaded["x"]
        labels = None if isinstance(loaded, np.ndarray) or "y" not in loaded else loaded["y"]
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read as arrays ({error}); save preprocessed images as x (and labels as y)"
        ) from error
    if images.ndim != 4 or images.shape[1] != channels or not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{path}: x is {images.dtype} {images.shape}; it must be preprocessed floats of shape "
            f"(images, {channels}, height, width)"
        )
    if size is not None and images.shape[2:] != (size, size):
        raise DataError(
            f"{path} holds images of {images.shape[2]} x {images.shape[3]}, which are preprocessed and stay as they "
            f"are; leave size={size} (data.size) out, or give a folder of images"
        )
    height, width = images.shape[2:]
    if size is None and getattr(model, "pretrained_cfg", None) and (height, width) != shape[1:]:
        told = f"{path} holds images of {height} x {width}, and the model is for {shape[1]} x {shape[2]}"
        if height == width:
            raise DataError(
                f"{told}, which costs are told of; give size={height} (data.size={height}), or other images"
            )
        logger.warning("%s: costs are told of the latter", told)
    if labels is not None:
        _check_labels(path, labels, len(images), getattr(model, "num_classes", None))
        labels = labels.tolist()
    read = _shifting(torch.from_numpy(images.astype(np.float32, copy=False)))
    return Pool(str(path), read, list(map(str, range(len(images)))), labels)


def _check_labels(path: Path, labels: Any, images: int, classes: int | None) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: y is {labels.dtype} {labels.shape}; it must be whole numbers of classes (images,), -1 for none"
        )
    if len(labels) != images:
        raise DataError(f"{path}: y holds {len(labels)} labels for {images} images")
    if classes and images and int(labels.max()) >= classes:
        raise DataError(f"{path}: y holds label {int(labels.max())}, and the model has {classes} classes, from 0")


def _folder(folder: Path, model: nn.Module, shape: tuple[int, int, int], labels: str | Path | None) -> Pool:
    files = sorted(_files(folder))
    bad: list[Path] = []
    good: list[Path] = []
    for file in files:
        (good if _is_image(file) else bad).append(file)
    if not good:
        raise DataError(f"{folder} holds no image among {len(files)} files; give a folder of images")
    if len(bad) > BAD_SHARE * len(files):
        raise DataError(
            f"{folder}: {len(bad)} of {len(files)} files are no images (first: {bad[0].relative_to(folder)}); "
            f"at most {BAD_SHARE:.0%} are skipped, so take them out or give another folder"
        )
    if bad:
        logger.warning("%s: skipped %d of %d files that are no images", folder, len(bad), len(files))
    transform = _transform(model, shape)

    def read(position: int, augment: bool) -> Tensor:
        return transform(decoded(good[position], "L" if shape[0] == 1 else "RGB"), augment)

    names = [str(file.relative_to(folder)) for file in good]
    skipped = {str(file.relative_to(folder)): "no image" for file in bad}
    return Pool(str(folder), read, names, _labels(good, folder, model, labels), skipped)


def _transform(model: nn.Module, shape: tuple[int, int, int]) -> Callable[[Any, bool], Tensor]:
    """From an image to what the model reads, varied or plain."""
    if shape[0] not in (1, 3):
        raise DataError(
            f"the model reads {shape[0]} channels, and images are read as gray or in colours; save preprocessed "
            "images as x in an .npz file, (images, channels, height, width)"
        )
    config = resolve_data_config({"input_size": shape}, model=model)
    keep = {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}
    if shape[0] == 1:
        keep["mean"], keep["std"] = keep["mean"][:1], keep["std"][:1]
    plain = create_transform(**keep, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    varied = _augmentation(shape, keep)

    def apply(image: Any, augment: bool) -> Tensor:
        out: Tensor = (varied if augment else plain)(image)
        return out

    return apply


def _factory(
    source: str | Path, model: nn.Module, shape: tuple[int, int, int], labels: str | Path | None
) -> Pool | Stream:
    """A source of timm's dataset factory; labels are its own if asked for, a tar file's as those of folders."""
    mode = "L" if shape[0] == 1 else "RGB"
    dataset = dataset_of(source, mode)
    transform = _transform(model, shape)
    tar = str(source).endswith(TARS)
    if labels is not None and not tar and str(labels) not in ("folders", "own"):
        raise DataError(
            f"{source} has labels of its own, which no class map is for; give 'folders' or 'own' for labels"
        )
    if streamed(source):
        return Stream(str(source), dataset, transform, labels is not None)

    def read(position: int, augment: bool) -> Tensor:
        return transform(image_of(dataset, position, mode), augment)

    names = list(map(str, range(len(dataset))))
    renumbered: dict[int, int] | None = None
    if labels is not None and tar and str(labels) != "own":
        given: dict[str, int] = dataset.reader.class_name_to_idx
        number = _numbers(sorted(given, key=natural_key), str(source), model, labels)
        renumbered = {place: number[name] for name, place in given.items()}
    return Pool(str(source), read, names, None if labels is None else Targets(dataset, renumbered))


def _augmentation(shape: tuple[int, int, int], keep: dict[str, Any]) -> Callable[[Any], Tensor]:
    """Flips and crops that keep most of the image: distillation needs variety, not difficulty."""
    if shape[1] > 64:
        varied: Callable[[Any], Tensor] = create_transform(
            **keep, is_training=True, auto_augment=None, color_jitter=None, scale=(0.35, 1.0)
        )
        return varied
    steps = [
        transforms.Resize(shape[1:]),
        transforms.RandomCrop(shape[1:], padding=shape[1] // 8, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(keep["mean"], keep["std"]),
    ]
    return transforms.Compose(steps)


def _is_image(file: Path) -> bool:
    try:
        with opened(file):
            return True
    except BROKEN:
        return False


def _labels(files: list[Path], folder: Path, model: nn.Module, labels: str | Path | None) -> list[int] | None:
    if labels is None:
        return None
    present = sorted({file.parent.name for file in files}, key=natural_key)
    number = _numbers(present, str(folder), model, labels)
    return [number[file.parent.name] for file in files]


def _numbers(present: list[str], source: str, model: nn.Module, labels: str | Path) -> dict[str, int]:
    """The number of each class, by the name of its folder.

    Args:
        present: names of the folders there are, in order.
        source: where.
        model: says how many classes there are.
        labels: "folders", or a class map.
    """
    if str(labels) == "folders":
        classes, origin = present, "class folders"
    else:
        path = Path(labels).expanduser()
        if not path.is_file():
            raise DataError(f"no class map at {labels}; give 'folders' or a file with a folder name per line")
        classes, origin = [line.split()[0] for line in path.read_text().splitlines() if line.strip()], str(labels)
    outputs = getattr(model, "num_classes", None)
    if outputs is not None and len(classes) != outputs:
        raise DataError(
            f"{origin}: {len(classes)} classes, the model has {outputs}; give a class-map file that lists "
            "all of them in label order"
        )
    number = {name: i for i, name in enumerate(classes)}
    strange = [name for name in present if name not in number]
    if strange:
        raise DataError(f"{source}: folder {strange[0]!r} is not in {origin}")
    return number
