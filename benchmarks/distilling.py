"""Settings of a distillation, compared without a label on training images that are held back.

    python benchmarks/distilling.py --data cifar10/ --start runs/recovery/resnet20-0.5-0/compensated_Gauss-Newton \
        --checkpoint resnet20_cifar10.safetensors --settings "as before" "temperature 8" ...

45,000 of the 50,000 training images to distil on, KL and agreement with the dense network on the other 5,000, which are
not varied. `--start` is a network that benchmarks/recovery.py kept.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from recovery import DISTILL, Cifar
from varied import Varied

import tpvprune as tp
from tpvprune.report import compare
from tpvprune.zoo.models import create_model

HELD = 5000
SETTINGS = {
    "as before": {},
    "rate 0.0125": {"lr": 0.0125},
    "rate 0.05": {"lr": 0.05},
    "temperature 2": {"temperature": 2.0},
    "temperature 8": {"temperature": 8.0},
    "mixup": {"mixup": 1.0},
    "cutmix": {"cutmix": 1.0},
    "cutmix, temperature 8": {"cutmix": 1.0, "temperature": 8.0},
    "temperature 8, nesterov, weight decay 1e-4": {"temperature": 8.0, "optimizer": "sgd", "weight_decay": 1e-4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--net", default="cifar_resnet20")
    parser.add_argument("--start", type=Path, required=True, help="a saved network to distil")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    args = parser.parse_args()
    dense = create_model(args.net, args.checkpoint).to(memory_format=torch.channels_last)
    start = tp.load(args.start).to(memory_format=torch.channels_last)
    images, labels = Cifar(args.data, dense, "cpu").labelled
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(11))
    held = images[order[:HELD]].contiguous(memory_format=torch.channels_last).split(250)
    learnt = Varied(images[order[HELD:]], labels[order[HELD:]], 125)
    for name in args.settings:
        settings = replace(DISTILL, epochs=args.epochs, precision=args.precision, **SETTINGS[name])
        torch.manual_seed(0)
        began = time.perf_counter()
        found = tp.finetune(start, learnt, dense, settings)
        metrics, _ = compare({"now": found}, dense, held)
        seconds = round(time.perf_counter() - began)
        print(json.dumps({"settings": name, "epochs": args.epochs, **metrics["now"], "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
