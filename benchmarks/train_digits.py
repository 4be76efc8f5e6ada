"""Train the two small networks of the quickstart on scikit-learn's digits.

    python benchmarks/train_digits.py [digits_cnn] [digits_vit]

Trains on the even positions, measures on the odd ones, and writes
`recipes/checkpoints/digits_{cnn,vit}.safetensors` with a model card each. Takes a few minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F

from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model

OUT = Path(__file__).resolve().parent.parent / "recipes" / "checkpoints"
COMMON = {"in_chans": 1, "num_classes": 10}
MODELS = {
    "digits_cnn": ("resnet18", {**COMMON, "channels": [16, 32, 48, 64]}, 50, 2e-3),
    "digits_vit": (
        "vit_tiny_patch16_224",
        {**COMMON, "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4},
        200,
        1.5e-3,
    ),
}
CARD = """# {name}

A {model} ({args}) for scikit-learn's digits (Alpaydin and Kaynak 1998, 8x8 grey images, enlarged to 32x32),
made to try tpvprune without a download. It is of no other use.

* Trained on the {train} images at even positions, shifted by up to 4 pixels, {epochs} epochs of AdamW.
* Top-1 on the {test} images at odd positions: {top1:.1%}.
* {params:,} parameters. Made by `python benchmarks/train_digits.py`.
"""


def train(name: str, model_name: str, args: dict[str, object], epochs: int, lr: float) -> None:
    torch.manual_seed(0)
    model = create_model(model_name, args=args)
    train_pool, test_pool = open_pool("digits", model, size=32).split()
    batches = train_pool.loader(64, shuffle=True, augment=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.05)
    steps = epochs * len(batches)
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 20, warmup_lr_init=lr / 100, t_in_epochs=False
    )
    step = 0
    for epoch in range(epochs):
        model.train()
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            schedule.step_update(step)
        if (epoch + 1) % 5 == 0:
            print(f"{name} epoch {epoch + 1}: top-1 {accuracy(model, test_pool):.4f}", flush=True)
    top1 = accuracy(model, test_pool)
    save_file(model.state_dict(), OUT / f"{name}.safetensors")
    card = CARD.format(
        name=name,
        model=model_name,
        args=json.dumps(args),
        train=len(train_pool),
        test=len(test_pool),
        epochs=epochs,
        top1=top1,
        params=sum(p.numel() for p in model.parameters()),
    )
    (OUT / f"{name}.md").write_text(card, encoding="utf-8")
    print(card)


@torch.no_grad()
def accuracy(model: torch.nn.Module, pool: object) -> float:
    model.eval()
    hits = [(model(images).argmax(1) == labels).float() for images, labels in pool.loader(256)]
    return float(torch.cat(hits).mean())


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        train(name, *MODELS[name])
