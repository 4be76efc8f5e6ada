"""What a criterion was set to, written down so that another process, or a later run, knows it again.

What is written depends on values alone, never on where they lie in memory. A function is known by its name, its code,
and the values that it closes over or has as defaults; other functions and global variables that it uses are not looked
at. An object is known by its class and its attributes, a tensor by all of its entries, a module by its weights (see
`weights_digest`), one without any by how it prints.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.scoring.engine import weights_digest
from tpvprune.scoring.heads import HEADS
from tpvprune.scoring.perturb import PERTURBATIONS

READABLE = 120  # characters of a setting that is written out; of a longer one there is a digest
_PLAIN = (bool, int, float, str)


def settings_of(criterion: Any) -> dict[str, Any]:
    """The settings of a criterion, and of what it is made of, as JSON writes them, by dotted names."""
    found = dict[str, Any]()
    for name, value in _attributes(criterion).items():
        if name not in ("engine", "sensitivities"):  # its words name an engine that matters, rows are looked at apart
            found |= _written(name, value)
    return found


def _written(name: str, value: Any) -> dict[str, Any]:
    if not is_dataclass(value) or isinstance(value, (type, nn.Module)) or _word(value):
        return {name: _short(_described(value, ()))}
    found: dict[str, Any] = {name: _place(type(value))}
    for part, inner in _attributes(value).items():
        found |= _written(f"{name}.{part}", inner)
    return found


def _attributes(value: Any) -> dict[str, Any]:
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(vars(value)) if hasattr(value, "__dict__") else {}


def _word(value: Any) -> str:
    """The name that makes a head or perturbation what it is, if there is one."""
    return next((word for word, kind in (HEADS | PERTURBATIONS).items() if type(value) is kind and value == kind()), "")


def _short(told: Any) -> Any:
    text = json.dumps(told)
    if isinstance(told, _PLAIN) or len(text) <= READABLE:
        return told
    first = f"{told[0]} " if isinstance(told, list) and isinstance(told[0], str) else ""
    return first + _hashed(text.encode())


def _described(value: Any, around: tuple[int, ...]) -> Any:
    """A value in terms that JSON gives back as they were.

    Args:
        value: anything.
        around: identities of the values that this one is a part of.
    """
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, (type, types.ModuleType, torch.dtype, torch.device)):
        return _place(value)
    if id(value) in around:
        return "itself"

    def each(*parts: Any) -> list[Any]:
        return [_described(part, (*around, id(value))) for part in parts]

    if isinstance(value, nn.Module):
        return weights_digest(value) if [*value.parameters(), *value.buffers()] else repr(value)
    if isinstance(value, Tensor):
        return ["tensor", str(value.dtype), list(value.shape), _hashed(_bytes(value))]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", _hashed(bytes(value))]
    if isinstance(value, Mapping):  # in its order, which may matter
        return [each(*pair) for pair in value.items()]
    if isinstance(value, (list, tuple)):
        return each(*value)
    if isinstance(value, (set, frozenset)):
        return sorted(each(*value), key=json.dumps)
    if isinstance(value, types.CodeType):
        return [value.co_name, _hashed(value.co_code), each(*value.co_names), each(*value.co_consts)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        made = each(value.__code__, cells, value.__defaults__, value.__kwdefaults__)
        return f"{_place(value)} {_hashed(json.dumps(made).encode())}"
    if isinstance(value, types.MethodType):
        return [_place(value), *each(value.__func__, value.__self__)]
    if isinstance(value, types.BuiltinFunctionType):
        return [_place(value), *each(value.__self__)]
    if is_dataclass(value):
        return _word(value) or [_place(type(value)), *each(_attributes(value))]
    try:
        parts = value.__reduce_ex__(2)  # what pickle would write of it: its attributes, where it does not say otherwise
    except Exception:  # of what cannot be pickled, and says so in its own way
        parts = _attributes(value)
    return [_place(type(value)), *each(parts)]


def _place(value: Any) -> str:
    """Where a class or function is defined, `module.name`; of other things how they print."""
    name = getattr(value, "__qualname__", None)
    if isinstance(value, types.ModuleType):
        return value.__name__
    return f"{getattr(value, '__module__', None) or 'builtins'}.{name}" if name else str(value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (asking is what raises)
    except ValueError:
        return False
    return True


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
