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


def narrow(kind: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network in half precision, and the same weights in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = zip((5, 8, 8), (8, 8, 4), strict=True)
        layers = [layer for size in sizes for layer in (torch.nn.Linear(*size), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers[:-1]).to(kind)
    return model, copy.deepcopy(model).double()


@pytest.mark.parametrize("units", ["channels", "weights"])
@pytest.mark.parametrize(
    "criterion", [tp.TPV(engine="batched"), tp.JBR(confidence=0.0), tp.Fisher()], ids=lambda c: c.label
)
def test_sums_of_many_batches_do_not_stand_still_in_half_precision(criterion, units: str):
    model, whole = narrow(torch.bfloat16)
    graph = tp.weight_graph(model) if units == "weights" else tp.trace(whole, torch.zeros(1, 5, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(800, 2, 5, generator=generator).bfloat16()
    labels = torch.randint(4, (800, 2), generator=generator)
    half, full = (
        tp.score(net, list(zip(inputs.to(net[0].weight.dtype), labels, strict=True)), graph, criterion)
        for net in (model, whole)
    )
    found, wanted = (torch.cat([one.values[name].double() for name in full.values]) for one in (half, full))
    # A pass in bfloat16 errs by some of its eps, 0.8 %, at random; a sum in it loses several percent after 800 batches.
    assert abs(float((found / wanted).median()) - 1) < 2 * torch.finfo(torch.bfloat16).eps
    kind = torch.float32 if units == "weights" else torch.float64
    assert {value.dtype for value in (*half.values.values(), *half.stderr.values())} == {kind}


@pytest.mark.parametrize("engine", ["batched", "per_sample"])
def test_small_variances_are_not_lost_in_half_precision(engine: str):
    model, whole = narrow(torch.float16)
    graph = tp.trace(whole, torch.zeros(1, 5, dtype=torch.float64))
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(2)).half()
    for perturbation in (tp.Rounding(8), tp.Isotropic(1e-4)):
        criterion = tp.TPV(perturbation=perturbation, engine=engine)
        half, full = (tp.score(net, [inputs.to(net[0].weight.dtype)], graph, criterion) for net in (model, whole))
        for name, value in full.values.items():
            assert float(value.min()) > 0
            # Slopes in half precision err by its eps, 0.1 %, a few layers in a row.
            torch.testing.assert_close(half.values[name], value, rtol=0.02, atol=0.02 * float(value.max()))
            assert float(half.values[name].min()) > 0
