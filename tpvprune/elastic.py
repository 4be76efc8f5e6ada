"""Code that writes its output's width where it could leave it open, rewritten so that it does.

Attention often ends in `x.reshape(B, N, C)`, with `C` the width of its *input*. On the dense network
`reshape(B, N, -1)` is the same; on a pruned one it is right where the first is wrong, because what comes in and what
goes out shrink apart. Likewise `q * (C // heads) ** -0.5` is to stay the number that it was. A rewritten module is of a
subclass of its class, made from the source of the installed library and from nothing else: plans hold the text of the
call to look for, never code. Functions that methods call are rewritten for that class alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from types import FrameType, FunctionType
from typing import Any

from torch import nn

from tpvprune.errors import ModelError
from tpvprune.members import Opening
from tpvprune.source import (
    Unreadable,
    base_of,
    called,
    functions,
    is_as_written,
    methods,
    own_name,
    source_of,
)

NAME = "reshaped_"  # of the tensor that a rewritten call reshapes
SHAPING = frozenset(("reshape", "view"))
TAKING = SHAPING | {"split", "chunk", "narrow", "unflatten", "expand", "repeat", "split_with_sizes", "tensor_split"}
PLAIN = (
    ast.Expression, ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.operator,
    ast.unaryop, ast.expr_context,
)  # fmt: skip
HARMLESS = frozenset(("math.sqrt", "float", "int", "max", "min", "len"))  # what may be called to know a number
Place = tuple[str, int]  # text of an operation, and which of its operands

_CALLS: dict[tuple[type[Any], str, int], tuple[tuple[str, tuple[str, ...]], ...]] = {}
_NAMES: dict[tuple[type[Any], str, int], frozenset[str]] = {}
_NUMBERS: dict[tuple[type[Any], str, int], tuple[tuple[Place, str], ...]] = {}
_MADE: dict[tuple[type[Any], tuple[Opening, ...]], type[Any]] = {}


def calls_at(kind: type[Any], method: str, line: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The calls of `reshape` and `view` in the statement at a line of a file: their text, and that of their sizes.

    Args:
        kind: class of a module.
        method: name of a method of it, or of a function that one calls, see `source.functions`.
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


def numbers_at(kind: type[Any], method: str, line: int, value: float, frame: FrameType) -> list[Place]:
    """The operands in a statement that are a number while its code runs, and are no number written out.

    Args:
        kind: class of a module; with `method` and `line` as for `calls_at`.
        method: see there.
        line: see there.
        value: the number.
        frame: in which the code runs.
    """
    key = base_of(kind), method, line
    if key not in _NUMBERS:
        statement = _statement(*key)
        nodes = [node for node in ast.walk(statement) if operands(node)] if statement is not None else []
        _NUMBERS[key] = tuple(
            ((ast.unparse(node), place), ast.unparse(operand))
            for node in nodes
            for place, operand in enumerate(operands(node))
            if _variables(operand)
        )
    return [place for place, text in _NUMBERS[key] if number_of(text, frame) == value]


def operands(node: ast.AST) -> list[ast.expr]:
    """What an operation is applied to: the sides of one between two, the arguments of a call."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.AugAssign):
        return [node.target, node.value]
    return node.args if isinstance(node, ast.Call) and ast.unparse(node.func) not in HARMLESS else []


def _set_before(base: type[Any], method: str, statement: ast.stmt, told: Iterable[ast.AST]) -> list[ast.expr]:
    """What variables that are read in parts of a statement, and those that they are made of, were set to last."""
    function, _ = source_of(base, method)
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
    statement = _statement(base, method, line) if is_as_written(base, method) else None
    calls = [] if statement is None else _calls(statement)
    return tuple((ast.unparse(call), tuple(ast.unparse(size) for size in _sizes(call))) for call in calls)


def _statement(base: type[Any], method: str, line: int) -> ast.stmt | None:
    """The innermost statement at a line; None if the source cannot be read."""
    try:
        function, _ = source_of(base, method)
    except Unreadable:
        return None
    around = [
        node for node in ast.walk(function)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]  # fmt: skip
    return max(around, key=lambda node: node.lineno, default=None)


def value_of(size: str, frame: FrameType) -> int | None:
    """What a size written in code is while that code runs; None if more than reading names would be needed."""
    value = number_of(size, frame)
    return value if isinstance(value, int) else None


def number_of(text: str, frame: FrameType) -> float | None:
    """What a number written in code is while that code runs; None if more than reading names would be needed."""
    try:
        tree = ast.parse(text, mode="eval")
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        known = all(ast.unparse(call.func) in HARMLESS and not call.keywords for call in calls)
        if not known or not all(isinstance(node, (*PLAIN, ast.Call)) for node in ast.walk(tree)):
            return None
        value = eval(compile(tree, "<size>", "eval"), frame.f_globals, frame.f_locals)
    except Exception:  # a name that is not there yet, whatever an attribute raises
        return None
    return value if isinstance(value, int | float) else None


def opened(module: nn.Module, openings: Iterable[Opening]) -> None:
    """Let a module leave sizes open, and keep numbers.

    Args:
        module: changed in place: its class becomes a subclass of it.
        openings: which sizes of which calls, and which numbers.

    Raises:
        ModelError: its class has no such call.
    """
    module.__class__ = _with(type(module), openings)


def can_open(kind: type[Any], openings: Iterable[Opening]) -> bool:
    """Whether the code of a class, and of all between it and the functions it calls, can be written anew for that."""
    try:
        _with(kind, openings)
    except ModelError:
        return False
    return True


def _with(kind: type[Any], openings: Iterable[Opening]) -> type[Any]:
    before: tuple[Any, tuple[Opening, ...]] = getattr(kind, "_rewritten", (kind, ()))
    base, done = before
    return _rewritten(base, tuple(dict.fromkeys((*done, *openings))))


class _Silent:
    """Stands before a class that is rewritten, so that it is told of no subclass."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _rewritten(base: type[Any], openings: tuple[Opening, ...]) -> type[Any]:
    key = base, openings
    if key not in _MADE:
        writer = _Writer(base, openings)
        written: dict[str, Any] = {name: writer.written(name) for name in sorted(writer.changed & set(methods(base)))}
        marks = {"_rewritten": key, "__reduce_ex__": _reduce, "__module__": base.__module__}
        _MADE[key] = type(base.__name__, (_Silent, base), {**written, **marks})
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


class _Writer:
    """Writes the functions of a class anew that openings are in, and those that call them.

    Attributes:
        changed: names of all of them.
    """

    def __init__(self, base: type[Any], openings: Iterable[Opening]) -> None:
        self.base, self.openings = base, tuple(openings)
        self.changed = {opening.method for opening in self.openings}
        self._made: dict[str, FunctionType] = {}
        self._begun: list[str] = []
        everything = {**functions(base), **methods(base)}
        before = -1
        while before != len(self.changed):
            before = len(self.changed)
            self.changed |= {name for name, function in everything.items() if self._calling(function)}

    def _calling(self, function: FunctionType) -> list[str]:
        """The functions, no methods, that are written anew and that a function calls."""
        known = functions(self.base)
        return [name for name, other in called(function) if name in self.changed and known.get(name) is other]

    def written(self, name: str) -> FunctionType:
        """A method or function, written anew.

        Raises:
            ModelError: its source cannot be read, or has no such call.
        """
        if name in self._made:
            return self._made[name]
        title = f"{self.base.__name__}.{name}" if name in methods(self.base) else name
        try:
            if name in self._begun:
                raise Unreadable("it calls itself")
            if not is_as_written(self.base, name):
                raise Unreadable("it is decorated")
            function, original = source_of(self.base, name)
        except Unreadable as error:
            raise ModelError(f"the source of {title} cannot be read ({error})") from None
        self._begun.append(name)
        self._edit(function, title, [opening for opening in self.openings if opening.method == name])
        owner = next((owner for owner in self.base.__mro__ if name in vars(owner)), None)
        for node in ast.walk(function) if owner is not None else ():  # names that are private to a class
            if isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__"):
                node.attr = f"_{owner.__name__.lstrip('_')}{node.attr}"  # type: ignore[union-attr]
        # A method that calls super() looks for its class in the scope around it; functions are to be found there too.
        inner = self._calling(original)
        around = ast.parse(f"def around({', '.join(['__class__', *inner])}):\n    return None").body[0]
        assert isinstance(around, ast.FunctionDef)
        around.body = [function, ast.parse(f"return {function.name}").body[0]]
        tree = ast.fix_missing_locations(ast.Module([around], []))
        made: dict[str, Any] = {}
        exec(compile(tree, original.__code__.co_filename, "exec"), original.__globals__, made)
        written: FunctionType = made["around"](owner, *map(self.written, inner))
        written.__defaults__, written.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
        written.__qualname__, written.__doc__ = original.__qualname__, original.__doc__
        written.__module__ = original.__module__
        written.__dict__.update(original.__dict__)  # marks that decorators left
        self._made[name] = written
        return written

    def _edit(self, function: ast.FunctionDef, title: str, openings: Iterable[Opening]) -> None:
        """Do in the syntax tree of a function what openings say."""
        found: dict[tuple[bool, str], list[ast.AST]] = {}
        for node in ast.walk(function):  # before any is opened, which changes the text of those that it is part of
            if operands(node):
                found.setdefault((True, ast.unparse(node)), []).append(node)
        for call in _calls(function):
            found.setdefault((False, ast.unparse(call)), []).append(call)
        # A number is put in last: what stands there may hold a call that is opened.
        for opening in sorted(openings, key=lambda opening: opening.number is not None):
            nodes = found.get((opening.number is not None, opening.call), [])
            if not nodes or any(opening.number is not None and len(operands(n)) <= opening.size for n in nodes):
                raise ModelError(
                    f"{title} has no call {opening.call!r} any more; trace the model again, or install the version of "
                    f"{self.base.__module__.partition('.')[0]!r} that it was traced with"
                )
            for node in nodes:
                if isinstance(node, ast.Call) and opening.number is None:
                    _open(node, opening)
                else:
                    _keep_number(node, opening)


def _keep_number(node: ast.AST, opening: Opening) -> None:
    number = ast.parse(repr(opening.number), mode="eval").body  # a minus is an operation
    if isinstance(node, ast.BinOp):
        setattr(node, ("left", "right")[opening.size], number)
    elif isinstance(node, ast.AugAssign):
        node.value = number
    elif isinstance(node, ast.Call):
        node.args[opening.size] = number


def _open(call: ast.Call, opening: Opening) -> None:
    sizes, target = _sizes(call), call.func
    sizes[opening.size] = ast.UnaryOp(ast.USub(), ast.Constant(1))
    if opening.given is not None and isinstance(target, ast.Attribute):
        place, axis = opening.given
        target.value = ast.NamedExpr(ast.Name(NAME, ast.Store()), target.value)
        shape = ast.Attribute(ast.Name(NAME, ast.Load()), "shape", ast.Load())
        sizes[place] = ast.Subscript(shape, ast.Constant(axis), ast.Load())


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
