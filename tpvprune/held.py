"""The plans of a model and of the modules in it, and the weights that they hold at zero."""

from __future__ import annotations

from torch import Tensor, nn

from tpvprune.errors import PlanError
from tpvprune.plan import Plan, plan_of


def plans_in(model: nn.Module) -> dict[str, Plan]:
    """The plans of a model and of the modules in it, by name: compiled, parallel and averaged models wrap one."""
    return {name: plan for name, module in model.named_modules() if (plan := plan_of(module)) is not None}


def held_by(model: nn.Module, name: str, plan: Plan) -> list[tuple[Tensor, Tensor]]:
    """Parameters of a module in a model, each with a bool mask of what the module's plan holds at zero.

    Raises:
        PlanError: the weights of the plan are not there any more, or have another shape.
    """
    found = list[tuple[Tensor, Tensor]]()
    parameters = dict(model.get_submodule(name).named_parameters(remove_duplicate=False))
    for key, mask in plan.weight_masks().items():
        parameter = parameters.get(key)
        if parameter is None or parameter.shape != mask.shape:
            has = "none" if parameter is None else f"{tuple(parameter.shape)}"
            raise PlanError(
                f"the plan of {name or 'the model'!r} masks {key!r} of shape {tuple(mask.shape)}, and the model has "
                f"{has}; wrap it in what keeps its parameters, and cut it by apply(), which cuts masks too"
            )
        found.append((parameter, ~mask.to(parameter.device)))
    return found


def held_in(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every parameter of a model that a plan masks, with what all plans together hold at zero of it.

    Raises:
        PlanError: see `held_by`.
    """
    found = dict[int, tuple[Tensor, Tensor]]()
    for name, plan in plans_in(model).items():
        for parameter, zero in held_by(model, name, plan):
            before = found.get(id(parameter))
            found[id(parameter)] = parameter, zero if before is None else zero | before[1]
    return list(found.values())
