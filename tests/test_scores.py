"""Sums that scores are made of, what a file keeps of them, and how sure a ranking is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tpvprune as tp
from tests import tolerances
from tests.helpers import built
from tpvprune.scores import SCORES_FORMAT, Sensitivities
from tpvprune.tally import Tally

SUMS = 1e-12
"""Relative, for float64 sums of a few dozen terms in another order."""

Batches = list[tuple[dict[str, torch.Tensor], int]]


def batches_of(rows: Sequence[int], stands_for: Sequence[int], seed: int = 0) -> Batches:
    """Positive values `(rows, entries)` of two groups for each batch, and the samples that each row stands for."""
    generator = np.random.default_rng(seed)
    return [
        ({name: torch.from_numpy(generator.gamma(2.0, 3.0, (n, k))) for name, k in (("a", 3), ("b", 2))}, x)
        for n, x in zip(rows, stands_for, strict=True)
    ]


def added(batches: Batches) -> Tally:
    total = Tally()
    for values, x in batches:
        total = total + Tally.of_rows(values, x)
    return total


def joined(batches: Batches, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a group, and the samples that each stands for."""
    values = np.concatenate([v[name].numpy() for v, _ in batches])
    return values, np.concatenate([np.full(len(v[name]), x) for v, x in batches]).astype(float)


def same_tally(one: Tally, other: Tally) -> None:
    assert one.to_json() == other.to_json()
    assert set(one.sums) == set(other.sums)
    for key, value in one.sums.items():
        torch.testing.assert_close(value, other.sums[key], rtol=SUMS, atol=SUMS * float(value.abs().max()))


ROWS = {
    "samples": ([5, 4, 1, 7, 2], [1] * 5),
    "batches": ([1] * 6, [8, 8, 3, 8, 1, 5]),
    "both": ([3, 1, 2, 1], [1, 6, 2, 9]),
    "one batch": ([9], [1]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_means_halves_and_errors_are_those_of_all_rows(kind: str) -> None:
    batches = batches_of(*ROWS[kind])
    tally = added(batches)
    for name in ("a", "b"):
        values, x = joined(batches, name)
        assert (tally.rows, tally.total, tally.batches) == (len(values), x.sum(), len(batches))
        assert (tally.squares, tally.samples) == ((x**2).sum(), (x[::2].sum(), x[1::2].sum()))
        mean = np.average(values, axis=0, weights=x)
        np.testing.assert_allclose(tally.means()[name], mean, rtol=SUMS)
        for half, first in zip(tally.halves(), (0, 1), strict=True):
            wanted = np.average(values[first::2], axis=0, weights=x[first::2])
            np.testing.assert_allclose(half[name], wanted, rtol=SUMS)
        # The plain formula where rows weigh the same; its linear expansion where they do not (checked by draws below).
        spread = ((x[:, None] * (values - mean)) ** 2).sum(0) * len(values) / (len(values) - 1)
        np.testing.assert_allclose(tally.stderr()[name], np.sqrt(spread) / x.sum(), rtol=1e-9)
        if len(set(x)) == 1:
            np.testing.assert_allclose(tally.stderr()[name], values.std(0, ddof=1) / len(values) ** 0.5, rtol=1e-9)


def test_the_error_of_batches_of_different_sizes_is_that_of_their_samples() -> None:
    sizes, sigma, draws = [16, 3, 16, 9, 1, 16, 5, 12] * 3, 2.0, 4000
    generator = np.random.default_rng(3)
    means = 7 + generator.normal(size=(draws, len(sizes))) * sigma / np.sqrt(sizes)
    # Every draw is an entry of one tally.
    tally = added([({"a": torch.from_numpy(means[:, r : r + 1].T)}, x) for r, x in enumerate(sizes)])
    true = sigma / sum(sizes) ** 0.5
    assert float(tally.means()["a"].std()) == pytest.approx(true, rel=0.05)
    assert float(tally.stderr()["a"].square().mean().sqrt()) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("kind", ROWS)
def test_adding_is_associative_and_equals_one_tally(kind: str) -> None:
    batches = batches_of(*ROWS[kind])
    whole = added(batches)
    for cut in range(len(batches) + 1):
        same_tally(added(batches[:cut]) + added(batches[cut:]), whole)
    parts = [Tally.of_rows(*batch) for batch in batches]
    while len(parts) > 1:  # from the right
        parts[-2:] = [parts[-2] + parts[-1]]
    same_tally(parts[0], whole)
    if len({x for _, x in batches}) == 1:
        every = {name: torch.cat([v[name] for v, _ in batches]) for name in ("a", "b")}
        same_tally(dataclasses.replace(Tally.of_rows(every, batches[0][1]), batches=len(batches)), whole)


def test_a_tally_knows_what_it_cannot_tell() -> None:
    one = added(batches_of([1], [8]))
    assert one.halves() is None
    assert one.stderr() is None
    assert one.total == 8
    np.testing.assert_array_equal(one.means()["a"], joined(batches_of([1], [8]), "a")[0][0])
    with pytest.raises(tp.PlanError, match="different units"):
        one + Tally.of_rows({"c": torch.ones(2, 2)})


def test_equal_rows_have_no_error() -> None:
    tally = Tally.of_rows({"a": torch.full((3, 2), 0.1, dtype=torch.float64)}, 7) + Tally.of_rows(
        {"a": torch.full((4, 2), 0.1, dtype=torch.float64)}, 2
    )
    assert float(tally.stderr()["a"].max()) < 1e-8  # the root of a rounding error


# Files


def effects(rows: int = 6, samples: int = 3, seed: int = 0) -> Sensitivities:
    generator = torch.Generator().manual_seed(seed)
    groups = (("a", 3), ("b", 2))
    scale = torch.tensor([1.0, 1e-4, 1e3, 1e-30, 0.0])  # a column of its own scale each, one of them dead
    linear = torch.randn(5, generator=generator, dtype=torch.float64)
    return Sensitivities(groups, torch.randn(rows, 5, generator=generator) * scale, linear, samples)


def full_scores(**change: object) -> tp.Scores:
    tally = added(batches_of([5, 4], [1, 1]))
    about = {"criterion": "by hand", "samples": 9, "probes": 2, "seed": 3, "model_id": "abc"}
    parts = {"tally": tally, "halves": tally.halves(), "sensitivities": effects()}
    manifest = {"data": "ff", "batches": 2, "versions": {"torch": "x"}, "settings": {"confidence": 0.9}}
    return tp.Scores(
        **{"values": tally.means(), "stderr": tally.stderr(), "manifest": manifest, **about, **parts, **change}
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tally": None},
        {"halves": None, "stderr": None},
        {"sensitivities": None},
        {"manifest": {}, "probes": "exact"},
    ],
    ids=str,
)
def test_everything_is_read_back(tmp_path, change: dict[str, object]) -> None:
    old = full_scores(**change)
    old.save(tmp_path / "s")
    new = tp.Scores.load(tmp_path / "s")
    for name in ("criterion", "samples", "probes", "seed", "model_id", "manifest"):
        assert getattr(new, name) == getattr(old, name), name
    pairs = [(new.values, old.values), (new.stderr, old.stderr)]
    pairs += [(n, o) for n, o in zip(new.halves or (), old.halves or (), strict=True)]
    if old.tally is not None:
        assert new.tally.to_json() == old.tally.to_json()
        pairs.append((new.tally.sums, old.tally.sums))
    for one, other in pairs:
        assert (one is None) == (other is None)
        assert set(one or ()) == set(other or ())
        for key in other or ():
            assert torch.equal(one[key], other[key])
            assert one[key].dtype == other[key].dtype
    assert (new.tally is None, new.sensitivities is None) == (old.tally is None, old.sensitivities is None)
    if old.sensitivities is not None:
        one, other = new.sensitivities, old.sensitivities
        assert (one.groups, one.samples) == (other.groups, other.samples)
        assert torch.equal(one.linear, other.linear)
        # Half precision of each column over its largest entry: 11 bits, and no finer than 2^-25 of that entry.
        bound = other.rows.abs() * 2.0**-11 + other.rows.abs().amax(0) * 2.0**-25
        assert bool(((one.rows - other.rows).abs() <= bound * 1.001).all())
        new.save(tmp_path / "again")  # what has been rounded is not rounded again
        assert torch.equal(tp.Scores.load(tmp_path / "again").sensitivities.rows, one.rows)


def test_scores_that_share_a_tensor_are_saved(tmp_path) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    tp.Scores({"a": ones, "b": ones}, {"a": ones[:3], "b": ones}, "", 1, 1, 0, "").save(tmp_path / "s")
    assert torch.equal(tp.Scores.load(tmp_path / "s").values["b"], ones)


def damaged(tmp_path, about: dict[str, object] | None = None, lacks: str = "", header: str | None = None) -> str:
    """The file of `full_scores` with another header, or without the tensors of a prefix."""
    full_scores().save(tmp_path / "s")
    with safe_open(str(tmp_path / "s"), framework="pt") as file:
        told = json.loads(file.metadata()["tpvprune"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    told = {key: value for key, value in {**told, **(about or {})}.items() if value is not ...}
    kept = {key: value for key, value in tensors.items() if not lacks or not key.startswith(lacks)}
    save_file(kept, tmp_path / "bad", metadata={"tpvprune": json.dumps(told) if header is None else header})
    return str(tmp_path / "bad")


@pytest.mark.parametrize(
    "change",
    [
        {"about": {"format": SCORES_FORMAT - 1}},
        {"about": {"format": SCORES_FORMAT + 1}},
        {"about": {"format": ...}},
        {"about": {"criterion": ...}},
        {"about": {"tally": 3}},
        {"about": {"tally": {"rows": 2}}},
        {"about": {"tally": {"samples": [1, 2], "size": 3}}},
        {"about": {"sensitivities": {"groups": [["a", 3]], "samples": 3}}},
        {"about": {"sensitivities": {"samples": 3}}},
        {"about": {"unheard": "of"}},
        {"lacks": "sensitivity/scale"},
        {"header": "{"},
        {"header": "[1]"},
    ],
    ids=str,
)
def test_damaged_files_are_refused(tmp_path, change: dict[str, object]) -> None:
    with pytest.raises(tp.PlanError, match=r"score again|format|no scores file"):
        tp.Scores.load(damaged(tmp_path, **change))


def test_a_file_cut_short_is_refused(tmp_path) -> None:
    full_scores().save(tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(tp.PlanError, match="no scores file"):
            tp.Scores.load(tmp_path / "cut")


def test_a_file_with_other_bytes_is_refused(tmp_path) -> None:
    full_scores().save(tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")  # after the header
    for first, last in ((len(whole) - 40, len(whole)), (begin, begin + 40), (begin + 100, begin + 101)):
        changed = bytes(255 - byte for byte in whole[first:last])
        (tmp_path / "bad").write_bytes(whole[:first] + changed + whole[last:])
        with pytest.raises(tp.PlanError, match=r"damaged.*score again"):
            tp.Scores.load(tmp_path / "bad")
    tp.Scores.load(damaged(tmp_path))  # one that says nothing of its bytes


@pytest.mark.parametrize("rows", [torch.ones(6, 4), torch.ones(6)])
def test_sensitivities_have_a_column_a_unit(rows: torch.Tensor) -> None:
    with pytest.raises(tp.PlanError, match="5 columns"):
        Sensitivities((("a", 3), ("b", 2)), rows, torch.zeros(5), 3)


def test_the_drift_of_a_plan_is_the_sum_of_its_columns_squared() -> None:
    held = effects()
    held = dataclasses.replace(held, rows=torch.randn(6, 5, generator=torch.Generator().manual_seed(4)))
    keep = {"a": torch.tensor([False, True, False]), "b": torch.tensor([True, False])}
    for masks, gone in ((keep, [0, 2, 4]), ({"b": keep["b"]}, [4]), ({}, [])):
        sums = held.rows.numpy().astype(float)[:, gone].sum(1)
        moved = (sums**2).reshape(3, 2).sum(1)  # two rows a sample
        value, error = held.drift(masks)
        assert value == pytest.approx(moved.mean() + held.linear.numpy()[gone].sum(), rel=1e-12)
        assert error == pytest.approx(moved.std(ddof=1) / 3**0.5, rel=1e-12)
    assert math.isnan(dataclasses.replace(held, samples=1).drift(keep)[1])


# How sure


def known(true: np.ndarray, noise: np.ndarray, samples: int, seed: int = 0) -> tp.Scores:
    """Scores of `samples` samples whose error is known: `noise` is that of one sample."""
    error = noise / samples**0.5
    halves = [true + np.random.default_rng([seed, n]).normal(size=len(true)) * error * 2**0.5 for n in (1, 2)]
    split = len(true) // 3

    def grouped(values: np.ndarray) -> dict[str, torch.Tensor]:
        return {"a": torch.from_numpy(values[:split].copy()), "b": torch.from_numpy(values[split:].copy())}

    return tp.Scores(
        grouped((halves[0] + halves[1]) / 2),
        grouped(error),
        "known",
        samples,
        1,
        0,
        "",
        halves=(grouped(halves[0]), grouped(halves[1])),
    )


def spread(units: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    true = generator.gamma(2.0, 1.0, units)
    return true, true * generator.uniform(2, 6, units)


def flat(values) -> np.ndarray:
    return np.concatenate([v.numpy() for v in values.values()])


def test_ranks_of_the_halves_are_compared() -> None:
    spearmanr = pytest.importorskip("scipy.stats").spearmanr

    scores = known(*spread(400), 50)
    one, other = (flat(half) for half in scores.halves)
    assert scores.summary()["rank_correlation"] == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    tied = dataclasses.replace(scores, halves=tuple({n: v.round() for n, v in half.items()} for half in scores.halves))
    wanted = spearmanr(one.round(), other.round()).statistic
    assert tied.summary()["rank_correlation"] == pytest.approx(wanted, abs=1e-12)
    level = dataclasses.replace(scores, halves=({n: torch.ones_like(v) for n, v in scores.values.items()},) * 2)
    assert level.summary()["rank_correlation"] is None


def test_the_relative_error_is_the_median_over_units() -> None:
    scores = known(*spread(300), 64)
    wanted = np.median(np.sort(flat(scores.stderr) / flat(scores.values)))
    assert scores.summary()["relative_stderr"] == pytest.approx(wanted, rel=0.02)  # torch's is the lower of two middles
    assert scores.summary()["units"] == 300


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.85])
def test_the_wrong_side_is_what_draws_around_the_scores_say(cut: float) -> None:
    scores = known(*spread(), 60)
    values, errors = flat(scores.values), flat(scores.stderr)
    kept = np.argsort(values)[-round(len(values) * cut) :]
    is_kept = np.isin(np.arange(len(values)), kept)
    threshold = (values[is_kept].min() + values[~is_kept].max()) / 2
    generator, wrong = np.random.default_rng(1), []
    for _ in range(300):
        drawn = values + errors * generator.normal(size=len(values))
        wrong.append(((drawn > threshold) != is_kept).mean())
    found = scores.summary(cut)["wrong_side"]
    assert found == pytest.approx(np.mean(wrong), abs=tolerances.STDERRS * np.std(wrong) / len(wrong) ** 0.5)
    assert 0.02 < found < 0.5


@pytest.mark.parametrize(("cut", "share", "seen"), [(0.5, 0.02, 400), (0.5, 0.01, 1600), (0.8, 0.02, 800)])
def test_as_many_samples_as_said_leave_the_share_asked_on_the_wrong_side(cut: float, share: float, seen: int) -> None:
    # Enough units that a hundred lie close to the cut: fewer make the share itself a matter of chance.
    true, noise = spread(30_000)
    asked = known(true, noise, seen).summary(cut, share)
    assert not asked["settled"]
    samples = asked["samples_to_settle"]
    assert samples > 1.5 * seen
    keep = round(len(true) * cut)
    best = np.isin(np.arange(len(true)), np.argsort(true)[-keep:])
    wrong, told = [], []
    for seed in range(4):
        scores = known(true, noise, samples, seed)
        wrong.append((np.isin(np.arange(len(true)), np.argsort(flat(scores.values))[-keep:]) != best).mean())
        told.append(scores.summary(cut, share)["wrong_side"])
    assert np.mean(wrong) == pytest.approx(share, rel=0.15)
    assert np.mean(told) == pytest.approx(share, rel=0.15)
    later = known(true, noise, 2 * samples).summary(cut, share)
    assert later["settled"]
    assert later["samples_to_settle"] == pytest.approx(samples, rel=0.2)


def test_dead_units_at_the_cut_are_on_no_wrong_side() -> None:
    # Which of two units that nothing reads is kept makes no difference.
    values = {"a": torch.cat([torch.zeros(6), torch.ones(4)]).double()}
    scores = tp.Scores(values, {"a": values["a"] * 0.01}, "", 100, 1, 0, "")
    found = scores.summary(0.5, 0.01)
    assert (found["wrong_side"], found["settled"]) == (pytest.approx(0, abs=1e-12), True)


def test_equal_scores_never_settle() -> None:
    ones = {"a": torch.ones(10, dtype=torch.float64)}
    found = tp.Scores(ones, ones, "", 100, 1, 0, "").summary()
    assert (found["settled"], found["samples_to_settle"]) == (False, None)


def test_what_cannot_be_known_is_none() -> None:
    found = tp.Scores({"a": torch.ones(3)}, None, "", 5, 1, 0, "").summary()
    assert found.pop("samples") == 5
    assert found.pop("units") == 3
    assert set(found.values()) == {None}
    assert tp.Scores({}, None, "", 5, 1, 0, "").summary()["units"] == 0


@pytest.mark.parametrize(("cut", "share"), [(0, 0.1), (1, 0.1), (0.5, 0), (0.5, 1), (-1, 0.1)])
def test_shares_lie_between_zero_and_one(cut: float, share: float) -> None:
    with pytest.raises(tp.InputError, match="between 0 and 1"):
        full_scores().summary(cut, share)
    with pytest.raises(tp.InputError, match="between 0 and 1"):
        tp.Settled(cut, share)


def test_scores_of_a_model_fit_their_own_tally() -> None:
    b = built("mlp")
    scores = tp.score(b.model, [b.inputs[:2], b.inputs[2:]], b.graph, tp.TPV(probes="exact"))
    assert (scores.tally.total, scores.tally.rows, scores.tally.batches) == (5, 5, 2)
    one = [tp.score(b.model, [x[None]], b.graph, tp.TPV(probes="exact")).values["0"].numpy() for x in b.inputs]
    # The second batch begins with an odd sample.
    for half, numbers in zip(scores.halves, ([0, 3], [1, 2, 4]), strict=True):
        wanted = np.mean([one[number] for number in numbers], axis=0)
        np.testing.assert_allclose(half["0"], wanted, rtol=tolerances.EXACT)
