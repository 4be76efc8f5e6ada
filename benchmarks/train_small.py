"""Train the small networks that ship with the package and the benchmarks.

    python benchmarks/train_small.py digits_cnn digits_vit
    python benchmarks/train_small.py cifar_convnext cifar_vit --cifar cifar10/ --device cuda

The digits (scikit-learn's; the quickstart) are trained on their even positions and measured on the odd ones, and take a
few minutes on two cores. CIFAR-10 is trained on `train/` and measured on `test/`, and takes a GPU some minutes. Weights
and a model card go to `recipes/checkpoints/` and `benchmarks/checkpoints/`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F
from varied import Varied, tensors

from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model
from tpvprune.zoo.pool import Pool

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Small:
    """A network to train, and how."""

    data: str
    model: str
    args: dict[str, Any]
    epochs: int
    batch: int
    lr: float
    half: bool = False  # weights are kept in half precision


DIGITS, CIFAR = {"in_chans": 1, "num_classes": 10}, {"num_classes": 10}
MODELS = {
    "digits_cnn": Small("digits", "resnet18", {**DIGITS, "channels": [16, 32, 48, 64]}, 50, 64, 2e-3),
    "digits_vit": Small(
        "digits",
        "vit_tiny_patch16_224",
        {**DIGITS, "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4},
        200,
        64,
        1.5e-3,
    ),
    "cifar_convnext": Small(
        "cifar",
        "convnext_atto",
        {**CIFAR, "patch_size": 2, "dims": [32, 64, 128, 256], "depths": [2, 2, 4, 2]},
        40,
        256,
        2e-3,
        half=True,
    ),
    "cifar_vit": Small(
        "cifar",
        "vit_tiny_patch16_224",
        {**CIFAR, "img_size": 32, "patch_size": 4, "embed_dim": 144, "depth": 6, "num_heads": 6},
        60,
        256,
        1.5e-3,
        half=True,
    ),
}
ABOUT = {
    "digits": "scikit-learn's digits (Alpaydin and Kaynak 1998, 8x8 grey images, enlarged to 32x32),\n"
    "made to try tpvprune without a download. It is of no other use.",
    "cifar": "CIFAR-10 (Krizhevsky 2009, 32x32 colour images, here from JPEG files), made to measure\n"
    "pruning on. It is of no other use.",
}
CARD = """# {name}

A {model} ({args}) for {about}

* Trained on {train} images, {epochs} epochs of AdamW.
* Top-1 on {test} others: {top1:.1%}.
* {params:,} parameters. Made by `python benchmarks/train_small.py {name}`.
"""


def pools(small: Small, model: torch.nn.Module, cifar: Path | None) -> tuple[Pool, Pool, Path]:
    """Images to train on, images to measure on, and where the weights go."""
    if small.data == "digits":
        return *open_pool("digits", model, size=32).split(), ROOT / "recipes" / "checkpoints"
    if cifar is None:
        raise SystemExit("CIFAR-10 is needed: --cifar FOLDER with train/<class>/ and test/<class>/")
    train, test = (open_pool(cifar / part, model, size=32, labels="folders") for part in ("train", "test"))
    return train, test, ROOT / "benchmarks" / "checkpoints"


def train(name: str, cifar: Path | None, device: str, out: Path | None) -> None:
    torch.manual_seed(0)
    small = MODELS[name]
    model = create_model(small.model, args=small.args).to(device)
    train_pool, test_pool, folder = pools(small, model, cifar)
    folder = out or folder
    if small.data == "cifar":
        batches: Any = Varied(*(part.to(device) for part in tensors(train_pool)), small.batch)
    else:
        batches = train_pool.loader(small.batch, shuffle=True, augment=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=small.lr, weight_decay=0.05)
    steps = small.epochs * len(batches)
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 20, warmup_lr_init=small.lr / 100, t_in_epochs=False
    )
    step = 0
    for epoch in range(small.epochs):
        model.train()
        for images, labels in batches:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            schedule.step_update(step)
        if (epoch + 1) % 5 == 0:
            print(f"{name} epoch {epoch + 1}: top-1 {accuracy(model, test_pool, device):.4f}", flush=True)
    if small.half:
        model.half().float()
    top1 = accuracy(model, test_pool, device)
    state = {key: value.half() if small.half else value for key, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.cpu().contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    card = CARD.format(
        name=name,
        model=small.model,
        args=json.dumps(small.args),
        about=ABOUT[small.data],
        train=len(train_pool),
        test=len(test_pool),
        epochs=small.epochs,
        top1=top1,
        params=sum(p.numel() for p in model.parameters()),
    )
    (folder / f"{name}.md").write_text(card, encoding="utf-8")
    print(card)


@torch.no_grad()
def accuracy(model: torch.nn.Module, pool: Pool, device: str) -> float:
    model.eval()
    hits = [(model(images.to(device)).argmax(1).cpu() == labels).float() for images, labels in pool.loader(256)]
    return float(torch.cat(hits).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(MODELS))
    parser.add_argument("--cifar", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where weights and card go, in place of the folders above")
    args = parser.parse_args()
    for name in args.names:
        train(name, args.cifar, args.device, args.out)


if __name__ == "__main__":
    main()
