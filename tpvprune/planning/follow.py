"""Follow channels through a running network, one operation at a time.

The network runs once, as it is, and every tensor operation below its modules is seen: whatever Python does above them,
there are few of them. Operations that move entries (views, slices, joins, rolls, partitions into windows) are run on
the slots themselves; the others are grouped by what they do with the axes of their inputs. One that is not known
is a barrier: what goes into it keeps its width, and what comes out is followed no further.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tpvprune.multihead import Heads
from tpvprune.planning import axes, moves, products
from tpvprune.planning.cost import RECURRENT, plain_kernels, tensors_of
from tpvprune.planning.follower import Follower, Rule
from tpvprune.planning.seen import Call, Limit, Policy

ONE_HEAD = "{!r} has a single head"
BY_HAND = "{!r} reads them with a weight that is no layer's"
WHOLE = "the units of recurrent layers stay"
OUTPUT_REASON = "its outputs are the model's outputs"
ELEMENTWISE = frozenset((
    "clone", "copy", "_to_copy", "to", "detach", "alias", "lift_fresh", "lift_fresh_copy", "where", "masked_fill",
    "dropout", "native_dropout", "feature_dropout", "contiguous", "as_strided", "lerp", "rsub", "nan_to_num",
    "_conj", "prelu", "_prelu_kernel", "rrelu_with_noise", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like", "zero", "fill", "bernoulli", "type_as", "hardswish", "hardsigmoid", "hardtanh",
    "relu6", "threshold", "log_sigmoid_forward",
))  # fmt: skip
MOVES = frozenset((
    "view", "_unsafe_view", "reshape", "_reshape_copy", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "expand", "slice", "select", "split", "split_with_sizes", "unbind", "flip", "roll", "repeat", "index",
    "index_select", "gather", "cat", "stack", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "im2col", "unfold", "diagonal", "movedim", "narrow", "chunk",
    "tile", "take_along_dim", "rot90", "view_copy", "repeat_interleave", "_reshape_alias",
))  # fmt: skip
REDUCTIONS = frozenset((
    "sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "any", "all",
    "argmax", "argmin", "logsumexp", "norm", "nansum", "linalg_vector_norm", "median", "mode", "count_nonzero",
))  # fmt: skip
ALONG = frozenset((
    "_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "topk", "argsort",
))  # fmt: skip
SPATIAL = (
    "max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "_upsample",
    "grid_sampler", "reflection_pad", "replication_pad",
)  # fmt: skip
MADE = frozenset((
    "empty", "zeros", "ones", "full", "arange", "eye", "linspace", "scalar_tensor", "rand", "randn", "new_empty",
    "new_zeros",
))  # fmt: skip
NAMED: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), products.matmul),
    "convolution": products.convolution,
    "native_layer_norm": axes.layer_norm,
    "_fused_rms_norm": axes.layer_norm,
    "native_group_norm": axes.group_norm,
    "glu": axes.glu,
    "embedding": axes.embedding,
    **dict.fromkeys(("roi_align", "roi_pool"), axes.regions),
    "index_put": axes.put,
    **dict.fromkeys(MOVES, moves.move),
    **dict.fromkeys(REDUCTIONS, axes.reduce),
    **dict.fromkeys(ALONG, axes.spread_along),
    **dict.fromkeys(ELEMENTWISE, axes.elementwise),
    **dict.fromkeys(MADE, lambda follower, call: None),
}


def rule_of(call: Call) -> Rule | None:
    """What an operation does with the axes of its inputs; None if it is not known."""
    if call.name in NAMED:
        return NAMED[call.name]
    if "batch_norm" in call.name:
        return axes.batch_norm
    if call.name.startswith(SPATIAL):
        return axes.spatial
    if torch.Tag.pointwise in call.func.tags:
        return axes.elementwise
    return None if call.out else lambda follower, call: None


class _Scaled(TorchFunctionMode):
    """Knows when attention runs that takes its scale from how many channels its queries have."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self.follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, having told the follower."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("scale") is not None:
            return func(*args, **kwargs)
        self.follower.scaled = True
        try:
            return func(*args, **kwargs)
        finally:
            self.follower.scaled = False


def follow(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    policy: Policy,
    told: Callable[[str], None] | None = None,
    limit: Limit | None = None,
) -> Follower:
    """Run a network once and follow its channels.

    Args:
        model: in eval mode, without gradients.
        args: of one forward pass.
        kwargs: likewise.
        policy: what is known not to work.
        told: called with the name of each module whose call ends.
        limit: to the time it may take.
    """
    follower = Follower(model, policy, rule_of, told, limit)
    for name, weight in model.named_parameters():
        layer, _, key = name.rpartition(".")
        owner = model.get_submodule(layer)
        if key == "in_proj_weight" and isinstance(owner, Heads):
            follower.units.pin(follower.units.of(name, 1, weight.shape[1], "consume"), BY_HAND.format(layer))
            if owner.num_heads == 1:
                follower.units.pin(follower.units.of(name, 0, weight.shape[0], "produce"), ONE_HEAD.format(layer))
        if isinstance(owner, RECURRENT):
            given = re.fullmatch(r"weight_ih(_l0(_reverse)?)?", key) is not None
            for dim in range(1 if given else weight.ndim):  # what it reads may be narrower
                follower.units.pin(follower.units.of(name, dim, weight.shape[dim], "produce"), WHOLE)
    modules = list(dict.fromkeys(model.modules()))
    handles = [m.register_forward_pre_hook(follower.enter, with_kwargs=True) for m in modules]
    handles += [m.register_forward_hook(follower.leave) for m in modules]
    try:
        with plain_kernels(model), _Scaled(follower), follower:
            out = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    follower.pin(tensors_of(out), OUTPUT_REASON)
    return follower
