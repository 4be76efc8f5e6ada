"""What scoring does with residual blocks that are skipped as a whole.

Replacing a block's output by its input changes `u . f(x)` by `-sum of (output - input) * grad_output`, to first order:
the derivative along `alpha * block(x) + (1 - alpha) * x`. A block needs no more than that, and no weight gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tpvprune.errors import InputError
from tpvprune.members import Group
from tpvprune.types import Graph


def refuse_blocks(graph: Graph, what: str) -> None:
    """Refuse a graph with blocks where only units with weights of their own can be scored.

    Raises:
        InputError: the graph has a group of kind "block".
    """
    block = next((group.id for group in graph.groups if group.kind == "block"), None)
    if block is not None:
        raise InputError(
            f"{what} scores weights, and block {block!r} leaves as a whole; trace without depth=True, or score with "
            "TPV, Jacobian or Random"
        )


def left_over(graph: Graph, keep: Mapping[str, Tensor]) -> Graph:
    """The graph without what lies in skipped blocks: neither members nor groups; the blocks themselves stay.

    What a channel does through a layer that leaves with its block is no effect of the channel.
    """
    gone = graph.vanished(keep)
    if not gone:
        return graph
    groups = []
    for group in graph.groups:
        members = tuple(m for m in group.members if group.kind == "block" or m.param not in gone)
        if members:
            groups.append(Group(group.id, group.kind, group.units, members, group.exact_mask, group.signature))
    return Graph(tuple(groups), graph.shapes, graph.reuse, graph.model_id, graph.skipped)
