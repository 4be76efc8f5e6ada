"""What scores are made of, and whether batches can be added to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from tpvprune.digests import weights_digest
from tpvprune.errors import PlanError
from tpvprune.processes import process
from tpvprune.scores import Scores
from tpvprune.scoring.settings import settings_of
from tpvprune.tally import Tally
from tpvprune.types import Graph

INSTEAD = "instead_of"  # in a manifest, the criterion that was asked for and left the model to another one
ANEW = "score anew, or to another file"


def made_of(criterion: Any, model: nn.Module, graph: Graph) -> dict[str, Any]:
    """What scores follow from besides the batches, as their manifest has it."""
    return {"weights": weights_digest(model), "graph": units_digest(graph), "settings": settings_of(criterion)}


def units_digest(graph: Graph) -> str:
    """A fingerprint of what each unit of a graph is, in their order."""
    found = hashlib.sha256()
    for group in graph.groups:
        found.update(f"{group.id!r}{group.kind}{group.units}".encode())
        for member in group.members:
            index = member.index
            found.update(f"{member.param!r}{member.dim}{member.role}{None if index is None else index.shape}".encode())
            if index is not None:
                found.update(index.cpu().contiguous().numpy().data)
    return found.hexdigest()


def check_start(start: Scores, criterion: Any, graph: Graph, request: Mapping[str, Any]) -> Tally:
    """The sums that batches can be added to.

    Args:
        start: earlier scores.
        criterion: what is asked for now.
        graph: of what.
        request: what the scores asked for are made of, from `made_of`. What the manifest of earlier scores does not
            tell, as those of earlier versions, is not compared.

    Raises:
        PlanError: the earlier scores are of something else, or hold no sums.
    """
    wanted = (criterion.label, criterion.seed, criterion.probes, graph.model_id)
    given = (start.manifest.get(INSTEAD, start.criterion), start.seed, start.probes, start.model_id)
    if wanted != given:
        raise PlanError(f"batches cannot be added: the scores are {given}, the request is {wanted}; {ANEW}")
    if start.manifest.get("weights", request["weights"]) != request["weights"]:
        raise PlanError(f"batches cannot be added: the scores are of a model with other weights; {ANEW}")
    _check_units(start, graph, request)
    had, has = start.manifest.get("settings", {}), request["settings"]
    changed = [f"{name}={had[name]!r}, not {has[name]!r}" for name in has if _differs(had, has, name)]
    if changed:
        raise PlanError(f"batches cannot be added: the scores were made with {'; '.join(changed)}; {ANEW}")
    if start.tally is None:
        raise PlanError(f"batches cannot be added to scores that hold no sums; {ANEW}")
    _check_rows(start, criterion, graph)
    return start.tally


def _differs(had: Mapping[str, Any], has: Mapping[str, Any], name: str) -> bool:
    return json.dumps(had.get(name, has[name])) != json.dumps(has[name])  # where not a number is like itself


def _check_units(start: Scores, graph: Graph, request: Mapping[str, Any]) -> None:
    has = {group.id: group.units for group in graph.groups}
    for name, value in start.values.items():  # not of every group, where a perturbation moves some alone
        if len(value) != has.get(name):
            held = f"scores of {len(value)} units of group {name!r}"
            raise PlanError(f"batches cannot be added: there are {held}, the graph has {has.get(name, 'none')}; {ANEW}")
    if start.manifest.get("graph", request["graph"]) != request["graph"]:
        raise PlanError(
            f"batches cannot be added: the scores are of other groups than the graph's, or other units of them; {ANEW}"
        )


def _check_rows(start: Scores, criterion: Any, graph: Graph) -> None:
    """Refuse scores that keep the effects of fewer samples than were seen and are asked for."""
    cap = -(-getattr(criterion, "cap", 0) // process()[1])
    held = 0 if start.sensitivities is None else start.sensitivities.samples
    if INSTEAD in start.manifest:  # by a criterion that keeps none
        return
    if held < min(cap, start.samples) and not any(group.kind == "weight" for group in graph.groups):
        raise PlanError(
            f"batches cannot be added: the scores keep the effects of {held} of {start.samples} samples, and "
            f"sensitivities={criterion.cap} asks for more; {ANEW}"
        )
