"""Check by running the network that the units of a group reach the entries they are said to reach.

Where channels are flattened, joined or cut on their way to a layer, the dependency graph takes them to lie
first; channels that lie last come out in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.types import Group


def is_rearranged(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether channels are flattened, joined or cut between the layers that write and those that read them."""
    written = min((m.width() for m in group.of_role("produce")), default=1)
    readers = group.of_role("consume")
    return any(m.width() > written or group.units * m.width() != shapes[m.param][m.axis] for m in readers)


@torch.no_grad()
def strays(model: nn.Module, group: Group, run: Callable[[], object]) -> str | None:
    """The first layer whose input changes at other entries than those of the units that were changed.

    Args:
        model: in eval mode; its weights are changed and put back.
        group: any group of channels.
        run: one forward pass of the model.
    """
    parameters = dict(model.named_parameters())
    readers = group.of_role("consume")
    saved = {m.param: parameters[m.param].clone() for m in group.of_role("produce", "consume")}
    layers = {m.layer: model.get_submodule(m.layer) for m in readers}
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            axis = 1 if isinstance(module, _ConvNd) else args[0].ndim - 1
            seen[name] = args[0].movedim(axis, 0).flatten(1).clone()

        return hook

    handles = [module.register_forward_pre_hook(look(name)) for name, module in layers.items()]
    # A norm that pools would spread the change over all channels.
    pooling = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
    handles += [m.register_forward_hook(lambda module, args, output: args[0]) for m in pooling]
    moved = torch.arange(group.units)[::2]
    try:
        for member in readers:  # nothing else may carry the change on
            parameters[member.param].zero_()
        run()
        before = dict(seen)
        for member in group.of_role("produce"):
            tensor, entries = parameters[member.param], member.entries(group.units)[moved].flatten()
            entries, axis = entries.to(tensor.device), member.axis
            tensor.index_add_(axis, entries, tensor.index_select(axis, entries) + 1)
        run()
    finally:
        for handle in handles:
            handle.remove()
        for name, value in saved.items():
            parameters[name].copy_(value)
    for member in readers:
        claimed = torch.zeros(len(seen[member.layer]), dtype=torch.bool)
        entries = member.entries(group.units)[moved].flatten()
        size = parameters[member.param].shape[member.axis]
        for start in range(0, len(claimed), size):  # the weight of a grouped convolution holds one group's channels
            claimed[start + entries] = True
        if bool(((seen[member.layer] != before[member.layer]).any(1).cpu() & ~claimed).any()):
            return member.layer
    return None
