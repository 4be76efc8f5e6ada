"""Autocast and memory layouts change the numbers no more than rounding does."""

from __future__ import annotations

import copy

import pytest
import torch

import tpvprune as tp
from tests import tolerances
from tests.helpers import assert_scores_close, built
from tpvprune.scoring import taps

ENGINES = ("auto", "batched", "per_sample")


def test_channels_last_gives_the_same_scores(residual):
    model = copy.deepcopy(residual.model).to(memory_format=torch.channels_last)
    inputs = residual.inputs.contiguous(memory_format=torch.channels_last)
    tpv = tp.TPV(probes=2), tp.TPV(over="all"), tp.TPV(compensated=True)
    for criterion in (*tpv, tp.Variance(), tp.JBR(confidence=0.0)):
        here = tp.score(residual.model, [residual.inputs], residual.graph, criterion)
        there = tp.score(model, [inputs], residual.graph, criterion)
        assert_scores_close(there.values, here.values, tolerances.EXACT)


@pytest.mark.parametrize("entries", [1, 7, 50, 10**9])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_products_are_summed_the_same_in_pieces(entries: int, layout: torch.memory_format, monkeypatch):
    monkeypatch.setattr(taps, "IN_CACHE", entries)
    generator = torch.Generator().manual_seed(0)
    value, grad = (torch.randn(6, 5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = torch.einsum("bchw,bchw->bc", value, grad)
    found = taps._reduce("x", value.contiguous(memory_format=layout), grad.contiguous(memory_format=layout), 1, 3)
    torch.testing.assert_close(found, wanted.reshape(3, 2, 5).sum(1))
    rows, slopes = value.flatten(1, 2), grad.flatten(1, 2)
    found = taps._reduce("x", rows, slopes, -1, 6)
    torch.testing.assert_close(found, (rows * slopes).sum(1))


@pytest.mark.parametrize("name", ["conv_bn", "vit"])
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_stays_close(name: str, engine: str):
    b = built(name)
    model, inputs = copy.deepcopy(b.model).float(), b.inputs.float()
    graph = b.graph if engine == "auto" else tp.weight_graph(model)
    criterion = tp.TPV(probes="exact", engine=engine)
    exact = tp.score(model, [inputs], graph, criterion)
    with torch.autocast("cpu", torch.bfloat16):
        rough = tp.score(model, [inputs], graph, criterion)
    for group, value in exact.values.items():
        assert rough.values[group].dtype == value.dtype
        # bfloat16 holds three decimal digits, and a few layers lie between.
        assert float((rough.values[group] - value).abs().max()) < 0.2 * float(value.max()), group


def test_half_precision_products_do_not_overflow():
    value = torch.full((1, 2, 300), 60.0, dtype=torch.float16)
    found = taps._reduce("x", value, value, 1, 1)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((1, 2), 60.0**2 * 300))
