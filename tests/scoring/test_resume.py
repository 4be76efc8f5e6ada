"""Scores that more batches are added to, and a scoring that was stopped and goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.helpers import assert_scores_close, built, gap
from tpvprune.scoring import collect as collecting

SUMS = 1e-12
"""Relative to the largest score: float64 sums over batches in another order."""

HALF = 2.0**-10
"""Relative to a column's largest entry: sensitivities are kept in half precision on disk."""


class Counted(nn.Module):
    """A model that counts its calls, and fails at one of them."""

    def __init__(self, inner: nn.Module, fails_at: int | None = None) -> None:
        super().__init__()
        self.inner, self.calls, self.fails_at = inner, 0, fails_at

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:  # so many are run to see where samples lie
            return self.inner(x)
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the machine went away")
        return self.inner(x)


def data(count: int = 5, seed: int = 0, name: str = "mlp") -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes, with labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = built(name).inputs.shape[1:]
    sizes = [4, 6, 1, 5, 2, 4, 6][:count]
    return [
        (torch.randn(n, *shape, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator))
        for n in sizes
    ]


def counted(name: str = "mlp", fails_at: int | None = None) -> tuple[Counted, tp.Graph]:
    model = Counted(built(name).model)
    graph = tp.trace(model, built(name).inputs)
    model.calls, model.fails_at = 0, fails_at
    return model, graph


CRITERIA: dict[str, Callable[[], Any]] = {
    "probes": lambda: tp.TPV(probes=2, seed=3),
    "exact": lambda: tp.TPV(probes="exact", sensitivities=7),
    "reference": lambda: tp.TPV(reference=built("mlp").model[:], head="logits", probes=1),
    "all": lambda: tp.TPV(over="all"),
    "batched": lambda: tp.TPV(engine="batched", seed=1),
    "per sample": lambda: tp.TPV(engine="per_sample", perturbation=tp.Rounding(4)),
    "jbr": lambda: tp.JBR(confidence=0.3),
    "taylor": tp.Taylor,
    "fisher": lambda: tp.Fisher(seed=2),
    "jacobian": tp.Jacobian,
    "variance": tp.Variance,
    "wanda": tp.Wanda,
}


def assert_same(a: tp.Scores, b: tp.Scores, rows: float = 0.0) -> None:
    """The same in all that they hold; sensitivities up to `rows` of their column's largest entry."""
    for name in ("criterion", "samples", "probes", "seed", "model_id"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.tally.to_json() == b.tally.to_json()
    pairs = [(a.values, b.values), (a.tally.sums, b.tally.sums)]
    pairs += [(x, y) for x, y in zip((a.stderr, *(a.halves or ())), (b.stderr, *(b.halves or ())), strict=True)]
    for one, other in pairs:
        assert (one is None) == (other is None)
        for key, value in (other or {}).items():
            assert gap(one[key], value) <= SUMS * float(value.abs().max()), key
    assert (a.sensitivities is None) == (b.sensitivities is None)
    if b.sensitivities is not None:
        assert a.sensitivities.samples == b.sensitivities.samples
        one, other = a.sensitivities.rows, b.sensitivities.rows
        assert one.shape == other.shape
        assert bool(((one - other).abs() <= rows * other.abs().amax(0)).all())
        torch.testing.assert_close(a.sensitivities.linear, b.sensitivities.linear, rtol=1e-9, atol=SUMS)


@pytest.mark.parametrize("kind", CRITERIA)
def test_batches_added_later_give_what_one_pass_gives(kind: str) -> None:
    model, graph = counted()
    whole = tp.score(model, data(), graph, CRITERIA[kind]())
    for cut in (1, 3, 5):
        first = tp.score(model, data()[:cut], graph, CRITERIA[kind]())
        both = tp.score(model, data()[cut:], graph, CRITERIA[kind](), start=first)
        assert_same(both, whole)
        assert both.manifest == whole.manifest
        if cut < 5:
            assert any(gap(first.values[g], v) > 1e-3 * float(v.max()) for g, v in whole.values.items())


def test_weights_are_added_to_as_well() -> None:
    model = built("mlp").model
    graph = tp.weight_graph(model)
    for engine in ("batched", "per_sample", "factored"):
        criterion = tp.TPV(engine=engine, probes=2, seed=5)
        first = tp.score(model, data()[:3], graph, criterion)
        assert_same(
            tp.score(model, data()[3:], graph, criterion, start=first), tp.score(model, data(), graph, criterion)
        )


def test_fewer_sensitivities_may_be_asked_for_later() -> None:
    model, graph = counted()
    first = tp.score(model, data()[:3], graph, tp.TPV(sensitivities=8))
    for cap in (5, 0):
        both = tp.score(model, data()[3:], graph, tp.TPV(sensitivities=cap), start=first)
        whole = tp.score(model, data(), graph, tp.TPV(sensitivities=cap))
        assert_same(both, whole)


class Stopped:
    """Batches of which only some can be read: the user, or the disk, stops there."""

    def __init__(self, batches: list[Any], after: int, error: type[BaseException]) -> None:
        self.batches, self.after, self.error = batches, after, error

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[: self.after]
        raise self.error


def test_a_scoring_that_was_stopped_after_any_batch_ends_with_the_same_bytes(tmp_path) -> None:
    model, graph = counted()
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter += 0.1
    criterion = tp.TPV(reference=dense)  # with a linear part, of which the mean rounds
    tp.score(model, data(), graph, criterion, save=tmp_path / "whole", exact=True)
    for after in range(1, len(data())):
        with pytest.raises(KeyboardInterrupt):
            tp.score(
                model, Stopped(data(), after, KeyboardInterrupt), graph, criterion, save=tmp_path / "s", exact=True
            )
        tp.score(model, data(), graph, criterion, save=tmp_path / "s", exact=True)
        assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes(), after
        (tmp_path / "s").unlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("kind", ["probes", "exact", "batched", "jbr", "fisher", "variance"])
def test_a_stopped_scoring_goes_on_where_it_stopped(kind: str, error: type[BaseException], tmp_path) -> None:
    model, graph = counted()
    whole = tp.score(model, data(), graph, CRITERIA[kind]())
    passes, file = model.calls // 5, tmp_path / "scores"
    for after in (2, 3):
        model.calls = 0
        with pytest.raises(error):
            tp.score(model, Stopped(data(), after, error), graph, CRITERIA[kind](), save=file)
        assert tp.Scores.load(file).tally.batches == after
    assert model.calls == passes  # the second stop went on from the first
    model.calls = 0
    done = tp.score(model, data(), graph, CRITERIA[kind](), save=file)
    assert model.calls == 2 * passes
    assert_same(done, whole, HALF)
    assert done.manifest == whole.manifest
    assert_same(tp.Scores.load(file), whole, 2 * HALF)
    again = tp.score(model, data(), graph, CRITERIA[kind](), save=file)
    assert model.calls == 2 * passes
    assert_same(again, whole, 2 * HALF)
    if kind in ("probes", "exact"):  # what a plan is judged by comes to the same
        keep = {"0": torch.tensor([True, False] * 4)}
        drifts = [s.sensitivities.drift(keep)[0] for s in (again, whole)]
        assert drifts[0] == pytest.approx(drifts[1], rel=0.01)


def test_a_model_that_fails_leaves_what_was_done(tmp_path) -> None:
    model, graph = counted(fails_at=4)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="went away"):
        tp.score(model, data(), graph, tp.TPV(), save=tmp_path / "s")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert tp.Scores.load(tmp_path / "s").tally.batches == 3
    done = tp.score(model, data(), graph, tp.TPV(), save=tmp_path / "s")
    assert model.calls == 4 + 2
    assert_same(done, tp.score(model, data(), graph, tp.TPV()), HALF)


def test_a_stop_before_the_first_batch_leaves_nothing(tmp_path) -> None:
    model, graph = counted()
    with pytest.raises(KeyboardInterrupt):
        tp.score(model, Stopped(data(), 0, KeyboardInterrupt), graph, save=tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_the_state_is_saved_on_the_way(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "SAVE_EVERY", -1.0)
    model, graph = counted()
    seen = []

    def watch(stage: str, done: int, total: int | None) -> None:
        seen.append(tp.Scores.load(tmp_path / "s").tally.batches if (tmp_path / "s").is_file() else 0)

    whole = tp.score(model, data(), graph, save=tmp_path / "s", progress=watch)
    assert seen == [1, 2, 3, 4, 5]
    killed = tmp_path / "killed"  # a run that had no chance to save at its end

    def die(stage: str, done: int, total: int | None) -> None:
        if done == 4:
            killed.write_bytes((tmp_path / "t").read_bytes())

    tp.score(model, data(), graph, save=tmp_path / "t", progress=die)
    model.calls = 0
    assert_same(tp.score(model, data(), graph, save=killed), whole, HALF)
    assert model.calls == 1


def test_batches_appended_to_the_list_are_added(tmp_path) -> None:
    model, graph = counted()
    tp.score(model, data(3), graph, tp.TPV(probes="exact"), save=tmp_path / "s")
    model.calls = 0
    longer = tp.score(model, data(5), graph, tp.TPV(probes="exact"), save=tmp_path / "s")
    assert model.calls == 2
    assert_same(longer, tp.score(model, data(5), graph, tp.TPV(probes="exact")), HALF)


def test_progress_counts_what_is_left_to_do(tmp_path) -> None:
    model, graph = counted()
    tp.score(model, data(3), graph, save=tmp_path / "s")
    seen: list[tuple[str, int, int | None]] = []
    tp.score(model, data(5), graph, save=tmp_path / "s", progress=lambda *told: seen.append(told))
    assert seen == [("score", 1, 2), ("score", 2, 2)]


def test_iterators_that_are_read_once_can_be_gone_on_with(tmp_path) -> None:
    model, graph = counted()
    tp.score(model, iter(data(3)), graph, save=tmp_path / "s")
    model.calls = 0
    done = tp.score(model, iter(data(5)), graph, save=tmp_path / "s")
    assert model.calls == 2
    assert_same(done, tp.score(model, data(5), graph), HALF)


# What is refused


OTHER = {
    "a batch changed": lambda b: [b[0], (b[1][0] + 1e-3, b[1][1]), *b[2:]],
    "one entry changed": lambda b: [b[0], (_nudged(b[1][0]), b[1][1]), *b[2:]],
    "batches swapped": lambda b: [b[1], b[0], *b[2:]],
    "samples swapped": lambda b: [(b[0][0].flip(0), b[0][1]), *b[1:]],
    "fewer batches": lambda b: b[:2],
    "batches cut elsewhere": lambda b: [(torch.cat([b[0][0], b[1][0]]), b[0][1]), *b[2:]],
    "no batch": lambda b: [],
}


def _nudged(x: Tensor) -> Tensor:
    x = x.clone()
    x[-1, -1] += 1e-9
    return x


@pytest.mark.parametrize("change", OTHER)
def test_a_file_of_other_batches_is_refused(change: str, tmp_path) -> None:
    model, graph = counted()
    tp.score(model, data(3), graph, save=tmp_path / "s")
    before, model.calls = (tmp_path / "s").read_bytes(), 0
    with pytest.raises(tp.DataError, match="save to another file"):
        tp.score(model, OTHER[change](data(4)), graph, save=tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert model.calls == 0


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        (tp.TPV(), tp.TPV(seed=1)),
        (tp.TPV(), tp.TPV(probes=2)),
        (tp.TPV(), tp.TPV(head="logits")),
        (tp.TPV(), tp.TPV(over="all")),
        (tp.TPV(), tp.TPV(engine="batched")),
        (tp.TPV(), tp.JBR()),
        (tp.TPV(), tp.TPV(reference=built("mlp").model)),
        (tp.JBR(confidence=0.3), tp.JBR(confidence=0.5)),
        (tp.Jacobian(over="all"), tp.Jacobian(over="consume")),
        (tp.TPV(perturbation=tp.Rounding(4)), tp.TPV(perturbation=tp.Rounding(8))),
        (tp.Fisher(), tp.Fisher(seed=1)),
        (tp.L1(), tp.TPV()),
    ],
    ids=[
        "seed",
        "probes",
        "head",
        "over",
        "engine",
        "criterion",
        "reference",
        "confidence",
        "members",
        "bits",
        "signs",
        "l1",
    ],
)
@pytest.mark.parametrize("how", ["start", "save"])
def test_scores_made_otherwise_are_refused(made: Any, asked: Any, how: str, tmp_path) -> None:
    model, graph = counted()
    first = tp.score(model, data(3), graph, made)
    first.save(tmp_path / "s")
    given: dict[str, Any] = {"start": first} if how == "start" else {"save": tmp_path / "s"}
    model.calls = 0
    with pytest.raises(tp.PlanError, match="score anew"):
        tp.score(model, data(), graph, asked, **given)
    assert model.calls == 0


def test_the_same_settings_in_other_words_are_not_refused() -> None:
    model, graph = counted()
    first = tp.score(model, data(3), graph, tp.TPV())
    whole = tp.score(model, data(), graph, tp.TPV())
    for same in (tp.TPV(head=tp.Softmax()), tp.TPV(engine="activations"), tp.TPV(sensitivities=1280)):
        assert_same(tp.score(model, data()[3:], graph, same, start=first), whole)


def test_scores_of_other_weights_are_refused(tmp_path) -> None:
    model, graph = counted()
    first = tp.score(model, data(3), graph, save=tmp_path / "s")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter *= 1.001
    for given in ({"start": first}, {"save": tmp_path / "s"}):
        with pytest.raises(tp.PlanError, match="other weights; score anew"):
            tp.score(tuned, data(), graph, **given)


def test_start_and_save_together_are_refused(tmp_path) -> None:
    model, graph = counted()
    first = tp.score(model, data(3), graph)
    with pytest.raises(tp.InputError, match="not both"):
        tp.score(model, data(), graph, start=first, save=tmp_path / "s")


def test_what_is_no_scores_file_is_refused(tmp_path) -> None:
    model, graph = counted()
    (tmp_path / "s").write_text("my thesis")
    with pytest.raises(tp.PlanError, match="no scores file"):
        tp.score(model, data(), graph, save=tmp_path / "s")
    assert (tmp_path / "s").read_text() == "my thesis"


def test_criteria_that_do_not_stream_are_refused(tmp_path) -> None:
    model, graph = counted()
    for given in ({"start": tp.score(model, data(3), graph)}, {"until": tp.Settled()}):
        with pytest.raises(tp.InputError, match="L1 does not learn from batches"):
            tp.score(model, data(), graph, tp.L1(), **given)


def test_criteria_that_do_not_stream_are_saved_at_the_end(tmp_path) -> None:
    model, graph = counted()
    for _ in range(2):
        scores = tp.score(model, data(3), graph, tp.L1(), save=tmp_path / "s")
        assert_scores_close(tp.Scores.load(tmp_path / "s").values, scores.values, 1e-12)
    tp.score(model, data(3), graph, save=tmp_path / "t")
    with pytest.raises(tp.PlanError, match="holds scores of another model or of tpv"):
        tp.score(model, data(3), graph, tp.L1(), save=tmp_path / "t")
    assert tp.Scores.load(tmp_path / "t").criterion.startswith("tpv")
    (tmp_path / "s").write_text("my thesis")
    with pytest.raises(tp.PlanError, match="no scores file"):
        tp.score(model, data(3), graph, tp.L1(), save=tmp_path / "s")
    assert (tmp_path / "s").read_text() == "my thesis"


@pytest.mark.parametrize("numbers", [(2**25, 2**25 + 1), (1.0, 1.0 + 2**-40)], ids=str)
def test_scores_of_other_weights_are_not_added_to_however_small_the_difference(numbers, tmp_path) -> None:
    model, graph = counted()
    model.register_buffer("more", torch.tensor([numbers[0]] * 2).to(torch.int64 if numbers[0] > 1 else torch.float64))
    graph = tp.trace(model, data(1)[0][0])
    tp.score(model, data(3), graph, save=tmp_path / "s")
    model.more[1] = numbers[1]
    with pytest.raises(tp.PlanError, match="other weights"):
        tp.score(model, data(), graph, save=tmp_path / "s")


def test_no_batch_at_all_is_refused(tmp_path) -> None:
    model, graph = counted()
    with pytest.raises(tp.DataError, match="no batch"):
        tp.score(model, [], graph, save=tmp_path / "s")
    first = tp.score(model, data(3), graph)
    assert_same(tp.score(model, [], graph, start=first), first)  # there is something to give


# The manifest


def digest(batches: list[Any]) -> str:
    model, graph = counted()
    return tp.score(model, batches, graph).manifest["data"]


def test_the_manifest_says_what_was_scored() -> None:
    model, graph = counted()
    manifest = tp.score(model, data(), graph, tp.JBR(confidence=0.3)).manifest
    assert manifest["batches"] == 5
    assert manifest["processes"] == 1
    assert manifest["versions"]["tpvprune"] == tp.__version__
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert manifest["settings"] == {"confidence": 0.3, "reference": None, "output": None}


@pytest.mark.parametrize("change", OTHER)
def test_the_digest_changes_with_content_and_order(change: str) -> None:
    if change != "no batch":
        assert digest(OTHER[change](data(4))) != digest(data(4))


def test_the_digest_is_of_inputs_alone() -> None:
    plain = [x for x, _ in data()]
    same = [
        plain,
        [x.clone() for x in plain],
        [(x, y + 1) for x, y in data()],
        [{"image": x, "name": "a"} for x in plain],
        [x.t().contiguous().t() for x in plain],  # another layout in memory
    ]
    assert len({digest(batches) for batches in same}) == 1


def test_the_digest_looks_at_every_sample_of_large_inputs() -> None:
    large = torch.randn(3, 5000)
    model = nn.Sequential(nn.Linear(5000, 4), nn.ReLU(), nn.Linear(4, 3))
    graph = tp.trace(model, large)
    found = {tp.score(model, [large], graph).manifest["data"]}
    for sample in range(3):
        other = large.clone()
        other[sample] += 0.01
        found.add(tp.score(model, [other], graph).manifest["data"])
    assert len(found) == 4
