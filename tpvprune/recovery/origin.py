"""What a distillation began with, by which its folder knows it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from tpvprune.batches import Selector
from tpvprune.described import described
from tpvprune.digests import state_digest
from tpvprune.errors import CheckpointError
from tpvprune.held import plans_in
from tpvprune.plan import Plan, plan_of
from tpvprune.recovery.settings import Finetune

STATE_FORMAT = 6
OTHERS = {
    "format": "an older version of tpvprune",
    "settings": "other settings",
    "batches": "another number of batches",
    "held_out": "held-out batches where there are none now, or the reverse",
    "plan": "another plan",
    "start": "other weights to begin with",
    "frozen": "other frozen parameters",
    "teacher": "another teacher",
    "output": "another part of what the models return",
}


def origin(
    model: nn.Module,
    teacher: nn.Module,
    settings: Finetune,
    output: Selector,
    batches: int,
    held_out: bool,
    frozen: list[str],
) -> dict[str, Any]:
    """What the result follows from besides the images themselves, as a state holds it.

    Args:
        model: the one that is given to the distillation.
        teacher: the dense model.
        settings: of the distillation.
        output: which part of what the models return is distilled.
        batches: number of them in an epoch.
        held_out: whether it is judged on held-out batches.
        frozen: names of the parameters that stay as they are.
    """
    return {
        "format": STATE_FORMAT,
        "settings": repr(settings),
        "output": described(output),
        "batches": batches,
        "held_out": held_out,
        "frozen": frozen,
        **began_with(model, teacher),
    }


def began_with(model: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Fingerprints of a model's plan (and of those inside it), of all its entries and of the teacher's."""
    plan = plan_of(model)
    digest = hashlib.sha256(json.dumps(None if plan is None else _masks(plan), sort_keys=True).encode())
    inside = {name: _masks(found) for name, found in plans_in(model).items() if name}
    if inside:
        digest.update(json.dumps(inside, sort_keys=True).encode())
    return {
        "plan": digest.hexdigest(),
        "start": state_digest(model),
        "teacher": state_digest(teacher),
    }


def _masks(plan: Plan) -> dict[str, Any]:
    stored = plan.to_json()
    return {name: stored[name] for name in ("keep", "weights")}


def check_origin(had: Mapping[str, Any], has: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that began with something else.

    Raises:
        CheckpointError: it did; names what differs.
    """
    if had.get("format") != has["format"]:
        differs = [OTHERS["format"]]
    else:
        differs = [told for name, told in OTHERS.items() if had.get(name) != has[name]]
    if differs:
        raise CheckpointError(
            f"finetune: the folder holds a run of {' and '.join(differs)}; give another folder, delete it, or give "
            "what the run began with"
        )
