"""What a forward pass holds while it is suspended: watched, measured, and moved to a file and back.

A suspended pass keeps its tensors in the local variables of whatever code runs it, out of reach. Their storages are
within reach: a watch on torch functions sees each one made, and a storage can be emptied and filled again without
its tensors noticing.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

Result = tuple[int, int]  # the number of a call of a torch function, and which of the tensors that it gave


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))


class Watch(TorchFunctionMode):
    """Sees each call of a torch function made in its thread: their number, and the storages that they make.

    Attributes of tensors do not count as calls.

    Args:
        keep: what is to be kept in `kept`: the number of a call, and which of the tensors in its result.
        seen: called as `seen(number, function, args, kwargs, result)` after each call.
    """

    def __init__(
        self, keep: Collection[Result] = (), seen: Callable[[int, Any, Any, Any, Any], None] | None = None
    ) -> None:
        super().__init__()
        self.calls = 0
        self.kept: dict[Result, Tensor] = {}
        self._keep, self._seen = set(keep), seen
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and look at what came out."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.__name__ == "__get__":  # an attribute of a tensor, which our own hooks look at too
            return result
        number = self.calls
        self.calls += 1
        made = [t for t in tensors_in(result) if t.layout == torch.strided]
        if made:
            # A view's storage, and that of what is written to in place, may be anybody's: a weight's, another pass's.
            given = {t.untyped_storage()._cdata for t in tensors_in([args, kwargs]) if t.layout == torch.strided}
            for tensor in made:
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self._made[storage._cdata] = StorageWeakRef(storage)
        if self._keep:
            found = {(number, place): tensor for place, tensor in enumerate(tensors_in(result))}
            self.kept |= {key: tensor for key, tensor in found.items() if key in self._keep}
        if self._seen is not None:
            self._seen(number, func, args, kwargs, result)
        return result

    def storages(self) -> list[torch.UntypedStorage]:
        """What was made and is still in use."""
        self._made = {key: ref for key, ref in self._made.items() if not ref.expired()}
        alive = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._made.values()]
        return [storage for storage in alive if storage.resizable()]


class Spilled:
    """Storages that were emptied into a temporary file, until `back()` fills them again.

    Args:
        storages: of the CPU or of an accelerator.
    """

    def __init__(self, storages: list[torch.UntypedStorage]) -> None:
        self._places: list[tuple[torch.UntypedStorage, int]] = []
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115  # open until the pass goes on
        self.bytes = 0
        for storage in storages:
            self._write(_bytes_of(storage).cpu().clone().numpy().data)  # the view of what is resized would pin it
            self._places.append((storage, storage.nbytes()))
            self.bytes += storage.nbytes()
            storage.resize_(0)
        _trim()

    def _write(self, data: Any) -> None:
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error

    def back(self) -> None:
        """Fill the storages as they were; the file is gone afterwards."""
        self._file.seek(0)
        for storage, size in self._places:
            storage.resize_(size)
            read = torch.empty(size, dtype=torch.uint8)
            self._file.readinto(read.numpy().data)
            _bytes_of(storage).copy_(read)
        self.forget()

    def forget(self) -> None:
        """Close the file; what was in it is lost."""
        self._places = []
        self._file.close()


def _trim() -> None:
    """Hand freed memory back to the system, which glibc would keep for the thread that it was made in."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
