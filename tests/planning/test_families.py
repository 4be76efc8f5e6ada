"""A sample of timm's architectures, small: each is cut, counts as said, is the masked model, and is saved and loaded.

All of them, from trace to export: `benchmarks/timm_coverage.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import gap, plan_without, random_gone

SMALL = {"img_size": 64, "depth": 2}
PLAIN = (
    "test_resnet", "test_byobnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_nfnet",
    "mobilenetv3_small_050", "ghostnet_050", "edgenext_xx_small", "fasternet_t0", "pvt_v2_b0", "efficientvit_b0",
    "regnetx_002", "skresnet18", "mobilevit_xxs",
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN},
    "test_vit": {"img_size": 64},
    "test_maxvit": {"img_size": 96},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 1, 2, 1), "embed_dim": 24},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24},
    "xcit_nano_12_p16_224": SMALL,
    "cait_xxs24_224": SMALL,
    "beit_base_patch16_224": SMALL | {"embed_dim": 48, "num_heads": 3},
    "vit_small_patch16_dinov3": SMALL,
}
SLOW = (
    "resnet10t", "lcnet_035", "mnasnet_small", "convnext_atto", "dla34", "shvit_s1", "repvit_m1", "hrnet_w18_small",
    "poolformer_s12", "rexnet_100", "nextvit_small", "vovnet39a",
)  # fmt: skip
WHOLE = ("pit_ti_224", "twins_svt_small", "volo_d1_224", "coatnet_nano_rw_224", "levit_128s")  # of one size
MORE: dict[str, dict[str, Any]] = {
    **{name: {"img_size": 160} for name in timm.list_models("test_*") if name not in FAMILIES},
    **{name: {} for name in SLOW},
    **{name: {"img_size": 224} for name in WHOLE},
}


def macs_of(model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(inputs[:1])
    return counter.get_total_flops() / 2


def made(name: str, more: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    more = dict(more)
    size = more.get("img_size", 64)
    try:
        model = timm.create_model(name, num_classes=7, **more)
    except TypeError:  # not told its size
        del more["img_size"]
        model = timm.create_model(name, num_classes=7, **more)
    generator = torch.Generator().manual_seed(1)
    return randomise(model), torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)


EVERY = {**FAMILIES, **MORE}


@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_a_family_is_cut(name: str, tmp_path: Path) -> None:
    model, inputs = made(name, EVERY[name])
    graph = tp.trace(model, inputs[:1])
    assert graph.params() == sum(p.numel() for p in model.parameters())
    assert graph.macs() == macs_of(model, inputs)
    assert graph.cost("bytes") == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gone = random_gone(graph, 0, 0.3)

    exact = plan_without(graph, {group.id: gone[group.id] for group in graph.groups if group.exact_mask})
    with torch.no_grad():
        dense, masked, cut = model(inputs), tp.mask(model, exact)(inputs), tp.apply(model, exact)(inputs)
    size = float(dense.abs().max())
    assert gap(masked, cut) < tolerances.SAME_FUNCTION * max(1.0, size)
    assert gap(dense, cut) > tolerances.OTHER_FUNCTION * size

    plan = plan_without(graph, gone)
    small = tp.apply(model, plan)
    assert plan.params == sum(p.numel() for p in small.parameters()) < 0.9 * graph.params()
    assert plan.macs == macs_of(small, inputs) < 0.9 * graph.macs()
    assert graph.cost("bytes", plan.keep) == sum(t.nbytes for t in (*small.parameters(), *small.buffers()))
    with torch.no_grad():
        wanted = small(inputs)
    assert wanted.shape == dense.shape
    tp.save(small, tmp_path / "saved")
    again = tp.load(tmp_path / "saved", skeleton=copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(again(inputs), wanted)
