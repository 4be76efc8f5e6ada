"""The same numbers on a CUDA device as on the CPU. Off by default: `python -m pytest -m gpu`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensor

import tpvprune as tp
from tests.helpers import Built
from tpvprune.plan import plan_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch: the first product of a backward thread
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
    mine = tp.refine(mine, batches, residual.model, tp.GaussNewton(steps=1, iterations=3))
    theirs = tp.refine(theirs, batches, there, tp.GaussNewton(steps=1, iterations=3))
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-8, msg=name)


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


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "batched"},
        {"engine": "per_sample"},
        {"engine": "factored"},
        {"compensated": True},
        {"compensated": "1:2"},
    ],
)
def test_scores_of_weights_agree_with_the_cpu(residual: Built, settings: dict[str, Any]):
    there = copy.deepcopy(residual.model).cuda()
    weights = tp.weight_graph(residual.model)
    criterion = tp.TPV(probes=2, **settings)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_runs_on_sparse_tensor_cores(dtype: torch.dtype):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no sparse tensor cores on this device")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    graph = tp.weight_graph(model)
    plan = tp.sparsify(tp.score(model, [], graph, tp.L1()), graph, pattern="2:4", protect=["4"])
    masked = tp.apply(model, plan).to("cuda", dtype)
    fast = tp.to_semi_structured(masked)
    inputs = torch.randn(64, 128, device="cuda", dtype=dtype)
    with torch.no_grad():
        wanted, got = masked(inputs).float(), fast(inputs).float()
    assert float((got - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    for name in ("0", "2"):
        sparse, dense = fast.get_submodule(name).weight, masked.get_submodule(name).weight
        assert isinstance(sparse, SparseSemiStructuredTensor)
        assert torch.equal(sparse.to_dense(), dense)
    assert type(fast[4].weight) is nn.Parameter  # 10 rows are no multiple, and it is dense
    assert plan_of(fast) is None
    assert plan_of(masked) is not None
    with pytest.raises(tp.CheckpointError, match="carries no plan"):
        tp.save(fast, "nowhere")
    with pytest.raises(tp.PlanError, match="0: not 2:4"):
        tp.to_semi_structured(model.to("cuda", dtype))


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_masks_are_made_and_held_on_the_device(residual: Built, optimizer: str):
    there = copy.deepcopy(residual.model).float().cuda()
    inputs = residual.inputs.float()
    graph = tp.weight_graph(there)
    plan = tp.sparsify(tp.score(there, [inputs], graph, tp.TPV()), graph, 0.6)
    masked = tp.apply(there, plan)
    refitted = tp.reconstruct(masked, [inputs], there)
    for model in (masked, tp.mask(there, plan), refitted):
        assert sum(int((p == 0).sum()) for p in model.parameters()) == plan.zeros
    for precision in ("no", "fp16", "bf16"):
        how = tp.Finetune(epochs=3, lr=1e-2, optimizer=optimizer, precision=precision)
        found = tp.finetune(masked, [inputs], there, how)
        assert sum(int((p == 0).sum()) for p in found.parameters()) == plan.zeros
