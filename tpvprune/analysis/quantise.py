"""Weights rounded to few levels, as a copy of the model in full precision ("fake quantisation")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from tpvprune.analysis.perturbations import parameters_of, step_of
from tpvprune.copies import copied
from tpvprune.errors import InputError
from tpvprune.kinds import as_verb
from tpvprune.scoring.perturb import Rounding

Per = Literal["tensor", "channel"]


@as_verb
@torch.no_grad()
def quantise(model: nn.Module, bits: int | Mapping[str, int], *, per: Per = "channel") -> nn.Module:
    """A copy whose weights lie on `2^bits` evenly spaced levels between their least and their largest.

    Args:
        model: the model; it is left as it was.
        bits: 1 to 16 for every weight of two dimensions or more, or by parameter name. Parameters that are not named
            stay as they are.
        per: one range a "tensor", or one a "channel": a slice along the first dimension, as `Rounding` has it.

    Raises:
        InputError: the bits are out of range, or name a parameter that the model lacks.
    """
    weights = parameters_of(model, None)
    wanted = {n: bits for n, w in weights.items() if w.ndim > 1} if isinstance(bits, int) else dict(bits)
    strange = next((name for name in wanted if name not in weights), None)
    if strange is not None:
        raise InputError(f"{type(model).__name__} has no parameter {strange!r} to be rounded")
    out = copied(model)
    for name, count in wanted.items():
        weight, rounding = weights[name], Rounding(count, per)
        step = step_of(rounding, name, weight)
        if rounding.per == "tensor" or weight.ndim < 2:
            least = weight.min()
        else:
            least = weight.flatten(1).amin(1).reshape(-1, *(1,) * (weight.ndim - 1))
        places = torch.where(step > 0, (weight - least) / step.clamp(min=torch.finfo(weight.dtype).tiny), 0)
        out.get_parameter(name).copy_(least + places.round() * step)
    return out
