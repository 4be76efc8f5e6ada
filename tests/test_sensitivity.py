"""Curves of single groups: predictions against dense Jacobians, measurements against brute-force cuts, going on."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import reference, tolerances
from tests.helpers import assert_same_state, built, outputs
from tpvprune import groupwise
from tpvprune.errors import InputError

ROUNDED = 1e-5
"""Relative: sensitivities are kept in float32, and a plan's drift is a sum of products of them."""

SHARES = (0.8, 0.5, 0.3)
EXACT_KL = tp.TPV(probes="exact")


def curves_of(name: str, **kwargs: object) -> tp.SensitivityCurves:
    b = built(name)
    scores = tp.score(b.model, [b.inputs], b.graph, EXACT_KL)
    return tp.sensitivity(b.model, [b.inputs], b.graph, scores, SHARES, **kwargs)


@pytest.mark.parametrize("name", ["mlp", "residual", "grouped", "vit"])
def test_predictions_are_half_the_tpv_of_dense_jacobians(name: str) -> None:
    b = built(name)
    alone = reference.tpv(b.model, b.inputs, b.graph, "softmax", "consume")
    found = curves_of(name)
    assert [curve.group for curve in found.curves] == [group.id for group in b.graph.groups]
    for curve in found.curves:
        values = alone[curve.group][list(curve.order)]
        assert bool((values[:-1] <= values[1:] * (1 + ROUNDED)).all()), "least important first"
        assert sorted(curve.order) == list(range(curve.units))
        for point in curve.points:
            gone = list(curve.gone(point.kept))
            if not gone:
                assert point.predicted_kl == 0
                continue
            wanted = reference.plan_tpv(b.model, b.inputs, b.graph, {curve.group: gone}, "softmax") / 2
            assert point.predicted_kl == pytest.approx(wanted, rel=ROUNDED, abs=1e-12)


@pytest.mark.parametrize("name", ["mlp", "residual", "grouped", "vit"])
def test_units_kept_and_savings(name: str) -> None:
    b = built(name)
    for curve in curves_of(name).curves:
        least = 2 if any(m.width() > 1 for m in b.graph[curve.group].members) and curve.kind == "channel" else 1
        assert [p.share for p in curve.points] == list(SHARES)
        for point in curve.points:
            assert point.kept == max(least, math.ceil(point.share * curve.units))
            keep = {curve.group: curve.keep(point.kept)}
            assert int(keep[curve.group].sum()) == point.kept
            assert point.macs_saved == pytest.approx(1 - b.graph.macs(keep) / b.graph.macs(), abs=1e-12)
            assert point.params_saved == pytest.approx(1 - b.graph.params(keep) / b.graph.params(), abs=1e-12)


def made_by_hand(graph: tp.Graph, rows: Tensor, samples: int) -> tp.Scores:
    """Scores of sensitivities in float64, and nothing else."""
    spans = [group.units for group in graph.groups]
    values = rows.square().sum(0) / samples
    held = tp.Sensitivities(
        tuple((g.id, g.units) for g in graph.groups), rows, torch.zeros(sum(spans), dtype=torch.float64), samples
    )
    by_group = dict(zip((g.id for g in graph.groups), values.split(spans), strict=True))
    label = "tpv(head=softmax, over=consume)"
    return tp.Scores(by_group, None, label, samples, 1, 0, graph.model_id, sensitivities=held)


def test_predictions_and_their_errors_are_exact_in_float64(mlp) -> None:
    samples = 6
    rows = torch.randn(samples, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = tp.sensitivity(mlp.model, (), mlp.graph, made_by_hand(mlp.graph, rows, samples), SHARES)
    for curve, start in zip(found.curves, (0, 8), strict=True):
        for point in curve.points:
            alone = (rows.numpy() ** 2).sum(0)[start : start + curve.units]
            gone = np.argsort(alone)[: curve.units - point.kept] + start
            each = rows.numpy()[:, gone].sum(1) ** 2 / 2
            assert point.predicted_kl == pytest.approx(each.mean(), rel=tolerances.EXACT)
            assert point.stderr == pytest.approx(each.std(ddof=1) / samples**0.5, rel=tolerances.EXACT)


def test_where_effects_do_not_mix_less_is_always_worse(mlp) -> None:
    # A row a unit: no two units move the outputs of the same sample, so nothing cancels.
    rows = torch.diag(1 + torch.rand(15, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    shares = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    found = tp.sensitivity(mlp.model, (), mlp.graph, made_by_hand(mlp.graph, rows, 15), shares)
    for curve in found.curves:
        told = [point.predicted_kl for point in curve.points]
        kept = [point.kept for point in curve.points]
        assert kept == sorted(kept, reverse=True)
        assert all(a < b if m > n else a == b for a, b, m, n in zip(told, told[1:], kept, kept[1:], strict=False))


def kl(dense: Tensor, cut: Tensor) -> float:
    p, q = (torch.softmax(value, 1).numpy() for value in (dense, cut))
    return float((p * np.log(p / q)).sum(1).mean())


@pytest.mark.parametrize("name", ["mlp", "residual", "grouped", "layernorm_stream"])
def test_measured_kl_is_that_of_a_cut_by_hand(name: str) -> None:
    b = built(name)
    held = [b.inputs[:2] * 1.3, b.inputs[2:] - 0.2]
    before = copy.deepcopy(b.model.state_dict())
    found = curves_of(name, held_out=held)
    assert_same_state(b.model.state_dict(), before)
    assert found.measured_images == len(b.inputs)
    every = torch.cat(held)
    for curve in found.curves:
        for point in curve.points:
            gone = {curve.group: list(curve.gone(point.kept))}
            if b.graph[curve.group].exact_mask:
                cut = reference.zeroed(b.model, b.graph, gone)
            else:
                cut = tp.apply(b.model, tp.Plan({curve.group: curve.keep(point.kept)}, b.graph))
            wanted = kl(outputs(b.model, every), outputs(cut, every))
            assert point.measured_kl == pytest.approx(wanted, rel=tolerances.EXACT, abs=1e-14)


def point(share: float, predicted: float, macs: float, params: float = 0.1) -> tp.SensitivityPoint:
    return tp.SensitivityPoint(share, 1, macs, params, predicted, None)


def by_hand(*groups: tuple[str, list[tp.SensitivityPoint]]) -> tp.SensitivityCurves:
    curves = tuple(tp.SensitivityCurve(name, "channel", 2, (0, 1), tuple(points)) for name, points in groups)
    return tp.SensitivityCurves("id", (0.75, 0.25), curves, {"fc": "its outputs are the model's outputs"}, 4)


def test_ranking_is_by_predicted_kl_for_what_is_saved_at_the_named_share() -> None:
    found = by_hand(
        ("dear", [point(0.75, 0.2, 0.1), point(0.25, 0.4, 0.4)]),  # 2 and 1 for each MAC
        ("cheap", [point(0.75, 0.3, 0.3), point(0.25, 0.9, 0.6, 0.9)]),  # 1 and 1.5; 1 for each parameter
        ("idle", [point(0.75, 0.0, 0.0), point(0.25, 0.0, 0.0)]),
    )
    assert [c.group for c in found.ranked(0.75)] == ["cheap", "dear", "idle"]
    assert [c.group for c in found.ranked(0.25)] == ["dear", "cheap", "idle"]
    assert [c.group for c in found.ranked(0.25, per="params")] == ["idle", "cheap", "dear"]
    assert [c.group for c in found.ranked()] == ["cheap", "dear", "idle"]
    assert found["cheap"].at(0.25).price("params") == pytest.approx(1.0)
    assert found["idle"].at(0.25).price() is None
    with pytest.raises(InputError, match=r"no point at a share of 0.5; there are points at 0.75, 0.25"):
        found.ranked(0.5)
    with pytest.raises(tp.PlanError, match=r"no curve of group 'fc'; there are dear, cheap, idle"):
        found["fc"]


def test_the_usual_share_is_the_one_nearest_to_half() -> None:
    assert by_hand().usual_share == 0.75
    assert replace(by_hand(), shares=(0.9, 0.55, 0.2)).usual_share == 0.55


def test_ratios_are_medians_over_groups_that_were_measured() -> None:
    found = by_hand(
        ("a", [replace(point(0.75, 0.1, 1), measured_kl=0.2), point(0.25, 0.1, 1)]),
        ("b", [replace(point(0.75, 0.1, 1), measured_kl=0.4), point(0.25, 0.1, 1)]),
        ("c", [replace(point(0.75, 0.0, 1), measured_kl=0.0), point(0.25, 0.1, 1)]),
    )
    assert found.ratios() == pytest.approx({0.75: 3.0})


@pytest.mark.parametrize("name", ["split", "shared", "input_residual"])
def test_what_cannot_be_pruned_has_a_reason_and_no_curve(name: str) -> None:
    b, found = built(name), curves_of(name)
    assert found.unprunable == b.graph.skipped
    assert not set(found.unprunable) & {curve.group for curve in found.curves}
    for layer in b.case.skipped:
        assert layer in found.unprunable
        with pytest.raises(tp.PlanError, match="no curve of group"):
            found[layer]


def test_without_scores_it_scores_by_itself(mlp) -> None:
    stages = []
    found = tp.sensitivity(mlp.model, [mlp.inputs], mlp.graph, progress=lambda s, done, total: stages.append(s))
    scores = tp.score(mlp.model, [mlp.inputs], mlp.graph)
    again = tp.sensitivity(mlp.model, (), mlp.graph, scores)
    assert set(stages) == {"score"}
    assert found == again
    assert found.shares == (0.9, 0.75, 0.5, 0.25)
    assert all(p.measured_kl is None for curve in found.curves for p in curve.points)


class Counted:
    """`compare`, and which cuts it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuts: list[int] = []
        compare = groupwise.compare

        def counting(models, *args, **kwargs):
            self.cuts.append(len(models))
            return compare(models, *args, **kwargs)

        monkeypatch.setattr(groupwise, "compare", counting)

    def taken(self) -> int:
        cuts, self.cuts = sum(self.cuts), []
        return cuts


def test_a_stopped_measuring_goes_on_and_nothing_is_measured_twice(mlp, tmp_path: Path, monkeypatch) -> None:
    path, held = tmp_path / "sensitivity.json", [mlp.inputs[:2], mlp.inputs[2:]]
    counted = Counted(monkeypatch)
    whole = curves_of("mlp", held_out=held)
    assert counted.taken() == 6

    def stop(stage: str, done: int, total: int | None) -> None:
        assert (stage, total) == ("measure", 4)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curves_of("mlp", held_out=held, save=path, progress=stop)
    half = tp.SensitivityCurves.load(path)
    assert [c.points[0].measured_kl is None for c in half.curves] == [False, True]
    counted.taken()
    assert curves_of("mlp", held_out=held, save=path) == whole
    assert counted.taken() == 3
    assert tp.SensitivityCurves.load(path) == whole
    assert curves_of("mlp", held_out=held, save=path) == whole
    assert counted.taken() == 0

    assert curves_of("mlp", save=path) == whole, "what was measured is not lost where nothing is measured"
    b = built("mlp")
    scores = tp.score(b.model, [b.inputs], b.graph, EXACT_KL)
    other = tp.sensitivity(b.model, (), b.graph, scores, (0.6, 0.5), held, save=path)
    assert counted.taken() == 2, "one new share for each of two groups"
    assert [c.at(0.5) for c in other.curves] == [c.at(0.5) for c in whole.curves]
    again = curves_of("mlp", held_out=held, save=path)
    assert counted.taken() == 0
    assert [c.points for c in again.curves] == [c.points for c in whole.curves]


def test_other_weights_images_or_units_are_measured_again(mlp, tmp_path: Path, monkeypatch) -> None:
    path, held = tmp_path / "sensitivity.json", [mlp.inputs]
    counted = Counted(monkeypatch)
    curves_of("mlp", held_out=held, save=path)
    counted.taken()
    moved = curves_of("mlp", held_out=[mlp.inputs + 0.1], save=path)
    assert counted.taken() == 6
    assert moved == curves_of("mlp", held_out=[mlp.inputs + 0.1])
    counted.taken()
    model = copy.deepcopy(mlp.model)
    with torch.no_grad():
        model[0].bias.add_(0.1)
    scores = tp.score(mlp.model, [mlp.inputs], mlp.graph, EXACT_KL)
    tp.sensitivity(model, (), mlp.graph, scores, SHARES, [mlp.inputs + 0.1], save=path)
    assert counted.taken() == 6
    flipped = replace(scores, values={name: -value for name, value in scores.values.items()})
    tp.sensitivity(model, (), mlp.graph, flipped, SHARES, [mlp.inputs + 0.1], save=path)
    assert counted.taken() == 6


def test_a_group_that_keeps_all_of_its_units_is_not_run(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    graph = tp.trace(model, inputs[:1])
    counted = Counted(monkeypatch)
    found = tp.sensitivity(model, [inputs], graph, shares=(0.9, 0.6, 0.5), held_out=[inputs])
    assert [(p.kept, p.measured_kl == 0) for p in found["0"].points] == [(2, True), (2, True), (1, False)]
    assert counted.taken() == 1
    assert found.ranked(0.9)[-1].at(0.9).price() is None


def test_curves_are_json_and_back(tmp_path: Path) -> None:
    found = curves_of("residual", held_out=[built("residual").inputs])
    found.save(tmp_path / "curves.json")
    told = json.loads((tmp_path / "curves.json").read_text())
    assert told["format"] == 1
    assert tp.SensitivityCurves.load(tmp_path / "curves.json") == found
    assert json.dumps(found.to_json(), allow_nan=False) == json.dumps(told)
    one = tp.sensitivity(
        built("mlp").model, [built("mlp").inputs[:1]], built("mlp").graph, shares=(0.5,)
    )  # one sample has no spread
    assert all(p.stderr is None for curve in one.curves for p in curve.points)
    json.dumps(one.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("{}", "format None"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1}', "incomplete"),
        ("no", "is no sensitivity"),
    ],
)
def test_a_file_that_is_something_else_is_left_alone(mlp, tmp_path: Path, text: str, phrase: str) -> None:
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(tp.PlanError, match=phrase):
        curves_of("mlp", save=path)
    assert path.read_text() == text


def test_bad_input_is_named(mlp) -> None:
    scores = tp.score(mlp.model, [mlp.inputs], mlp.graph)
    for share in (0.0, 1.0, 1.5, -0.1):
        with pytest.raises(InputError, match=f"a share of {share:g} is not between 0 and 1"):
            tp.sensitivity(mlp.model, (), mlp.graph, scores, (0.5, share))
    with pytest.raises(InputError, match="there is no share"):
        tp.sensitivity(mlp.model, (), mlp.graph, scores, ())
    with pytest.raises(tp.DataError, match="no batch to measure on"):
        tp.sensitivity(mlp.model, (), mlp.graph, scores, held_out=[])
    with pytest.raises(tp.DataError, match="can be read once only"):
        tp.sensitivity(mlp.model, (), mlp.graph, scores, held_out=iter([mlp.inputs]))
    with pytest.raises(tp.DataError, match="there is no batch"):
        tp.sensitivity(mlp.model, [], mlp.graph)
    with pytest.raises(tp.PlanError, match="traced from another"):
        tp.sensitivity(built("residual").model, (), mlp.graph, scores)
    with pytest.raises(tp.PlanError, match="score again"):
        tp.sensitivity(mlp.model, (), mlp.graph, replace(scores, model_id="other"))


@pytest.mark.parametrize(
    "criterion", [tp.TPV(sensitivities=0), tp.TPV(compensated=True), tp.TPV(head="logits"), tp.L1()]
)
def test_scores_that_predict_no_kl_are_refused(mlp, criterion) -> None:
    scores = tp.score(mlp.model, [mlp.inputs], mlp.graph, criterion)
    with pytest.raises(tp.PlanError, match=r"curves are drawn from scores in nats .* score with TPV\(\)"):
        tp.sensitivity(mlp.model, (), mlp.graph, scores)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.logits, self.map = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.hidden(x).tanh()
        return {"logits": self.logits(x), "map": self.map(x).reshape(len(x), 2, 3)}


def test_one_of_several_outputs_is_named() -> None:
    torch.manual_seed(0)
    model, inputs = TwoOutputs().double(), torch.randn(6, 5, dtype=torch.float64)
    graph = tp.trace(model, inputs[:1])
    found = tp.sensitivity(model, [inputs], graph, shares=(0.5,), held_out=[inputs], output="logits")
    curve = found["hidden"]
    cut = reference.zeroed(model, graph, {"hidden": list(curve.gone(3))})
    wanted = kl(outputs(model, inputs)["logits"], outputs(cut, inputs)["logits"])
    assert curve.points[0].measured_kl == pytest.approx(wanted, rel=tolerances.EXACT)
    scores = tp.score(model, [inputs], graph, tp.TPV(output="logits"))
    with pytest.raises(tp.ModelError, match=r"outputs \(batch, classes\)"):
        tp.sensitivity(model, (), graph, scores, (0.5,), [inputs], output="map")


def test_models_without_a_group_are_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(tp.PlanError, match=r"nothing of this model can be pruned.*its outputs are the model's outputs"):
        tp.sensitivity(model, [torch.randn(2, 3)], tp.trace(model, torch.zeros(1, 3)))
    with pytest.raises(tp.PlanError, match="single weights"):
        tp.sensitivity(built("mlp").model, [built("mlp").inputs], tp.weight_graph(built("mlp").model))
