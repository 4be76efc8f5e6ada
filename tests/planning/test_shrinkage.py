"""How much of the covariances a joint plan believes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tpvprune as tp
from tpvprune.planning.joint import estimated_shrinkage


def sensitivities(rows: torch.Tensor, samples: int) -> tp.Sensitivities:
    units = rows.shape[1]
    return tp.Sensitivities((("g", units),), rows, torch.zeros(units, dtype=torch.float64), samples)


@pytest.mark.parametrize(("samples", "each", "units"), [(9, 1, 5), (6, 3, 4), (4, 1, 30), (5, 2, 40)])
def test_it_is_the_root_of_the_noisy_share_of_the_products(samples: int, each: int, units: int):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(samples, each, 1, generator=generator) * torch.randn(units, generator=generator)
    rows = mixed + 0.5 * torch.randn(samples, each, units, generator=generator)
    products = np.einsum("nei,nej->nij", rows.double().numpy(), rows.double().numpy())
    mean, variance = products.mean(0), products.var(0)
    other = ~np.eye(units, dtype=bool)
    wanted = (variance[other].sum() / samples / (mean[other] ** 2).sum()).clip(0, 1) ** 0.5
    assert 0 < wanted < 1
    found = estimated_shrinkage(sensitivities(rows.reshape(-1, units), samples))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_independent_units_are_not_believed_and_copies_are():
    generator = torch.Generator().manual_seed(1)
    alone = torch.randn(64, 400, generator=generator)
    assert estimated_shrinkage(sensitivities(alone, 64)) > 0.95
    assert estimated_shrinkage(sensitivities(alone[:, :1].expand(-1, 50) + 0.1 * alone[:, :50], 64)) < 0.3
    assert estimated_shrinkage(sensitivities(alone[:1], 1)) == 1.0


def test_full_shrinkage_is_the_global_plan_and_wrong_values_are_refused(residual):
    b = residual
    scores = tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes=3))
    budget = tp.Budget(macs=0.6, round_to=1)
    joint = tp.allocate(scores, b.graph, budget, allocator="joint", shrinkage=1.0)
    alone = tp.allocate(scores, b.graph, budget, allocator="global")
    assert joint.diff(alone) == {}
    for wrong in (-0.1, 1.5):
        with pytest.raises(tp.BudgetError, match="shrinkage"):
            tp.allocate(scores, b.graph, budget, shrinkage=wrong)


def test_with_few_samples_the_estimate_leaves_less_drift_than_none():
    net = torch.nn.Sequential(torch.nn.Linear(4, 150), torch.nn.Tanh(), torch.nn.Linear(150, 3))
    graph = tp.trace(net, torch.zeros(1, 4))
    generator = torch.Generator().manual_seed(3)
    found: dict[float | None, list[float]] = {0.0: [], None: [], 1.0: []}
    for _ in range(12):
        shared = torch.randn(10, 150, generator=generator) / 10**0.5
        scale = torch.rand(150, generator=generator) + 0.1
        rows = (torch.randn(40, 10, generator=generator) @ shared + torch.randn(40, 150, generator=generator)) * scale
        truth = (shared.mT @ shared + torch.eye(150)) * scale * scale.unsqueeze(1)
        known = tp.Sensitivities((("0", 150),), rows, torch.zeros(150, dtype=torch.float64), 40)
        values = {"0": rows.double().square().mean(0)}
        scores = tp.Scores(values, None, "made up", 40, 1, 0, graph.model_id, sensitivities=known)
        for shrinkage, drifts in found.items():
            plan = tp.allocate(scores, graph, tp.Budget(units=0.5, round_to=1), shrinkage=shrinkage)
            gone = (~plan.mask("0")).float()
            drifts.append(float(gone @ truth @ gone))
    mean = {shrinkage: np.mean(drifts) for shrinkage, drifts in found.items()}
    assert mean[None] < 0.97 * mean[0.0]
    assert mean[None] < 0.97 * mean[1.0]
