"""How far a model's answers are from those that it is taught."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.batches import is_classifier
from tpvprune.errors import InputError
from tpvprune.patches import channel_axis
from tpvprune.plan import Plan, plan_of
from tpvprune.recovery.fits import kept_outputs


def output_distance(output: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL from the teacher at a temperature, times its square; squared distance where outputs are no logits.

    Args:
        output: `(batch, ...)`, of the student.
        wanted: shaped as it is, of the teacher.
        temperature: both logits are divided by it.
    """
    if not is_classifier(output):
        return F.mse_loss(output.float(), wanted.float())
    softened = F.log_softmax(output.float() / temperature, dim=1)
    target = F.log_softmax(wanted.float() / temperature, dim=1)
    return F.kl_div(softened, target, reduction="batchmean", log_target=True) * temperature**2


def distillation_loss(
    output: Tensor, wanted: Tensor, temperature: float, labels: Tensor | None, label_weight: float
) -> Tensor:
    """The distance to the teacher, with cross-entropy's share where there are labels.

    Args:
        output: `(batch, ...)`, of the student.
        wanted: shaped as it is, of the teacher.
        temperature: of the distance.
        labels: `(batch,)`, or shares `(batch, classes)`; None for the distance alone.
        label_weight: share of cross-entropy.
    """
    distance = output_distance(output, wanted, temperature)
    if labels is None:
        return distance
    return (1 - label_weight) * distance + label_weight * F.cross_entropy(output.float(), labels)


class Features:
    """Outputs of named modules in student and teacher, held side by side.

    Args:
        student: from `apply`; which of a layer's channels it has left is read from its plan.
        teacher: the dense model.
        names: of modules of both.

    Raises:
        InputError: a name is of no module.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> None:
        self._names = tuple(names)
        modules = [dict(model.named_modules()) for model in (student, teacher)]
        for name in names:
            if not name or any(name not in known for known in modules):
                raise InputError(f"finetune: features={name!r} is no module of both models; see named_modules()")
        self._modules = [[known[name] for name in names] for known in modules]
        plan = plan_of(student)
        self._rows: dict[str, tuple[Tensor, int]] = {}  # the channels that are left, and how many there were
        for name, mine, wanted in zip(names, *self._modules, strict=True):
            if plan is not None and f"{name}.weight" in plan.graph.shapes:
                whole = kept_outputs(Plan({}, plan.graph), wanted, name)
                self._rows[name] = kept_outputs(plan, mine, name), len(whole)

    @contextmanager
    def watched(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """What the modules give, `(student's, teacher's)`, filled by each forward pass."""
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        handles = [
            module.register_forward_hook(_keep(held, name))
            for modules, held in zip(self._modules, found, strict=True)
            for name, module in zip(self._names, modules, strict=True)
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def distance(self, found: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
        """Squared distance as a share of the teacher's mean square, in the mean over modules.

        Raises:
            InputError: outputs are no tensors, or have different shapes, and nothing says which channels are left.
        """
        parts = []
        for name, module in zip(self._names, self._modules[0], strict=True):
            if not isinstance(found[0][name], Tensor):
                kind = type(found[0][name]).__name__
                raise InputError(f"finetune: features={name!r} gives a {kind}; name a module that gives one tensor")
            mine, wanted = (held[name].float() for held in found)
            if name in self._rows and mine.shape != wanted.shape:
                rows, whole = self._rows[name]
                dim = _axis(module, mine.shape, wanted.shape, len(rows), whole)
                wanted = wanted if dim is None else wanted.index_select(dim, rows.to(wanted.device))
            if mine.shape != wanted.shape:
                raise InputError(
                    f"finetune: features={name!r} gives {tuple(mine.shape)} in the pruned model and "
                    f"{tuple(wanted.shape)} in the dense one; name a layer or norm, whose channels are known"
                )
            parts.append((mine - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12))
        return torch.stack(parts).mean()


def _axis(module: nn.Module, mine: Sequence[int], wanted: Sequence[int], left: int, whole: int) -> int | None:
    """The axis along which `left` of `whole` channels lie in what a layer gives: its own, or the only one it can be."""
    can_be = [dim for dim, lengths in enumerate(zip(mine, wanted, strict=False)) if dim and lengths == (left, whole)]
    own = channel_axis(module) % len(wanted)
    if own in can_be:
        return own
    return can_be[0] if len(can_be) == 1 else None


def _keep(held: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        held[name] = output

    return hook
