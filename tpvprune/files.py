"""Reading and writing files: a file is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Write a file through a temporary neighbour, so that a crash leaves the old one or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: str | PathLike[str], text: str) -> None:
    """`write_bytes` of UTF-8 text that ends in a newline."""
    write_bytes(path, (text.rstrip("\n") + "\n").encode())


def read_text(path: str | PathLike[str]) -> str:
    """Read UTF-8 text."""
    return Path(path).read_text(encoding="utf-8")
