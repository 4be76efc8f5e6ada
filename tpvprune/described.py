"""Values written down so that another process, or a later run, knows them again.

What is written depends on values alone, never on where they lie in memory. A function is known by its name, its code,
and the values that it closes over or has as defaults; other functions and global variables that it uses are not looked
at. An object is known by its class and its attributes, a tensor by all of its entries, a module by its weights (see
`weights_digest`), one without any by how it prints.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.digests import raw_bytes, weights_digest

DEEPEST, MOST = 50, 10_000  # of what lies deeper in a value, or after so many, the class alone is told
READABLE = 120  # characters of a setting that is written out; of a longer one there is a digest
_PLAIN = (bool, int, float, str)


def described(value: Any, word: Callable[[Any], str] = lambda value: "") -> Any:
    """A value as JSON writes it and gives it back; a digest in its place where that is long.

    Args:
        value: anything.
        word: the name of an object that is known by one, or "".
    """
    told = _Described(word)(value)
    text = json.dumps(told)
    if isinstance(told, _PLAIN) or len(text) <= READABLE:
        return told
    first = f"{told[0]} " if isinstance(told, list) and isinstance(told[0], str) else ""
    return first + _hashed(text.encode())


def attributes(value: Any) -> dict[str, Any]:
    """What an object is made of, by name."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def place(value: Any) -> str:
    """Where a class or function is defined, `module.name`; of other things how they print."""
    name = getattr(value, "__qualname__", None)
    if isinstance(value, types.ModuleType):
        return value.__name__
    return f"{getattr(value, '__module__', None) or 'builtins'}.{name}" if name else str(value)


class _Described:
    """Values in terms that JSON gives back as they were; what was met before is known by its number."""

    def __init__(self, word: Callable[[Any], str]) -> None:
        self._word = word
        self._met: dict[int, tuple[int, Any]] = {}  # held, so that no other takes the place in memory
        self._depth = 0

    def __call__(self, value: Any) -> Any:
        """A value, and what it is made of."""
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, (type, types.ModuleType, torch.dtype, torch.device)):
            return place(value)
        if id(value) in self._met:
            return ["met", self._met[id(value)][0]]
        self._met[id(value)] = len(self._met), value
        if self._depth > DEEPEST or len(self._met) > MOST:
            return place(type(value))
        self._depth += 1
        try:
            return self._made_of(value)
        finally:
            self._depth -= 1

    def _each(self, *parts: Any) -> list[Any]:
        return [self(part) for part in parts]

    def _alone(self, part: Any) -> Any:
        one = _Described(self._word)
        one._met, one._depth = dict(self._met), self._depth
        return one(part)

    def _made_of(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return weights_digest(value) if [*value.parameters(), *value.buffers()] else repr(value)
        if isinstance(value, Tensor):
            return ["tensor", str(value.dtype), list(value.shape), _hashed(raw_bytes(value))]
        if isinstance(value, (bytes, bytearray)):
            return ["bytes", _hashed(bytes(value))]
        if isinstance(value, Mapping):  # in its order, which may matter
            return [self._each(*pair) for pair in value.items()]
        if isinstance(value, (list, tuple)):
            return self._each(*value)
        if isinstance(value, (set, frozenset)):  # each by itself: their order is not known before they are described
            return sorted((self._alone(part) for part in value), key=json.dumps)
        if isinstance(value, types.CodeType):
            return [value.co_name, _hashed(value.co_code), self._each(*value.co_names), self._each(*value.co_consts)]
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            made = self._each(value.__code__, cells, value.__defaults__, value.__kwdefaults__)
            return f"{place(value)} {_hashed(json.dumps(made).encode())}"
        if isinstance(value, types.MethodType):
            return [place(value), *self._each(value.__func__, value.__self__)]
        if isinstance(value, types.BuiltinFunctionType):
            return [place(value), *self._each(value.__self__)]
        if is_dataclass(value):
            return self._word(value) or [place(type(value)), *self._each(attributes(value))]
        try:
            parts = value.__reduce_ex__(2)  # what pickle would write of it: its attributes, or what it says otherwise
        except Exception:  # of what cannot be pickled, and says so in its own way
            parts = attributes(value)
        return [place(type(value)), *self._each(parts)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (asking is what raises)
    except ValueError:
        return False
    return True


def _hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
