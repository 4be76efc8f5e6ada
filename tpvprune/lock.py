"""One process at a time in a run's folder.

The lock is the system's, on a file that also says whose it is: a process that ends, however it ends, lets go of it,
and what a killed one leaves behind is taken over.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tpvprune.errors import RecipeError

try:
    import fcntl
except ImportError:  # no POSIX system: folders are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_mine: set[Path] = set()  # the system's lock is one between processes


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if missing.

    Raises:
        RecipeError: another run holds it (names the process).
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / LOCK).resolve()
    if path in _mine:
        raise _taken(folder, f"this process ({os.getpid()})")
    handle = _locked(path, folder)
    _mine.add(path)
    try:
        with suppress(OSError):  # who it is only matters to the message
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, so that nobody else's is removed
        os.close(handle)
        _mine.remove(path)


def _locked(path: Path, folder: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        try:
            if fcntl is not None:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers that outlive us
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass  # whoever held it removed it in between
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = os.read(handle, 200).decode(errors="replace").strip()
                os.close(handle)
                raise _taken(folder, owner or "another process") from None
            return handle  # a file system without locks
        os.close(handle)


def _taken(folder: Path, owner: str) -> RecipeError:
    return RecipeError(f"a run is going on in {folder}: {owner}; wait for it to end, or choose another --out")
