"""Names people write in budgets: exact, glob, or `re:` regular expressions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from tpvprune.errors import BudgetError
from tpvprune.members import Group
from tpvprune.types import Graph


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name is meant by a pattern.

    Raises:
        BudgetError: the regular expression is broken.
    """
    if not pattern.startswith("re:"):
        return lambda name: name == pattern or fnmatchcase(name, pattern)
    try:
        regex = re.compile(pattern[3:])
    except re.error as error:
        raise BudgetError(f"pattern {pattern!r} is no regular expression: {error}") from error
    return lambda name: regex.fullmatch(name) is not None


def matching_groups(graph: Graph, pattern: str) -> list[Group]:
    """Groups in which the pattern names the group, a layer of it, or a block that holds such a layer.

    A layer's outputs and its inputs are both among its groups.

    Raises:
        BudgetError: the regular expression is broken, or nothing in the model has such a name.
    """
    hit = matcher(pattern)
    known = {name for g in graph.groups for name in _names(g)}
    known |= {block for name in [*graph.skipped, *_layers_of(graph)] for block in _with_parents(name)}
    if not any(hit(name) for name in known):
        near = difflib.get_close_matches(pattern, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; tpvprune trace lists the names"
        raise BudgetError(f"pattern {pattern!r} matches no layer of the model{hint}")
    return [group for group in graph.groups if any(hit(name) for name in _names(group))]


def _names(group: Group) -> set[str]:
    return {block for name in (group.id, *group.layers) for block in _with_parents(name)}


def _layers_of(graph: Graph) -> set[str]:
    return {name.rpartition(".")[0] for name in graph.parameters}


def _with_parents(name: str) -> Iterable[str]:
    """A layer's own name and those of the blocks around it: protecting a block protects what is in it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
