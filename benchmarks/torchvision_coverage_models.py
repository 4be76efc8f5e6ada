"""Models of torchvision for `timm_coverage.py --library torchvision`: which, how to build them, on what they run."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from timm_coverage_models import Target
from torch import Tensor, nn
from torchvision import models

POPULAR = (
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg16_bn",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "mobilenet_v3_large",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
    "convnext_small",
    "vit_b_16",
    "swin_v2_t",
    "mc3_18",
    "r2plus1d_18",
    "mvit_v2_s",
    "deeplabv3_resnet50",
    "fasterrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn_v2",
)
# Pixels a side, and frames before them: the first prefix that fits. Small, so that the checks take seconds.
SIZES: Mapping[str, tuple[int, ...]] = {
    "vit_b_32": (64,),
    "vit_l_32": (64,),
    "vit_h_14": (56,),
    "maxvit": (224,),
    "inception": (96,),
    "raft": (128,),
    "ssd300": (300,),
    "ssdlite320": (320,),
    "mvit": (16, 224),
    "swin3d": (8, 64),
    "s3d": (16, 224),
    "r3d": (4, 32),
    "mc3": (4, 32),
    "r2plus1d": (4, 32),
    "fasterrcnn": (160,),
    "maskrcnn": (160,),
    "keypointrcnn": (160,),
    "retinanet": (160,),
    "fcos": (160,),
    "": (64,),
}


class Heads(nn.Module):
    """A detector without what chooses: the outputs of its heads, of regions that are given where it has two stages."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `(batch, 3, height, width)` to the tensors that its losses and its choice of boxes are made of."""
        detector: Any = self.detector
        features = detector.backbone(images)
        levels = list(features.values())
        if not hasattr(detector, "rpn"):
            return list(detector.head(levels).values())
        objectness, deltas = detector.rpn.head(levels)
        side = images.shape[-1]
        box = images.new_tensor([[0.1, 0.2, 0.5, 0.7], [0.0, 0.0, 1.0, 0.9]]) * side
        given = features, [box] * len(images), [(side, side)] * len(images)
        heads = detector.roi_heads
        found = [*objectness, *deltas, *heads.box_predictor(heads.box_head(heads.box_roi_pool(*given)))]
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"has_{kind}")():
                pool, head, last = (getattr(heads, f"{kind}_{part}") for part in ("roi_pool", "head", "predictor"))
                found.append(last(head(pool(*given))))
        return found


class Flow(nn.Module):
    """Optical flow between an image and the same one, moved."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `(batch, 3, height, width)` to the flow after one update: more of them make much of rounding."""
        return list(self.flow(images, images.roll(3, -1), num_flow_updates=1))


def names() -> list[str]:
    """All models but the quantizable ones, which are the same networks with their sums in modules."""
    return [name for name in models.list_models() if not name.startswith("quantized_")]


def module_of(model: str) -> str:
    return models.get_model_builder(model).__module__.removeprefix("torchvision.models.")


def popular() -> list[Target]:
    return [Target("popular", module_of(name), (name,)) for name in POPULAR]


def families() -> list[Target]:
    def size(name: str) -> int:
        return int(models.get_model_weights(name)["DEFAULT"].meta["num_params"])

    by_module: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names(), key=lambda n: (size(n), n)):
        by_module[module_of(name)].append(name)
    return [Target("families", module, (by_module[module][0],)) for module in sorted(by_module)]


def shape_of(name: str) -> tuple[int, ...]:
    """Shape of an input, without the batch: channels, frames of a video, height, width."""
    size = next(size for prefix, size in SIZES.items() if name.startswith(prefix))
    return (3, *size[:-1], size[-1], size[-1])


def make(name: str) -> nn.Module:
    """A model with random weights, in eval mode, that takes one batch."""
    takes = inspect.signature(models.get_model_builder(name)).parameters
    size, more = shape_of(name), dict[str, Any]()
    if name.startswith("vit_"):
        more = {"image_size": size[-1]}
    elif name in ("googlenet", "inception_v3"):
        more = {"init_weights": False}
    torch.manual_seed(0)
    model = models.get_model(
        name, weights=None, **({"weights_backbone": None} if "weights_backbone" in takes else {}), **more
    )
    kind = module_of(name).partition(".")[0]
    return (Heads(model) if kind == "detection" else Flow(model) if kind == "optical_flow" else model).eval()
