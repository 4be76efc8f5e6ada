"""Reading and writing files, which are there whole or not at all; files that come with the package."""

from __future__ import annotations

import os
import tempfile
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Traversable  # moved in Python 3.11, gone from here in 3.14

PART = ".part"  # ends the name of what is still being written


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Write a file through a temporary neighbour, so that a crash leaves the old one or the new one.

    Raises:
        OSError: names the file that was to be written, not the neighbour.
    """
    target = Path(path)
    name = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=PART)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(target)
    except BaseException as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        raise


def write_text(path: str | PathLike[str], text: str) -> None:
    """`write_bytes` of UTF-8 text that ends in a newline."""
    write_bytes(path, (text.rstrip("\n") + "\n").encode())


def read_text(path: str | PathLike[str]) -> str:
    """Read UTF-8 text."""
    return Path(path).read_text(encoding="utf-8")


def sweep(folder: str | PathLike[str]) -> None:
    """Remove what writes that were killed have left in a folder and those in it."""
    for left in Path(folder).rglob(f".*{PART}"):
        left.unlink(missing_ok=True)


def packaged(name: str) -> Traversable:
    """A folder of data that comes with the package: within it once installed, beside it in a source tree.

    Raises:
        ModuleNotFoundError: it is in neither place.
    """
    try:
        return resources.files(f"tpvprune.{name}")
    except ModuleNotFoundError:  # `python -m` in a source tree takes that for the package
        beside = Path(__file__).parents[1].joinpath(*name.split("."))
        if beside.is_dir():
            return beside
        raise
