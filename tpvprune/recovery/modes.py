"""Which parameters of a model are trained, and in which mode its modules are meanwhile."""

from __future__ import annotations

from torch import nn


def thaw(model: nn.Module) -> None:
    """Where all parameters are frozen, as of a model that is there for its answers alone, let all be trained."""
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters):
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())


def train_mode(model: nn.Module, norms: str) -> None:
    """Train mode, but for batch norms where `norms` is "freeze"."""
    model.train()
    if norms == "freeze":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
