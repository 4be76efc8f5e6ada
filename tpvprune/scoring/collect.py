"""One loop for every criterion that learns from batches: count, save on the way, stop when settled."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Progress, buffers_kept
from tpvprune.calls import on_one_tensor
from tpvprune.errors import InputError, UnseenError
from tpvprune.processes import of_all, process
from tpvprune.scores import Scores, Sensitivities, Settled
from tpvprune.scoring.engine import Watched, digest_of_all, gathered_rows, global_number, reduced
from tpvprune.scoring.resume import INSTEAD, check_start, made_of
from tpvprune.scoring.shares import finish, share_of
from tpvprune.scoring.streaming import GivingWay, Joining, Later, Observation, Streaming
from tpvprune.tally import Tally
from tpvprune.types import Graph
from tpvprune.version import __version__

logger = logging.getLogger(__name__)
SAVE_EVERY = 30.0  # seconds between two states of a scoring on disk


@dataclass
class _Rows:
    """The sensitivities so far."""

    parts: list[Tensor]
    linear: Tensor | None
    samples: int
    counted: int

    @classmethod
    def of(cls, scores: Scores | None) -> _Rows:
        held = None if scores is None else scores.sensitivities
        if held is None or scores is None:
            return cls([], None, 0, 0)
        total = held.linear * scores.samples if held.total is None else held.total
        return cls([held.rows], total, held.samples, scores.samples)

    def add(self, seen: Observation) -> None:
        if seen.rows is not None and seen.samples:
            self.parts.append(seen.rows)
            self.samples += seen.samples
        if seen.linear is not None:
            self.linear = seen.linear if self.linear is None else self.linear + seen.linear
        self.counted += seen.tally.total

    def result(self, graph: Graph, cap: int) -> Sensitivities | None:
        if not self.parts or not cap:
            return None
        rows = torch.cat(self.parts)
        samples = min(self.samples, cap)
        rows = rows[: len(rows) // self.samples * samples]
        groups = tuple((group.id, group.units) for group in graph.groups)
        total = torch.zeros(graph.units, dtype=torch.float64) if self.linear is None else self.linear
        return Sensitivities(groups, rows, total / self.counted, samples, total)


def collect(
    criterion: Streaming,
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    *,
    progress: Progress | None = None,
    start: Scores | None = None,
    until: Settled | None = None,
    save: str | PathLike[str] | None = None,
    exact: bool = False,
) -> Scores:
    """Score from batches; see `score` for the arguments.

    Raises:
        PlanError: `start` is of another criterion, model or seed.
        DataError: `save` holds scores of other batches.
        ModelError: the model is not called on one tensor, or was made inside `torch.inference_mode()`.
        InputError: `until` or `start` under several processes; `until` with a criterion without standard errors.
    """
    with on_one_tensor(model), buffers_kept(model):
        return _collect(criterion, model, batches, graph, progress, start, until, save, exact)


def _collect(
    criterion: Streaming,
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    progress: Progress | None,
    start: Scores | None,
    until: Settled | None,
    save: str | PathLike[str] | None,
    exact: bool,
) -> Scores:
    world = process()[1]
    if world > 1 and until is not None:
        raise InputError("until= looks at the scores after every batch, which several processes cannot; leave it out")
    if world > 1 and start is not None:
        raise InputError("start= is for one process: several would each add to it; score anew, or in one process")
    if save is not None and start is not None:
        raise InputError("give start= or save=, not both: a file that exists is gone on with")
    request = made_of(criterion, model, graph)
    own = None if save is None else share_of(Path(save))
    start, tally, watched = _begun(own, start, criterion, batches, graph, request)
    asked = criterion.label
    criterion = _fitting(criterion, model, watched, graph, start)
    skip, rows, fresh = watched.skip, _Rows.of(start), 0
    cap = getattr(criterion, "cap", 0)
    later: Later | None = None
    saved, took, has_errors = time.monotonic(), 0.0, False

    def state(done: int, whole: bool = True) -> Scores:
        held = rows.result(graph, -(-cap // world))
        about = _manifest(watched, done, tally, world) | request
        about |= {} if criterion.label == asked else {INSTEAD: asked}
        if start is not None and not fresh and world == 1:  # nothing new was seen, nor what `later` is made of
            return replace(start, sensitivities=held, manifest=about)
        return _scores(criterion, model, graph, tally, held, about, later if whole else None)

    def keep(after: float) -> None:
        nonlocal saved, took
        began = time.monotonic()
        if own is not None and fresh and tally.total and began - saved > after:
            state(skip + fresh, world == 1).save(own, exact=True)  # what `later` says, several find at the end
            saved = time.monotonic()
            took = saved - began  # scores that depend on each other take long to make, those of many weights to write

    def settled(done: int) -> bool:
        nonlocal has_errors
        if until is None or (tally.total < until.least and (has_errors or tally.rows < 2)):
            return False
        found = state(done)
        has_errors = found.stderr is not None
        if not has_errors and tally.rows > 1:
            raise InputError(
                f"{criterion.label} has no standard errors, by which until= would know when to stop; leave it out"
            )
        return until.reached(found)

    def observed() -> Iterator[Observation]:
        nonlocal criterion
        batch = watched.peek()
        try:
            yield from criterion.observe(model, watched, graph, tally.batches, progress)
        except UnseenError as error:
            # Several processes have decided before, all alike.
            other = criterion.instead() if isinstance(criterion, GivingWay) and world == 1 and not fresh else None
            if other is None or start is not None:
                raise
            watched.put_back(batch)
            criterion = _given_way(other, error)
            yield from criterion.observe(model, watched, graph, tally.batches, progress)

    try:
        # A process without a batch to score has others to wait for it; one alone is told that there is none.
        if world > 1 and not watched.pending() and isinstance(criterion, Joining):
            later = criterion.join(model, watched, graph)
        elif (start is None and world == 1) or (watched.pending() and not settled(skip)):
            for seen in observed():
                # Halves as those of residuals: by the number of the batch among all processes' and the place in it.
                tally = tally.joined(seen.tally, turned=global_number(tally.batches) % 2 == 1)
                later = seen.later
                rows.add(seen)
                fresh += 1
                if settled(skip + fresh):
                    break
                keep(SAVE_EVERY + 10 * took)  # states take a tenth of the time at most
    except BaseException:
        keep(-1)
        raise
    if world > 1:
        keep(SAVE_EVERY)  # others may be stopped before they are done
    tally = reduced(tally)
    if not tally.total:
        raise InputError(
            f"{criterion.label} could use none of the samples; give more batches, or ask less of them (jbr: a lower "
            "confidence)"
        )
    result = state(skip + fresh)
    if world > 1:
        about = {**result.manifest, "data": digest_of_all(watched.digests[skip + fresh])}
        held = gathered_rows(result.sensitivities, rows.counted, cap)
        result = replace(result, sensitivities=held, manifest=about)
    finish(result, None if save is None else Path(save), exact)
    return result


def _fitting(criterion: Streaming, model: nn.Module, watched: Watched, graph: Graph, start: Scores | None) -> Streaming:
    """The criterion, or the one it leaves this model to: what was taken before, and what all processes agree on."""
    other = criterion.instead() if isinstance(criterion, GivingWay) else None
    if other is None:
        return criterion
    if any(of_all(start is not None and INSTEAD in start.manifest)):
        return other
    assert isinstance(criterion, GivingWay)
    if process()[1] > 1 and not all(of_all(criterion.sees(model, watched, graph))):
        return _given_way(other, "what units do is not seen from what layers are given")
    return criterion


def _given_way(other: Streaming, why: object) -> Streaming:
    logger.warning("%s; scored by %s", str(why).partition(";")[0], other.label)
    return other


def _begun(
    own: Path | None,
    start: Scores | None,
    criterion: Streaming,
    batches: Iterable[Batch],
    graph: Graph,
    request: Mapping[str, Any],
) -> tuple[Scores | None, Tally, Watched]:
    """What a scoring goes on from: all processes do, or all raise, before there is anything to wait for."""
    labelled, world = getattr(criterion, "labelled", False), process()[1]
    tally, watched, refused = Tally(), Watched(batches, labelled=labelled), None
    try:
        if own is not None and own.is_file():
            start = Scores.load(own)
        if start is not None:
            tally = check_start(start, criterion, graph, request)
            skip = 0 if own is None else tally.batches
            watched = Watched(batches, skip, str(start.manifest.get("data", "")), labelled)
            watched.ahead = str(start.manifest.get("ahead", ""))
            if world > 1:
                watched.pending()
    except InputError as error:
        refused = error if world == 1 else type(error)(f"{own}: {error}")
    for found in of_all(refused):
        if found is not None:
            raise found
    return start, tally, watched


def _scores(
    criterion: Streaming,
    model: nn.Module,
    graph: Graph,
    tally: Tally,
    rows: Sensitivities | None,
    manifest: dict[str, Any],
    later: Later | None,
) -> Scores:
    halves = [criterion.summarise(half, model, graph) for half in tally.halves() or ()]
    values = criterion.summarise(tally.means(), model, graph)
    errors = tally.stderr() if set(values) == set(tally.sums) else None
    if later is not None:
        first, values = values, later(values) or values
        parts = [later(half, number) for number, half in enumerate(halves)]
        halves = [half for half in parts if half is not None]
        errors = _grown(errors, first, values, halves) if errors is not None and halves else None
    return Scores(
        values=values,
        stderr=errors,
        criterion=criterion.label,
        samples=tally.total,
        probes=criterion.probes,
        seed=criterion.seed,
        model_id=graph.model_id,
        tally=tally,
        halves=tuple(halves) if halves else None,  # type: ignore[arg-type]
        sensitivities=rows,
        manifest=manifest,
    )


def _grown(
    errors: Mapping[str, Tensor], first: Mapping[str, Tensor], values: Mapping[str, Tensor], halves: Sequence[Any]
) -> dict[str, Tensor]:
    """Standard errors of scores that were made of others: as large in a group, at least, as its halves are apart."""
    found = {}
    for name, value in values.items():
        error = errors[name] * torch.nan_to_num(value / first[name], 1.0, 1.0)
        apart = (halves[0][name] - halves[1][name]).square().mean() / 4
        found[name] = error * (apart / error.square().mean().clamp(min=1e-300)).sqrt().clamp(min=1.0)
    return found


def _manifest(watched: Watched, done: int, tally: Tally, world: int) -> dict[str, Any]:
    about = {"data": watched.digests[done], "batches": tally.batches, "processes": world}
    return about | ({"ahead": watched.ahead} if watched.ahead else {}) | {"versions": dict(_versions())}


@cache
def _versions() -> Mapping[str, str]:
    versions = {"tpvprune": __version__}
    for name in ("torch", "timm"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
