"""Real weights and real images, where they lie beside the checkout. Slow: `python -m pytest -m slow`."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

import tpvprune as tp
from tpvprune.report import compare
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "imagenet-600.tar").is_file(), reason="no ../shared/data beside this checkout"),
]


def test_efficientnet_lite0_from_unlabeled_imagenet_images(tmp_path):
    with tarfile.open(DATA / "imagenet-600.tar") as archive:
        members = [m for m in archive.getmembers() if m.isfile()][::10]
        archive.extractall(tmp_path, members=members, filter="data")
    model = create_model("tf_efficientnet_lite0", DATA / "tf_efficientnet_lite0.safetensors")
    pool = open_pool(tmp_path, model, labels=DATA / "imagenet_synsets.txt")
    assert len(pool) == 60
    scored, measured = (list(half.loader(15)) for half in pool.split())
    done = tp.prune(model, scored, tp.Budget(macs=0.85), held_out=measured)
    assert done.report.got["share"] <= 0.85
    assert done.report.before.metrics["top1"] > 0.7, "the preprocessing is not the one the weights were trained with"
    assert done.report.recovered is not None
    assert done.report.recovered.metrics["kl"] < done.report.pruned.metrics["kl"]
    tp.save(done.model, tmp_path / "out")
    again = tp.load(tmp_path / "out")
    assert compare({"again": again}, done.model, measured)[0]["again"]["kl"] == pytest.approx(0, abs=1e-9)
