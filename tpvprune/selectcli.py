"""The verb that ranks checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional as F

from tpvprune.analysis.labelnoise import LabelNoise
from tpvprune.analysis.selection import Selection
from tpvprune.analysis.selection import select as selected
from tpvprune.analysis.values import correlation
from tpvprune.batches import finite_output
from tpvprune.console import bars, log_line, number, print_json, print_table
from tpvprune.errors import DataError, InputError
from tpvprune.lookcli import say
from tpvprune.options import AsJson, Data, Labels
from tpvprune.targets import flags, resolve_model
from tpvprune.workflow import Run
from tpvprune.zoo.models import is_model

PAIRS = 4  # of which an interval can be told

FITTED = 128  # images whose noise is followed


def select(
    checkpoints: Annotated[list[str], typer.Argument(help="Weights, two or more; MODEL=FILE where models differ.")],
    model: Annotated[str | None, typer.Option(help="What they are weights of: a timm name, or cifar_resnet20.")] = None,
    data: Data = None,
    labels: Labels = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of a recipe's model and data, as model.args.in_chans=1")
    ] = None,
    method: Annotated[str, typer.Option(help="auto, closed or fine-tuning.")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="fine-tuning: steps of each.")] = 25,
    repeats: Annotated[int, typer.Option(min=1, help="fine-tuning: how many for a checkpoint.")] = 4,
    samples: Annotated[int, typer.Option(min=2, help="Training images whose noisy targets are followed.")] = FITTED,
    seed: Annotated[int, typer.Option(help="Of images and noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Rank checkpoints by how much noise in their targets they would follow. Reads no label but for a column beside."""
    if data is None or not data.strip():
        raise InputError("--data is missing; give a folder of images (labels are not needed)")
    runs: dict[str, Run] = {}
    with bars() as progress:
        for word in checkpoints:
            name, file = _parsed(word, model)
            if word in runs:
                raise InputError(f"{word} is given twice")
            given = flags(overrides, checkpoint=file, data=data, labels=labels)
            [(recipe, folder)] = resolve_model(name, given, None)
            runs[word] = Run(recipe, folder, progress=progress, log=log_line)
            runs[word].inputs.check()
        models = {word: run.inputs.dense for word, run in runs.items()}
        batches = {word: _batches(run.inputs.images.scored.sample(samples, seed), run) for word, run in runs.items()}
        way: Any = method
        settings = LabelNoise(steps=steps, repeats=repeats)
        found = selected(models, batches, method=way, settings=settings, seed=seed, progress=progress)
        losses = {word: _loss(run) for word, run in runs.items()} if labels is not None else {}
    told: dict[str, Any] = found.to_json()
    if losses:
        link = correlation([found.tpv[word].value for word in losses], list(losses.values()))
        sure = len(losses) >= PAIRS
        low, high = (link.low, link.high) if sure else (None, None)
        told |= {"loss": losses, "correlation": {"value": link.value, "low": low, "high": high}}
    if as_json:
        print_json(told)
    else:
        _print(found, losses, told)


def _parsed(word: str, model: str | None) -> tuple[str, str]:
    name, equals, file = word.partition("=")
    if equals and is_model(name):
        return name, file
    if model is None:
        raise InputError(f"{word}: of which model? Give --model NAME, or write NAME={word}")
    return model, word


def _batches(pool: Any, run: Run) -> Any:
    assert run.recipe.data is not None
    return pool.loader(run.recipe.data.batch_size, workers=run.recipe.data.workers)


@torch.no_grad()
def _loss(run: Run) -> float:
    """Cross-entropy on held-out images, of those that have a label.

    Raises:
        DataError: none has.
    """
    model: nn.Module = run.inputs.dense
    total, count = 0.0, 0
    for images, labels in _batches(run.inputs.images.measured, run):
        answer = finite_output(model, images.to(run.inputs.device))
        total += float(F.cross_entropy(answer.double(), labels.to(run.inputs.device), reduction="sum", ignore_index=-1))
        count += int((labels != -1).sum())
    if not count:
        raise DataError(f"{run.inputs.images.measured.name}: no held-out image has a label; leave --labels out")
    return total / count


def _print(found: Selection, losses: dict[str, float], told: dict[str, Any]) -> None:
    rows = []
    for place, (name, value) in enumerate(found.tpv.items(), 1):
        cells = [str(place), name, f"{value.value:.4g} ± {value.stderr:.1g}"]
        rows.append([*cells, number(losses[name])] if losses else cells)
    print_table(["rank", "checkpoint", "label-noise TPV", *(["held-out loss"] if losses else [])], rows)
    of = next(iter(found.tpv.values())).samples
    say(f"{found.method} form, ridge {found.ridge:.3g}, on {of} unlabeled training images; the least is named first.")
    if losses:
        link = told["correlation"]
        known = f"95 % between {link['low']:.2f} and {link['high']:.2f}" if link["low"] is not None else "of few"
        say(f"rank correlation with the loss {link['value']:.2f}, {known}")
    say("Checkpoints that do not fit their training set yet rank low too: compare those that do.")
