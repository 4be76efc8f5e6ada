"""Train against held-out TPV over settings, on linear models that have closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tpvprune import analysis


def make(width: int, samples: int):
    model = randomise(nn.Linear(width, 1, bias=False), width)
    return model, example(samples, width, seed=1).split(1), (2 * example(80, width, seed=2)).split(1)


@pytest.fixture(scope="module")
def told():
    seen = []
    found = analysis.stability(
        make,
        analysis.grid(width=(1, 4, 16), samples=(10, 80)),
        [lambda s: s.perturbed("noise", tp.Isotropic(0.1)), lambda s: s.labels(analysis.LabelNoise(sigma=0.1))],
        head="logits",
        rtol=None,
        forms=("trace",),
        progress=lambda *tell: seen.append(tell),
    )
    return found, seen


def test_points_are_those_of_closed_forms(told) -> None:
    found, seen = told
    assert [p.setting["width"] for p in found.points] == [1, 1, 4, 4, 16, 16]
    assert seen == [("stability", n, 6) for n in range(1, 7)]
    for point in found.points:
        _, train, test = make(**point.setting)
        x, new = torch.cat(train), torch.cat(test)
        noise, label = point.findings
        assert noise.train.value == pytest.approx(0.01 * float(x.square().sum(1).mean()), rel=tolerances.EXACT)
        assert noise.test.value == pytest.approx(0.01 * float(new.square().sum(1).mean()), rel=tolerances.EXACT)
        through = (new @ torch.linalg.pinv(x)).square().sum(1)
        assert label.form == "closed"
        assert label.test.value == pytest.approx(0.01 * float(through.mean()), rel=tolerances.EXACT)
        rank = min(point.setting["width"], point.setting["samples"])
        assert label.train.value == pytest.approx(0.01 * rank / len(x), rel=tolerances.EXACT)


def test_distance_from_the_diagonal(told) -> None:
    found, _ = told
    wide = found.where(samples=80)
    logs = [math.log(f.train.value / f.test.value) for f in wide.of("noise", "trace")]
    wanted = math.exp(math.sqrt(sum(x * x for x in logs) / 3))
    assert wide.off_diagonal("noise", "trace") == pytest.approx(wanted, rel=tolerances.EXACT)
    assert wanted == pytest.approx(4.0, rel=0.25)  # held-out inputs are twice as large
    assert wide.rank_correlation("noise", "trace") == pytest.approx(1.0)
    assert len(found.where(width=4).points) == 2
    json.dumps(found.to_json())


def test_the_default_is_noise_on_every_weight_in_both_forms() -> None:
    found = analysis.stability(make, [{"width": 4, "samples": 20}], head="logits", draws=3, rtol=None)
    assert [f.form for f in found.points[0].findings] == ["trace", "empirical"]


def test_errors_name_what_is_wrong(told) -> None:
    found, _ = told
    with pytest.raises(tp.InputError, match="there is no setting"):
        analysis.stability(make, [])
    with pytest.raises(tp.InputError, match="no point has width=3"):
        found.where(width=3)
    with pytest.raises(tp.InputError, match=r"there is no sgd \(trace\); there are"):
        found.of("sgd", "trace")
    with pytest.raises(tp.InputError, match="must be some of trace, empirical"):
        analysis.stability(make, [{"width": 4, "samples": 20}], forms=("exact",))
