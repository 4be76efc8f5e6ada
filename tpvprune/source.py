"""The code of a class: its methods, the functions that these call, and which of them runs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

_FUNCTIONS: dict[type[Any], dict[str, FunctionType]] = {}


class Unreadable(Exception):
    """Internal: a method that cannot be written anew."""


def method_of(kind: type[Any], code: CodeType) -> str | None:
    """Name of the method of a class that a code object belongs to; None if it is none, or one that is overridden."""
    found = undecorated(inspect.getattr_static(kind, code.co_name, None))
    return code.co_name if isinstance(found, FunctionType) and found.__code__ is code else None


def undecorated(method: Any) -> Any:
    """What decorators that keep to `functools.wraps` were given; what is decorated by others, or by none, as it is."""
    return inspect.unwrap(method) if isinstance(method, FunctionType) else method


def is_as_written(base: type[Any], method: str) -> bool:
    """Whether a method is the code that its source shows; decorators may have given back what they were given."""
    found = inspect.getattr_static(base, method, None)
    return undecorated(found) is found


def base_of(kind: type[Any]) -> type[Any]:
    """The class that a rewritten class was made of; a class itself if it was not."""
    return getattr(kind, "_rewritten", (kind, ()))[0]


def owner_of(frame: FrameType) -> Any:
    """What the code that runs calls itself by its first argument; None if it has none."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def own_name(kind: type[Any], method: str) -> str | None:
    """What a method calls the module itself; None of a function that is no method."""
    found = undecorated(inspect.getattr_static(base_of(kind), method, None))
    return str(found.__code__.co_varnames[0]) if isinstance(found, FunctionType) else None


def functions(kind: type[Any]) -> dict[str, FunctionType]:
    """The functions that methods of a class of modules call by their names, and those that these call; PyTorch's aside.

    Of two of one name the one that is met first; none has the name of a method.
    """
    if kind not in _FUNCTIONS:
        waiting = [method for method in methods(kind).values() if not _of_torch(method)]
        found: dict[str, FunctionType] = {}
        for function in waiting:  # grows
            for name, other in called(function):
                if name not in found and not _of_torch(other) and not hasattr(kind, name):
                    found[name] = other
                    waiting.append(other)
        _FUNCTIONS[kind] = found
    return _FUNCTIONS[kind]


def methods(kind: type[Any]) -> dict[str, FunctionType]:
    """The plain methods of a class and of its bases, by name."""
    found = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    return {name: method for name, method in found.items() if isinstance(method, FunctionType)}


def _of_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


def called(function: FunctionType) -> Iterable[tuple[str, FunctionType]]:
    """The functions that a function knows by its module's names or by those around it."""
    code = function.__code__
    around = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    for name in (*code.co_names, *code.co_freevars):
        try:
            other = around[name].cell_contents if name in around else function.__globals__.get(name)
        except ValueError:  # set later
            continue
        if isinstance(other, FunctionType) and other.__code__.co_name == name:
            yield name, other


def running(
    frame: FrameType | None, known: Callable[[nn.Module], bool]
) -> tuple[nn.Module, FrameType, tuple[str, FrameType] | None] | None:
    """The module of a model whose code runs, and where in it.

    Args:
        frame: the innermost one to look at.
        known: whether a module is one of the model's.

    Returns:
        The module of which a method runs, a helper of the one that was called perhaps, and its frame; then the name of
        that method, or of the function called by it that the innermost of such frames runs, and that frame; None if it
        is no plain method. None if no such module is found.
    """
    inner: list[FrameType] = []
    while frame is not None:
        owner, code = owner_of(frame), frame.f_code
        # A function that is given a module is none of its methods.
        own = code.co_varnames[:1] == ("self",) or method_of(type(owner), code) is not None
        if own and isinstance(owner, nn.Module) and known(owner):
            method = method_of(type(owner), code)
            return owner, frame, _innermost(type(owner), inner) or (None if method is None else (method, frame))
        inner.append(frame)
        frame = frame.f_back
    return None


def _innermost(kind: type[Any], frames: Iterable[FrameType]) -> tuple[str, FrameType] | None:
    """The first of some frames that runs a function which methods of a class call."""
    known = {function.__code__: name for name, function in functions(kind).items()}
    return next(((known[frame.f_code], frame) for frame in frames if frame.f_code in known), None)


def source_of(base: type[Any], name: str) -> tuple[ast.FunctionDef, FunctionType]:
    """The syntax tree of a method of a class, or of a function that methods call, and the function itself.

    The tree is at the lines of its file, without annotations, defaults and decorators.

    Raises:
        Unreadable: there is no such function, or no source of it that could be compiled again.
    """
    found = next((vars(owner)[name] for owner in base.__mro__ if name in vars(owner)), functions(base).get(name))
    original = undecorated(found)
    if not isinstance(original, FunctionType):
        raise Unreadable("it is no plain function")
    if set(original.__code__.co_freevars) - {"__class__"}:
        raise Unreadable("it reads variables of a function around it")
    try:
        lines, first = inspect.getsourcelines(original)
        function = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise Unreadable(str(error)) from None
    if not isinstance(function, ast.FunctionDef):
        raise Unreadable("it is no plain function")
    ast.increment_lineno(function, first - 1)
    function.decorator_list = []
    arguments = function.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    function.returns = None
    return function, original
