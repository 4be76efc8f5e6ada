"""Where scores that are being made lie on disk: those of a state, and the shares of several processes."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from tpvprune.digests import weights_digest
from tpvprune.processes import of_all, process
from tpvprune.scores import Scores


def kept_scores(state: Path, model: nn.Module, what: str) -> Path:
    """Where scores are kept that a state on disk is made of next, beside it.

    Each model and number of processes has a file of its own: no other could go on with it.

    Args:
        state: what the scores are for.
        model: the model they are of.
        what: which scores of that state.
    """
    return state.with_name(f"{state.name}.{what}-{process()[1]}-{weights_digest(model)[:12]}.safetensors")


def share_of(save: Path) -> Path:
    """Where this process keeps the scores of its batches until all are done; alone, where all will be."""
    rank, world = process()
    return save if world == 1 else save.with_name(f"{save.stem}.{rank}-of-{world}{save.suffix}")


def finish(result: Scores, save: Path | None, exact: bool) -> None:
    """Save the scores of all processes, then remove the shares, of however many processes these were.

    Args:
        result: the same in each of them.
        save: the first one writes it; None for a process that keeps nothing, while others may.
        exact: see `Scores.save`.
    """
    rank, world = process()
    if rank == 0 and save is not None:
        result.save(save, exact=exact)
    of_all(None)  # no share goes before the result is there
    if save is None:
        return
    if world > 1:
        share_of(save).unlink(missing_ok=True)  # maybe on a disk that the first one does not see
    if rank == 0:
        named = re.compile(rf"{re.escape(save.stem)}\.\d+-of-\d+{re.escape(save.suffix)}")
        for path in list(save.parent.iterdir()):
            if named.fullmatch(path.name):
                path.unlink(missing_ok=True)
