"""Several processes that share the batches out give what one process gives over all of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tpvprune as tp
from tests.cases import example, randomise
from tests.helpers import assert_same_state, built, gap
from tests.scoring.test_unseen import Views
from tpvprune.scoring import collect as collecting

WORLD = 2
SUMS = 1e-12
"""Relative to the largest score: float64 sums over batches in another order."""


def data(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator))
        for n in (4, 3, 1, 5, 2)[:count]
    ]


def other() -> torch.nn.Module:
    return torch.nn.Sequential(*list(built("mlp").model)[:-1], torch.nn.Linear(7, 4).double())


def reference() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return other()


# What is scored, on how many batches: five are shared out as three and two, one as one and none.
CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "probes": (lambda: tp.TPV(probes=2, seed=3), 5),
    "exact": (lambda: tp.TPV(probes="exact"), 5),
    "reference": (lambda: tp.TPV(reference=reference()), 5),
    "capped": (lambda: tp.TPV(sensitivities=7, reference=reference()), 5),
    "compensated": (lambda: tp.TPV(compensated=True), 5),
    "batched": (lambda: tp.TPV(engine="batched", seed=1), 5),
    "weights": (lambda: tp.TPV(engine="per_sample"), 5),
    "weights, compensated": (lambda: tp.TPV(compensated=True), 5),
    "jbr": (lambda: tp.JBR(confidence=0.3), 5),
    "fisher": (tp.Fisher, 5),
    "variance": (tp.Variance, 5),
    "one batch": (lambda: tp.TPV(probes=2), 1),
    "one batch, batched": (lambda: tp.TPV(engine="batched"), 1),
    "one batch, variance": (tp.Variance, 1),
    "one batch, compensated": (lambda: tp.TPV(compensated=True), 1),
    "weights, one batch, compensated": (lambda: tp.TPV(compensated=True), 1),
}


RESUMED = ["probes", "capped", "compensated", "weights, compensated", "variance", "jbr"]


def graph_of(name: str) -> tp.Graph:
    return tp.weight_graph(built("mlp").model) if name.startswith("weights") else built("mlp").graph


def scored(name: str, rank: int = 0, world: int = 1, **kwargs: Any) -> tp.Scores:
    make, count = CASES[name]
    return tp.score(built("mlp").model, data(count)[rank::world], graph_of(name), make(), **kwargs)


def interrupt(*told: Any) -> None:
    raise KeyboardInterrupt


def at_second(stage: str, done: int, total: int | None) -> None:
    if done == 2:
        interrupt()


def stopped(name: str, rank: int, save: Path) -> None:
    """The first process ends after two of its batches, the second while it waits for the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "reduced", interrupt)
        patch.setattr(collecting, "SAVE_EVERY", -1.0)
        with pytest.raises(KeyboardInterrupt):
            scored(name, rank, WORLD, save=save, progress=at_second if rank == 0 else None)
    torch.distributed.barrier()


def resumed(name: str, rank: int, folder: str, lost: int | None = None) -> tuple[list[str], int, tp.Scores]:
    """What is kept of a scoring that was stopped, how many batches are scored then, and the scores."""
    save = Path(folder, f"{name}{'' if lost is None else lost}.safetensors")
    stopped(name, rank, save)
    files = sorted(path.name for path in save.parent.glob(f"{save.stem}.*"))
    torch.distributed.barrier()
    if lost == rank:
        save.with_name(f"{save.stem}.{rank}-of-{WORLD}.safetensors").unlink()
    if rank == 0:
        save.with_name(f"{save.stem}.3-of-4.safetensors").write_text("of an earlier run of four")
    torch.distributed.barrier()
    counted: list[int] = []
    scores = scored(name, rank, WORLD, save=save, progress=lambda stage, done, total: counted.append(done))
    return files, len(counted), scores


def saves(rank: int, folder: str, every: float) -> list[tuple[str, list[str]]]:
    """Files that are saved, and the shares that are there before each."""
    told: list[tuple[str, list[str]]] = []
    plain = tp.Scores.save

    def save(self: tp.Scores, path: Any, **how: Any) -> None:
        told.append((Path(path).name, sorted(left.name for left in Path(folder).glob("scores.*"))))
        plain(self, path, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "SAVE_EVERY", every)
        patch.setattr(tp.Scores, "save", save)
        scored("probes", rank, WORLD, save=f"{folder}/scores")
    return told


def refused(rank: int, folder: str) -> dict[str, str]:
    """What the processes say where the first one's share is of something else, and what they leave."""
    save, told = Path(folder, "refused.safetensors"), {}
    stopped("probes", rank, save)
    if rank == 1:
        save.with_name("refused.1-of-2.safetensors").unlink()
    torch.distributed.barrier()
    given = {"seed": (tp.TPV(probes=2, seed=4), data(5)), "batches": (tp.TPV(probes=2, seed=3), data(5)[1:])}
    for name, (criterion, batches) in given.items():
        try:
            tp.score(built("mlp").model, batches[rank::WORLD], built("mlp").graph, criterion, save=save)
        except (tp.PlanError, tp.DataError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()
    return told | {"left": " ".join(sorted(path.name for path in save.parent.glob("refused.*")))}


def added_to(rank: int, folder: str, lost: int | None) -> str:
    """What the processes say where a batch more would compensate; one of them may have no share any more."""
    save = Path(folder, f"added{lost}.safetensors")
    stopped("compensated", rank, save)
    if lost == rank:
        save.with_name(f"{save.stem}.{rank}-of-{WORLD}.safetensors").unlink()
    torch.distributed.barrier()
    more = [*data(5), *data(1)][rank::WORLD]
    try:
        tp.score(built("mlp").model, more, graph_of("compensated"), tp.TPV(compensated=True), save=save)
    except tp.InputError as error:
        return str(error)
    return "nothing"


# Batch sizes of each process, of which one alone may see that samples lie in an order of their own.
UNEQUAL = {"more there": ([8], [1]), "nothing there": ([8], []), "nothing here": ([], [8]), "one first": ([8], [1, 8])}


def given_way(rank: int, shares: Sequence[Sequence[int]], compensated: bool) -> tp.Scores:
    """Scores of a model that holds two views of each sample in a batch."""
    model = randomise(Views())
    batches = [example(size, 5, seed=size + number) for number, size in enumerate(shares[rank])]
    criterion = tp.TPV(compensated=compensated, probes="exact")
    return tp.score(model, batches, tp.trace(model, example(1, 5)), criterion)


def work(rank: int, folder: str) -> None:
    """What each process does; what it found is left in the folder."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {name: scored(name, rank, WORLD) for name in CASES}
    for name, kwargs in (("until", {"until": tp.Settled()}), ("start", {"start": found["probes"]})):
        try:
            scored("probes", rank, WORLD, **kwargs)
        except tp.InputError as error:
            found[name] = str(error)
    try:  # a process without a batch waits for none that refused
        mine = data(1)[rank::WORLD]
        tp.score(built("mlp").model, mine, built("mlp").graph, tp.TPV(compensated=True, engine="batched"))
    except tp.InputError as error:
        found["refused"] = str(error)
    try:
        tp.score(built("mlp").model, [], built("mlp").graph)
    except tp.InputError as error:
        found["nothing"] = str(error)
    found["given way"] = {
        (name, compensated): given_way(rank, shares, compensated)
        for name, shares in UNEQUAL.items()
        for compensated in (False, True)
    }
    found["resumed"] = {name: resumed(name, rank, folder) for name in RESUMED}
    found["one lost"] = [resumed("compensated", rank, folder, lost) for lost in range(WORLD)]
    found["shares refused"] = refused(rank, folder)
    found["added to"] = [added_to(rank, folder, lost) for lost in (None, *range(WORLD))]
    found["saves"] = saves(rank, folder, collecting.SAVE_EVERY)
    found["saves, kept"] = saves(rank, folder, -1.0)
    Path(folder, f"found{rank}").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), WORLD)
    return folder, [pickle.loads((folder / f"found{rank}").read_bytes()) for rank in range(WORLD)]


def sorted_rows(rows: Tensor) -> Tensor:
    return torch.stack(sorted(rows, key=lambda row: row.tolist()))


@pytest.mark.parametrize("name", CASES)
def test_all_processes_get_the_scores_of_all_batches(name: str, found: Any) -> None:
    whole = scored(name)
    for scores in (one[name] for one in found[1]):
        assert scores.samples == whole.samples
        assert (scores.tally.total, scores.tally.rows) == (whole.tally.total, whole.tally.rows)
        assert (scores.stderr is None) == (whole.stderr is None)
        for one, wanted in ((scores.values, whole.values), (scores.stderr, whole.stderr or {})):
            for key, value in wanted.items():
                assert gap(one[key], value) <= SUMS * float(value.abs().max()), key
        assert (scores.halves is None) == (whole.halves is None)
        for half, wanted in zip(scores.halves or (), whole.halves or (), strict=True):
            for key, value in wanted.items():
                assert gap(half[key], value) <= 10 * SUMS * float(value.abs().max()), key
        assert scores.manifest["processes"] == WORLD
        assert scores.manifest["batches"] == CASES[name][1]
        assert (scores.sensitivities is None) == (whole.sensitivities is None)


@pytest.mark.parametrize("name", ["probes", "exact", "reference", "one batch"])
def test_sensitivities_are_those_of_all_samples(name: str, found: Any) -> None:
    whole = scored(name).sensitivities
    for scores in (one[name] for one in found[1]):
        held = scores.sensitivities
        assert (held.samples, held.groups) == (whole.samples, whole.groups)
        torch.testing.assert_close(sorted_rows(held.rows), sorted_rows(whole.rows), rtol=1e-6, atol=0)
        torch.testing.assert_close(held.linear, whole.linear, rtol=1e-9, atol=1e-12)
    assert (name == "reference") == bool(whole.linear.any())


def test_the_cap_is_shared_and_the_linear_part_is_of_every_sample(found: Any) -> None:
    whole, every = scored("capped").sensitivities, scored("reference").sensitivities
    rows = {tuple(row) for row in every.rows.tolist()}
    for scores in (one["capped"] for one in found[1]):
        held = scores.sensitivities
        assert held.samples == len(held.rows) == whole.samples == 7
        assert {tuple(row) for row in held.rows.tolist()} <= rows
        torch.testing.assert_close(held.linear, whole.linear, rtol=1e-9, atol=1e-12)


def test_all_processes_get_the_same(found: Any) -> None:
    one, other = found[1]
    for name in CASES:
        assert one[name].manifest == other[name].manifest
        for key, value in one[name].values.items():
            assert torch.equal(value, other[name].values[key])
    digests = [one[name].manifest["data"] for name in ("probes", "exact", "one batch")]
    assert digests[0] == digests[1] != digests[2]


def test_processes_leave_a_model_to_another_criterion_together(found: Any) -> None:
    one, other = (told["given way"] for told in found[1])
    for (name, compensated), scores in one.items():
        label = tp.TPV(engine="batched").label
        assert scores.criterion == other[name, compensated].criterion == label
        assert scores.samples == sum(map(sum, UNEQUAL[name]))
        assert scores.sensitivities is None
        for key, value in scores.values.items():
            assert torch.equal(value, other[name, compensated].values[key])
            torch.testing.assert_close(value, one[name, False].values[key], rtol=1e-12, atol=0)


def test_what_several_processes_cannot_do_is_refused(found: Any) -> None:
    for one in found[1]:
        assert "several processes cannot; leave it out" in one["until"]
        assert "start= is for one process" in one["start"]
        assert "give more batches" in one["nothing"]
        assert "leave compensated out" in one["refused"]


def test_one_process_saves_what_all_have_found(found: Any) -> None:
    folder, (first, second) = found
    assert (first["saves"], second["saves"]) == ([("scores", [])], [])  # what takes no time is not kept on the way
    assert {name for name, _ in first["saves, kept"][:-1]} == {"scores.0-of-2"}
    assert {name for name, _ in second["saves, kept"]} == {"scores.1-of-2"}
    assert first["saves, kept"][-1] == ("scores", ["scores.0-of-2", "scores.1-of-2"])
    assert list(folder.glob("scores.*")) == []
    saved = tp.Scores.load(folder / "scores")
    for key, value in scored("probes").values.items():
        assert gap(saved.values[key], value) <= SUMS * float(value.max())
    # Which batches it is of, only as many processes could say: alone, it is not gone on with by mistake.
    with pytest.raises(tp.DataError, match="save to another file"):
        scored("probes", save=folder / "scores")


@pytest.mark.parametrize("name", RESUMED)
def test_processes_that_were_stopped_go_on_with_what_each_had_done(name: str, found: Any) -> None:
    folder, both = found
    for rank, one in enumerate(both):
        files, counted, scores = one["resumed"][name]
        assert files == [f"{name}.{r}-of-{WORLD}.safetensors" for r in range(WORLD)]
        whole = one[name]
        assert counted < len(data(5)[rank::WORLD])
        assert_same_state(scores.values, whole.values)
        assert (scores.samples, scores.manifest["data"]) == (whole.samples, whole.manifest["data"])
        assert (scores.sensitivities is None) == (whole.sensitivities is None)
        if scores.sensitivities is not None:
            assert torch.equal(scores.sensitivities.rows, whole.sensitivities.rows)
            assert torch.equal(scores.sensitivities.linear, whole.sensitivities.linear)
    assert [path.name for path in folder.glob(f"{name}.*")] == [f"{name}.safetensors"]
    assert_same_state(tp.Scores.load(folder / f"{name}.safetensors").values, both[0][name].values)


@pytest.mark.parametrize("lost", range(WORLD))
def test_a_share_that_is_lost_is_scored_anew(lost: int, found: Any) -> None:
    for rank, one in enumerate(found[1]):
        _, counted, scores = one["one lost"][lost]
        assert counted == (len(data(5)[rank::WORLD]) if rank == lost else 1 - rank)
        assert_same_state(scores.values, one["compensated"].values)


def test_compensated_scores_are_added_to_by_none(found: Any) -> None:
    for one in found[1]:
        for told in one["added to"]:
            assert "what compensates what would change; score anew" in told


def test_shares_of_something_else_are_refused_by_all(found: Any) -> None:
    folder, both = found
    for one in both:
        told = one["shares refused"]
        name = folder / "refused.0-of-2.safetensors"
        assert told["seed"].startswith(f"PlanError: {name}: batches cannot be added")
        assert told["batches"].startswith(f"DataError: {name}: the saved scores are of 2 batches other than")
        assert told["left"] == name.name
