"""Code that writes its output's width where it could leave it open, rewritten so that it does.

Attention often ends in `x.reshape(B, N, C)`, with `C` the width of its *input*. On the dense network
`reshape(B, N, -1)` is the same; on a pruned one it is right where the first is wrong, because what comes in and what
goes out shrink apart. A rewritten module is of a subclass of its class, made from the source of the installed library
and from nothing else: plans hold the text of the call to look for, never code.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from tpvprune.errors import ModelError
from tpvprune.members import Opening

NAME = "reshaped_"  # of the tensor that a rewritten call reshapes
SHAPING = frozenset(("reshape", "view"))
TAKING = SHAPING | {"split", "chunk", "narrow", "unflatten", "expand", "repeat", "split_with_sizes", "tensor_split"}
PLAIN = (
    ast.Expression, ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.operator,
    ast.unaryop, ast.expr_context,
)  # fmt: skip


_CALLS: dict[tuple[type[Any], str, int], tuple[tuple[str, tuple[str, ...]], ...]] = {}
_NAMES: dict[tuple[type[Any], str, int], frozenset[str]] = {}
_MADE: dict[tuple[type[Any], tuple[Opening, ...]], type[Any]] = {}


class Unreadable(Exception):
    """Internal: a method that cannot be written anew."""


def method_of(kind: type[Any], code: CodeType) -> str | None:
    """Name of the method of a class that a code object belongs to; None if it is none, or one that is overridden."""
    found = undecorated(inspect.getattr_static(kind, code.co_name, None))
    return code.co_name if isinstance(found, FunctionType) and found.__code__ is code else None


def _own(base: type[Any], method: str) -> bool:
    """Whether a method is the code that its source shows; decorators may have given back what they were given."""
    found = inspect.getattr_static(base, method, None)
    return undecorated(found) is found


def undecorated(method: Any) -> Any:
    """What decorators that keep to `functools.wraps` were given; what is decorated by others, or by none, as it is."""
    return inspect.unwrap(method) if isinstance(method, FunctionType) else method


def base_of(kind: type[Any]) -> type[Any]:
    """The class that a rewritten class was made of; a class itself if it was not."""
    return getattr(kind, "_rewritten", (kind, ()))[0]


def owner_of(frame: FrameType) -> Any:
    """What the code that runs calls itself by its first argument; None if it has none."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def own_name(kind: type[Any], method: str) -> str:
    """What a method calls the module itself."""
    found = undecorated(inspect.getattr_static(base_of(kind), method))
    return str(found.__code__.co_varnames[0]) if isinstance(found, FunctionType) else "self"


def calls_at(kind: type[Any], method: str, line: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The calls of `reshape` and `view` in the statement at a line of a file: their text, and that of their sizes.

    Args:
        kind: class of a module.
        method: name of a method of it.
        line: in the file that holds it, from 1.
    """
    key = base_of(kind), method, line
    if key not in _CALLS:
        _CALLS[key] = tuple(_calls_at(*key))
    return _CALLS[key]


def names_at(kind: type[Any], method: str, line: int) -> frozenset[str]:
    """The attributes of itself by which a module shapes, cuts or looks something up in a statement; see `calls_at`.

    They may be in variables of the method that are set before.
    """
    key = base_of(kind), method, line
    if key not in _NAMES:
        statement = _statement(*key)
        told: list[ast.AST] = []
        for node in ast.walk(statement) if statement is not None else ():
            if isinstance(node, ast.Subscript):
                told.append(node.slice)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in TAKING:
                told += [*node.args, *(keyword.value for keyword in node.keywords)]
        if statement is not None:
            told += _set_before(key[0], method, statement, told)
        read = (node for part in told for node in ast.walk(part) if isinstance(node, ast.Attribute))
        own = own_name(kind, method)
        _NAMES[key] = frozenset(node.attr for node in read if getattr(node.value, "id", "") == own)
    return _NAMES[key]


def _set_before(base: type[Any], method: str, statement: ast.stmt, told: Iterable[ast.AST]) -> list[ast.expr]:
    """What variables that are read in parts of a statement, and those that they are made of, were set to last."""
    function, _ = _source(base, method)
    sets = [pair for node in ast.walk(function) if isinstance(node, ast.Assign) for pair in _pairs(node)]
    waiting = [(name, statement.lineno) for part in told for name in _variables(part)]
    found: list[ast.expr] = []
    for name, line in waiting:  # grows; each one is set on an earlier line than it is read
        before = [value for target, value in sets if target == name and value.lineno < line]
        if before:
            found.append(max(before, key=lambda value: value.lineno))
            waiting += [(other, found[-1].lineno) for other in _variables(found[-1])]
    return found


def _pairs(node: ast.Assign) -> Iterable[tuple[str, ast.expr]]:
    """Variables that an assignment sets, and what to, as far as it is written there."""
    for target in node.targets:
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for one, value in zip(target.elts, node.value.elts, strict=False):
                if isinstance(one, ast.Name):
                    yield one.id, value


def _variables(part: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}


def _calls_at(base: type[Any], method: str, line: int) -> Iterable[tuple[str, tuple[str, ...]]]:
    statement = _statement(base, method, line) if _own(base, method) else None
    calls = [] if statement is None else _calls(statement)
    return tuple((ast.unparse(call), tuple(ast.unparse(size) for size in _sizes(call))) for call in calls)


def _statement(base: type[Any], method: str, line: int) -> ast.stmt | None:
    """The innermost statement at a line; None if the source cannot be read."""
    try:
        function, _ = _source(base, method)
    except Unreadable:
        return None
    around = [
        node for node in ast.walk(function)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]  # fmt: skip
    return max(around, key=lambda node: node.lineno, default=None)


def value_of(size: str, frame: FrameType) -> int | None:
    """What a size written in code is while that code runs; None if more than reading names would be needed."""
    try:
        tree = ast.parse(size, mode="eval")
        if not all(isinstance(node, PLAIN) for node in ast.walk(tree)):
            return None
        value = eval(compile(tree, "<size>", "eval"), frame.f_globals, frame.f_locals)
    except Exception:  # a name that is not there yet, whatever an attribute raises
        return None
    return value if isinstance(value, int) else None


def opened(module: nn.Module, openings: Iterable[Opening]) -> None:
    """Let a module leave sizes open.

    Args:
        module: changed in place: its class becomes a subclass of it.
        openings: which sizes of which calls.

    Raises:
        ModelError: its class has no such call.
    """
    before: tuple[Any, tuple[Opening, ...]] = getattr(type(module), "_rewritten", (type(module), ()))
    base, done = before
    module.__class__ = _rewritten(base, tuple(dict.fromkeys((*done, *openings))))


class _Silent:
    """Stands before a class that is rewritten, so that it is told of no subclass."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _rewritten(base: type[Any], openings: tuple[Opening, ...]) -> type[Any]:
    key = base, openings
    if key not in _MADE:
        methods: dict[str, Any] = {
            method: _written(base, method, [o for o in openings if o.method == method])
            for method in dict.fromkeys(opening.method for opening in openings)
        }
        marks = {"_rewritten": key, "__reduce_ex__": _reduce, "__module__": base.__module__}
        _MADE[key] = type(base.__name__, (_Silent, base), {**methods, **marks})
        _MADE[key].__qualname__ = base.__qualname__
    return _MADE[key]


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """How a rewritten module is pickled and copied: by its class and what is open in it."""
    own = getattr(type(module), "__getstate__", None)  # which may leave something out
    kept = module.__dict__ if own is None else own(module)
    return _blank, type(module)._rewritten, kept  # type: ignore[attr-defined]


def _blank(base: type[Any], openings: tuple[Opening, ...]) -> nn.Module:
    made: nn.Module = object.__new__(_rewritten(base, openings))
    return made


def _written(base: type[Any], method: str, openings: Iterable[Opening]) -> FunctionType:
    """A method with sizes left open."""
    try:
        function, original = _source(base, method)
        if not _own(base, method):
            raise Unreadable("it is decorated")
    except Unreadable as error:
        raise ModelError(f"the source of {base.__name__}.{method} cannot be read ({error})") from None
    calls: dict[str, list[ast.Call]] = {}
    for call in _calls(function):  # before any is opened, which changes the text of those that it is part of
        calls.setdefault(ast.unparse(call), []).append(call)
    for opening in openings:
        if opening.call not in calls:
            raise ModelError(
                f"{base.__name__}.{method} has no call {opening.call!r} any more; trace the model again, or install "
                f"the version of {base.__module__.partition('.')[0]!r} that it was traced with"
            )
        for call in calls[opening.call]:
            _open(call, opening)
    owner = next(owner for owner in base.__mro__ if method in vars(owner))
    for node in ast.walk(function):  # names that are private to a class
        if isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__"):
            node.attr = f"_{owner.__name__.lstrip('_')}{node.attr}"
    # A method that calls super() looks for its class in the scope around it.
    around = ast.parse("def around(__class__):\n    return None").body[0]
    assert isinstance(around, ast.FunctionDef)
    around.body = [function, ast.parse(f"return {function.name}").body[0]]
    tree = ast.fix_missing_locations(ast.Module([around], []))
    made: dict[str, Any] = {}
    exec(compile(tree, original.__code__.co_filename, "exec"), original.__globals__, made)
    written: FunctionType = made["around"](owner)
    written.__defaults__, written.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    written.__qualname__, written.__doc__ = original.__qualname__, original.__doc__
    written.__module__ = original.__module__
    written.__dict__.update(original.__dict__)  # marks that decorators left
    return written


def _open(call: ast.Call, opening: Opening) -> None:
    sizes, target = _sizes(call), call.func
    sizes[opening.size] = ast.UnaryOp(ast.USub(), ast.Constant(1))
    if opening.given is not None and isinstance(target, ast.Attribute):
        place, axis = opening.given
        target.value = ast.NamedExpr(ast.Name(NAME, ast.Store()), target.value)
        shape = ast.Attribute(ast.Name(NAME, ast.Load()), "shape", ast.Load())
        sizes[place] = ast.Subscript(shape, ast.Constant(axis), ast.Load())


def _source(base: type[Any], method: str) -> tuple[ast.FunctionDef, FunctionType]:
    """The syntax tree of a method at the lines of its file, and the method; without annotations and the like."""
    original = undecorated(next((vars(owner)[method] for owner in base.__mro__ if method in vars(owner)), None))
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


def _calls(node: ast.AST) -> list[ast.Call]:
    return [
        call for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in SHAPING
        and not call.keywords and call.args
        and not (isinstance(call.func.value, ast.Name) and call.func.value.id == "torch")
    ]  # fmt: skip


def _sizes(call: ast.Call) -> list[ast.expr]:
    """The sizes of a call, a list that can be changed."""
    first = call.args[0]
    return first.elts if isinstance(first, ast.Tuple | ast.List) else call.args
