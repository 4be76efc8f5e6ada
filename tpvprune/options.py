"""Arguments and options that several verbs of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tpvprune.console import one_document


def _alone(context: typer.Context, asked: bool) -> bool:
    """Keep what other packages print out of the document, until the command has ended."""
    if asked:
        context.with_resource(one_document())
    return asked


Target = Annotated[str, typer.Argument(help="A recipe (name or YAML file), a run's folder, or a timm model name.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as in budget.macs=0.4", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results; runs/NAME by default.")]
AsJson = Annotated[bool, typer.Option("--json", callback=_alone, help="Print one JSON document for machines.")]
Checkpoint = Annotated[str | None, typer.Option(help="Weights: .safetensors, .pth or .pth.tar, as timm loads them.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Unlabeled images: a folder in any tree, a tar file, .npz/.npy, 'digits', or a set of timm's factory, as "
        "hfds/NAME@SPLIT, torch/NAME@SPLIT or wds/FOLDER@shard-{0..9}.tar|5000."
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="'folders', a class-map file, or 'own' where images carry them: for the line of accuracy, and for "
        "criteria and a recover.finetune.label_weight that read them."
    ),
]
Macs = Annotated[str | None, typer.Option(help="Multiply-adds to keep at most: 0.5, 50% or 1.2G.")]
Params = Annotated[str | None, typer.Option(help="Parameters to keep at most: 0.5, 50% or 3M.")]
Bytes = Annotated[str | None, typer.Option("--bytes", help="Weights in memory, at most: 0.5, 50% or 20MB.")]
Latency = Annotated[str | None, typer.Option(help="Milliseconds of a forward pass at most: '8 ms' or 0.5.")]
Drift = Annotated[
    str | None,
    typer.Option(
        help="KL from the dense model at most, in nats, on other images than those given: 0.05. With refits while the "
        "plan is made it buys far more: add plan.steps=3 plan.refit=true."
    ),
]
