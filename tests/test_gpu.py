"""The same numbers on a CUDA device as on the CPU. Off by default: `python -m pytest -m gpu`."""

from __future__ import annotations

import copy

import pytest
import torch

import tpvprune as tp
from tests.helpers import Built

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_scores_plan_and_reconstruction_agree_with_the_cpu(residual: Built):
    # Float64 cases: the devices differ in the order of their sums only.
    there = copy.deepcopy(residual.model).cuda()
    batches = [residual.inputs]
    graph = tp.trace(there, residual.inputs[:1].cuda())
    assert graph.to_json() == residual.graph.to_json()
    for criterion in (
        tp.TPV(),
        tp.TPV(probes="exact", over="all"),
        tp.TPV(compensated=True),
        tp.TPV(head="margin", probes=2),
        tp.TPV(engine="batched", perturbation=tp.Rounding(4)),
        tp.JBR(confidence=0.0),
        tp.Variance(),
        tp.Wanda(),
        tp.FPGM(),
    ):
        here = tp.score(residual.model, batches, residual.graph, criterion)
        other = tp.score(there, batches, graph, criterion)
        for name, value in here.values.items():
            torch.testing.assert_close(other.values[name].cpu(), value, rtol=1e-8, atol=1e-13)
    here = tp.score(residual.model, batches, residual.graph)
    plan = tp.allocate(here, residual.graph, tp.Budget(macs=0.6, round_to=1))
    mine = tp.reconstruct(tp.apply(residual.model, plan), batches, residual.model)
    theirs = tp.reconstruct(tp.apply(there, plan), batches, there)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=1e-9, msg=name)


def test_scoring_under_autocast_stays_close(residual: Built):
    there = copy.deepcopy(residual.model).float().cuda()
    inputs = residual.inputs.float()
    graph = tp.trace(there, inputs[:1].cuda())
    exact = tp.score(there, [inputs], graph, tp.TPV(probes="exact"))
    with torch.autocast("cuda", torch.bfloat16):
        rough = tp.score(there, [inputs], graph, tp.TPV(probes="exact"))
    for name, value in exact.values.items():
        rank = torch.corrcoef(torch.stack([value, rough.values[name]]))[0, 1]
        assert rank > 0.98, name


@pytest.mark.parametrize("engine", ["batched", "per_sample", "factored"])
def test_scores_of_weights_agree_with_the_cpu(residual: Built, engine: str):
    there = copy.deepcopy(residual.model).cuda()
    weights = tp.weight_graph(residual.model)
    criterion = tp.TPV(engine=engine, probes=2)
    here = tp.score(residual.model, [residual.inputs], weights, criterion)
    other = tp.score(there, [residual.inputs], weights, criterion)
    for name, value in here.values.items():
        torch.testing.assert_close(other.values[name].cpu(), value.cpu(), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_channels_last_and_autocast_together_stay_close(residual: Built, dtype: torch.dtype):
    there = copy.deepcopy(residual.model).float().cuda().to(memory_format=torch.channels_last)
    inputs = residual.inputs.float().contiguous(memory_format=torch.channels_last)
    exact = tp.score(there, [inputs], residual.graph, tp.TPV(probes="exact"))
    with torch.autocast("cuda", dtype):
        rough = tp.score(there, [inputs], residual.graph, tp.TPV(probes="exact"))
    for name, value in exact.values.items():
        assert float((rough.values[name] - value).abs().max()) < 0.2 * float(value.max()), name
