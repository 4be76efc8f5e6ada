"""What all verbs share: arguments of another kind are refused before anything runs, and autograd is on inside."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from tpvprune.errors import DataError, InputError
from tpvprune.types import Graph

P = ParamSpec("P")
R = TypeVar("R")

_GOT = {  # how one comes by what a verb takes, by the name of its class
    "Module": "the network itself, as timm.create_model() makes one",
    "Graph": "which tp.trace(model, example) gives",
    "Scores": "which tp.score(model, batches, graph) gives",
    "Plan": "which tp.allocate(scores, graph, budget) gives",
    "Budget": "such as tp.Budget(macs=0.5)",
    "LatencyTable": "which tp.latency_table(model, graph, example) gives",
}
_NO_BATCHES = (Tensor, nn.Module, Graph, str, bytes, os.PathLike)  # though most of these can be gone through


def as_verb(verb: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments that are none of the classes in a verb's annotations, and what is one where several are taken.

    Verbs run with gradients, and outside of inference mode, whatever the caller has switched off for its own passes.
    What is compiled runs as it was written: compiled code calls no hooks that came after it.

    Looked at are parameters annotated with a module or with classes of this package, iterables of batches, and
    sequences of names or numbers (a string would be gone through letter by letter). What else they are, the verb
    itself checks.

    Raises:
        InputError: by the verb. It names the parameter, what it takes, how one comes by that, and what was given.
        DataError: likewise, where batches are asked for.
    """
    signature = inspect.signature(verb)

    @cache
    def kinds() -> dict[str, tuple[type, ...]]:
        hints = get_type_hints(verb)
        return {name: found for name in signature.parameters if (found := _classes(hints.get(name)))}

    @wraps(verb)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # which the call itself tells with the verb's name
            return verb(*args, **kwargs)
        for name, kind in kinds().items():
            if name in given:
                _check(verb.__name__, name, given[name], kind)
        with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            return verb(*args, **kwargs)

    return checked


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes that an annotation asks for; none where it asks for something else too."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    wanted = tuple(map(_class, alternatives))
    told = [one in (Iterable, Sequence) or _noun(one) for one in wanted if one is not NoneType]
    return wanted if told and all(told) else ()


def _class(hint: Any) -> Any:
    """The class of an annotation: `Iterable` of batches, which may be anything, `Sequence` of several of all else."""
    found = get_origin(hint) or hint
    return Sequence if found is Iterable and get_args(hint) != (Any,) else found


def _noun(kind: Any) -> bool:
    """Whether this is the class of a module, or one of this package that is no protocol."""
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return False
    return kind is nn.Module or kind.__module__.partition(".")[0] == "tpvprune"


def _check(verb: str, name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if value is None and NoneType in kinds:
        return
    was = f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
    was = f"what was given is {'None' if value is None else was}"
    if Iterable in kinds:
        if isinstance(value, _NO_BATCHES) or not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
            one = f": for a single one, {name}=[batch]" if isinstance(value, Tensor) else ", as a DataLoader gives them"
            raise DataError(f"{verb}: {name} takes tensors batch by batch{one}; {was}")
    elif Sequence in kinds:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            if isinstance(value, (str, int, float)):
                one = "string" if isinstance(value, str) else "number"
                raise InputError(f"{verb}: {name}={value!r} is one {one}; give a list, {name}=[{value!r}]")
            raise InputError(f"{verb}: {name} takes a list; {was}")
    elif not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
        raise InputError(f"{verb}: {name} takes a {wanted}, {_GOT.get(wanted, f'such as {wanted}()')}; {was}")
