"""Which models `timm_coverage.py` runs: the smallest of every architecture module of timm, and much-used names."""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from tpvprune.files import read_text, write_text

TRIES = 3  # variants of a module, where the smallest ones do not even run dense

POPULAR = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "seresnext50_32x4d",
    "resnetv2_50",
    "resnest50d",
    "res2net50_26w_4s",
    "regnetx_004",
    "regnety_004",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "efficientnetv2_rw_t",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "mnasnet_100",
    "ghostnet_100",
    "densenet121",
    "vgg11_bn",
    "inception_v3",
    "cspdarknet53",
    "repvgg_a0",
    "mobileone_s0",
    "convnext_tiny",
    "convnextv2_atto",
    "eca_nfnet_l0",
    "dm_nfnet_f0",
    "hrnet_w18_small",
    "dla34",
    "dpn68",
    "rexnet_100",
    "tresnet_m",
    "halonet26t",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_little_patch16_reg4_gap_256",
    "vit_small_patch16_rope_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "cait_xxs24_224",
    "xcit_tiny_12_p16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "maxvit_tiny_tf_224",
    "coatnet_nano_rw_224",
    "pvt_v2_b0",
    "twins_svt_small",
    "poolformer_s12",
    "caformer_s18",
    "mixer_s32_224",
    "edgenext_x_small",
    "mobilevit_s",
    "levit_128",
    "fastvit_t8",
    "repvit_m0_9",
    "volo_d1_224",
    "nextvit_small",
    "hiera_tiny_224",
    "tiny_vit_5m_224",
)


@dataclass(frozen=True)
class Target:
    """One row of the report.

    Attributes:
        list: "families" or "popular".
        module: architecture module of timm.
        models: names to run, until one of them runs dense; none where no variant can be built.
    """

    list: str
    module: str
    models: tuple[str, ...]


def module_of(model: str) -> str:
    return str(timm.models.model_entrypoint(model).__module__).rpartition(".")[2]


def popular() -> list[Target]:
    return [Target("popular", module_of(name), (name,)) for name in POPULAR]


def families() -> list[Target]:
    counts = _parameters()
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts, key=lambda n: (counts[n], n)):
        by_module[module_of(name)].append(name)
    return [Target("families", module, tuple(by_module[module][:TRIES])) for module in timm.list_modules()]


def _parameters() -> dict[str, int]:
    """Number of parameters of every model of timm that can be built, counted once a version of timm."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / "tpvprune" / f"timm-{timm.__version__}-parameters.json"
    if file.is_file():
        return {str(name): int(count) for name, count in json.loads(read_text(file)).items()}
    names = timm.list_models(exclude_filters="test_*")
    print(f"counting the parameters of {len(names)} models of timm {timm.__version__}, once; takes minutes", flush=True)
    counts: dict[str, int] = {}
    for name in names:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception as error:  # a model that cannot be built is no candidate
            print(f"{name} cannot be built: {type(error).__name__}: {error}")
    write_text(file, json.dumps(counts))
    return counts
