"""PyTorch's own attention with any number of heads.

`nn.MultiheadAttention` insists that its heads are together as wide as what it attends to. `Heads` is the same without
that: with all heads it gives the same, and it has the same parameters, so that a cut model is saved and loaded like
any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_MORE = ("bias_k", "bias_v", "q_proj_weight", "static_k", "static_v")


class Heads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads' width is that of its weights; `freed` makes one."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`.

        Raises:
            RuntimeError: `is_causal`, which is a hint at what a mask says, without a mask; see `attend`.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint at what attn_mask says; give the mask")
        return attend(
            query,
            key,
            value,
            batch_first=self.batch_first,
            head_dim=self.head_dim,
            weight=self.in_proj_weight,
            bias=self.in_proj_bias,
            project=self.out_proj,
            dropout=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average=average_attn_weights,
        )

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = True
        super()._reset_parameters()
        self._qkv_same_embed_dim = False


class Encoder(nn.TransformerEncoder):
    """`nn.TransformerEncoder` that gives at padded positions what it gives there where it runs on nested tensors."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As `nn.TransformerEncoder`: in eval mode without gradients, zeros (after the norm) behind each sequence."""
        out: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)
        padded = None if src_key_padding_mask is None else src_key_padding_mask != 0
        if padded is None or self.training or src.ndim != 3 or mask is not None or torch.is_autocast_enabled():
            return out
        learns = torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters()))
        plain = not torch.backends.mha.get_fastpath_enabled() or has_torch_function((src,))
        plain = plain or torch.compiler.is_compiling()
        if learns or plain or bool((padded[:, 1:] < padded[:, :-1]).any()):
            return out
        nothing = torch.zeros_like(out)
        return torch.where(padded.unsqueeze(-1), nothing if self.norm is None else self.norm(nothing), out)


def freed(module: nn.Module) -> bool:
    """Make `Heads` of an `nn.MultiheadAttention`, in place; whether it could be made, or was one."""
    if isinstance(module, Heads):
        return True
    attention: Any = module
    if type(module) is not nn.MultiheadAttention or not attention._qkv_same_embed_dim:
        return False
    if attention.bias_k is not None or attention.add_zero_attn:
        return False
    attention.__class__ = Heads
    attention._qkv_same_embed_dim = False  # a layer around it may run one kernel for all, which takes all heads
    return True


def free(model: nn.Module) -> None:
    """Make `Heads` of all attention in a network where that can be done, in place."""
    for module in model.modules():
        freed(module)
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor = False  # which is for layers that run as one kernel
            if type(module) is nn.TransformerEncoder:
                module.__class__ = Encoder


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    batch_first: bool,
    head_dim: int,
    weight: Tensor,
    bias: Tensor | None,
    project: Callable[[Tensor], Tensor],
    dropout: float,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention between the projections of one weight.

    Args:
        query: `(targets, batch, channels)`, `(batch, targets, channels)` if `batch_first`, or `(targets, channels)`.
        key: likewise, of the sources.
        value: likewise.
        batch_first: whether the batch comes first.
        head_dim: channels of a head.
        weight: of the three projections, `(3 * heads * head_dim, channels)`.
        bias: `(3 * heads * head_dim,)`.
        project: the layer that reads all heads.
        dropout: share of the attention that is dropped.
        key_padding_mask: `(batch, sources)`, true or `-inf` where nothing is looked at.
        need_weights: whether the attention comes out too.
        attn_mask: `(targets, sources)` or `(batch * heads, targets, sources)`.
        average: whether that is the mean over heads.

    Returns:
        What comes out, laid out as `query`, and the attention `(batch, targets, sources)`, or of each head.

    Raises:
        RuntimeError: a mask holds neither booleans nor floating numbers, or batches differ.
    """
    if query.ndim != key.ndim or key.shape[:-1] != value.shape[:-1] or query.ndim not in (2, 3):
        raise RuntimeError(f"query, key, value have shapes {[tuple(x.shape) for x in (query, key, value)]}")
    single = query.ndim == 2

    def moved(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if single else x if batch_first else x.transpose(0, 1)

    if query is key and key is value:
        parts = F.linear(moved(query), weight, bias).chunk(3, -1)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        given = zip((query, key, value), weight.chunk(3), biases, strict=True)
        parts = tuple(F.linear(moved(x), w, b) for x, w, b in given)
    if parts[0].shape[0] != parts[1].shape[0]:
        raise RuntimeError(f"the batch of the query holds {parts[0].shape[0]}, that of the key {parts[1].shape[0]}")
    q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts)
    mask = None if attn_mask is None else _additive(attn_mask, q)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, q.shape[:2])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q).reshape(len(k), 1, 1, -1)
        mask = padding if mask is None else mask + padding
    found: Tensor | None = None
    if need_weights:
        found = (q * head_dim**-0.5) @ k.mT
        found = (found if mask is None else found + mask).softmax(-1)
        found = F.dropout(found, dropout) if dropout else found
        out = found @ v
        found = found.squeeze(0) if single else found
        found = found.mean(-3) if average else found  # last: whoever does more with it looks at all heads
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=head_dim**-0.5)
    out = project(out.transpose(1, 2).flatten(2))
    return out.squeeze(0) if single else out if batch_first else out.transpose(0, 1), found


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add: `-inf` where one of booleans says true."""
    if mask.is_floating_point():
        return mask.to(like.dtype)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"a mask holds {mask.dtype}; give booleans or floating numbers")
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def attended(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
    """`F.multi_head_attention_forward` in functions that a mode sees; None where `attend` does less than it."""
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    asked = given.arguments
    unlike = asked["in_proj_weight"] is None or asked["add_zero_attn"] or any(asked[name] is not None for name in _MORE)
    if unlike or (asked["is_causal"] and asked["attn_mask"] is None):  # the latter it refuses
        return None
    return attend(
        asked["query"],
        asked["key"],
        asked["value"],
        batch_first=False,
        head_dim=asked["embed_dim_to_check"] // asked["num_heads"],
        weight=asked["in_proj_weight"],
        bias=asked["in_proj_bias"],
        project=lambda x: F.linear(x, asked["out_proj_weight"], asked["out_proj_bias"]),
        dropout=asked["dropout_p"] if asked["training"] else 0.0,
        key_padding_mask=asked["key_padding_mask"],
        need_weights=asked["need_weights"],
        attn_mask=asked["attn_mask"],
        average=asked["average_attn_weights"],
    )
