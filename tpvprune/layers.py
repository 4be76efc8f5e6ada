"""Cutting a layer's tensors, and what it says of its own widths; used by surgery and by timing narrower layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


def replace(module: nn.Module, key: str, new: Tensor) -> None:
    """Put a copy of `new` in the place of a parameter or buffer of a module."""
    old = getattr(module, key)
    if isinstance(old, nn.Parameter):
        setattr(module, key, nn.Parameter(new.clone(), requires_grad=old.requires_grad))
    else:
        module._buffers[key] = new.clone()


def refresh(module: nn.Module) -> None:
    """Set a layer's width attributes from the shapes of its own parameters."""
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        elif module.groups == module.in_channels == module.out_channels and module.groups > 1:
            module.in_channels = module.out_channels = module.groups = first
        else:
            module.in_channels, module.out_channels = second * module.groups, first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, _NormBase):
        left = module.weight if module.weight is not None else module.running_mean
        if left is not None:
            module.num_features = left.shape[0]
    elif isinstance(getattr(module, "normalized_shape", None), tuple):  # layer norms, RMS norms
        norm: Any = module
        if norm.weight is not None and len(norm.normalized_shape) == 1:
            norm.normalized_shape = (norm.weight.shape[0],)
    elif isinstance(module, nn.GroupNorm):
        if module.weight is not None:
            module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif hasattr(module, "attn_dim") and isinstance(getattr(module, "qkv", None), nn.Linear):
        attention: Any = module
        attention.attn_dim = attention.qkv.weight.shape[0] // 3
        attention.num_heads = attention.attn_dim // attention.head_dim
