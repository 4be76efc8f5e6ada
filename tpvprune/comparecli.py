"""The verb that compares criteria."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from tpvprune import plots
from tpvprune.comparing import SHARES, compare_criteria
from tpvprune.comparison import COMPARISON, METRICS, Comparison
from tpvprune.console import bars, log_line, number, print_json, print_table
from tpvprune.deploy.page import write_page
from tpvprune.errors import DataError, InputError
from tpvprune.files import write_text
from tpvprune.lock import only_run
from tpvprune.lookcli import Samples, say, share
from tpvprune.measures import scored_on
from tpvprune.options import AsJson, Checkpoint, Data, Labels, Out, Overrides, Target
from tpvprune.recipe import Recipe, validate_recipe
from tpvprune.runfolder import PRODUCTS
from tpvprune.scoring.registry import CRITERIA, LABELLED
from tpvprune.showing import stoppable
from tpvprune.targets import flags, resolve
from tpvprune.workflow import Run

USUAL = "tpv,jbr,wanda,l1,random"
PLOT = "comparison.svg"


def compare(
    target: Target,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    labels: Labels = None,
    criteria: Annotated[
        str, typer.Option(help=f"Criteria, with commas between them: {', '.join(CRITERIA)}.", show_default=True)
    ] = USUAL,
    macs: Annotated[str, typer.Option(help="Shares of the multiply-adds to keep, with commas between them.")] = (
        ",".join(map(str, SHARES))
    ),
    refit: Annotated[bool, typer.Option("--refit", help="Refit every model in closed form before measuring.")] = False,
    samples: Samples = None,
    out_dir: Out = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves as SVG (needs matplotlib).")] = False,
    as_json: AsJson = False,
) -> None:
    """Cut a model by several criteria to the same budgets and measure what each has kept."""
    if plot:
        plots.check()
    names, shares = _names(criteria), _shares(macs)
    found = []
    for recipe, folder in resolve(target, flags(overrides, checkpoint=checkpoint, data=data, labels=labels), out_dir):
        with stoppable(folder):
            compared = _compared(recipe, folder, names, shares, refit, samples)
        if plot:
            up = METRICS[compared.metric]
            write_text(folder / PLOT, plots.standalone(plots.lines(compared.curves(), "multiply-adds left", up, "c")))
        found.append({"model": recipe.model.name, "out": str(folder), **compared.to_json()})
        if not as_json:
            _print(recipe.model.name, compared, folder)
    if as_json:
        print_json(found[0] if len(found) == 1 else found)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in CRITERIA), None)
    if unknown is not None or not names:
        raise InputError(f"there is no criterion {unknown or text!r}; choose of {', '.join(CRITERIA)}")
    return list(dict.fromkeys(names))


def _shares(text: str) -> list[float]:
    try:
        return [
            float(part.rstrip("%")) / (100 if part.endswith("%") else 1) for part in text.replace(" ", "").split(",")
        ]
    except ValueError:
        raise InputError(f"--macs {text!r} is no list of shares; write 0.9,0.7,0.5") from None


def _compared(
    recipe: Recipe, folder: Path, names: list[str], shares: list[float], refit: bool, samples: int | None
) -> Comparison:
    labelled = [name for name in names if name in LABELLED]
    chosen = {name: _by(recipe, name, refit, samples) for name in names}
    with bars() as progress:
        run = Run(recipe, folder, progress=progress, log=log_line)
        images, held = run.inputs.images, next(iter(chosen.values()))
        if labelled and not images.scored.labelled:
            raise DataError(f"criterion {labelled[0]} needs labels; give --labels, or leave it out of --criteria")
        run.until("trace")
        assert recipe.data is not None
        about: dict[str, Any] = {"workers": recipe.data.workers}
        pool = images.scored.sample(held.score.samples, recipe.seed)
        measured = images.measured if samples is None else images.measured.sample(samples, recipe.seed)
        with only_run(folder):
            found = compare_criteria(
                run.inputs.dense,
                pool.loader(recipe.data.batch_size, **about),
                run.graph,
                {name: made.criterion(len(pool)) for name, made in chosen.items()},
                measured.loader(recipe.data.batch_size, **about),
                shares=shares,
                budget=recipe.limits(),
                planning=recipe.planning(),
                refit_with=held.closed_form() if refit else None,
                progress=progress,
                save=folder / COMPARISON,
            )
            if (folder / PRODUCTS["eval"]).is_file():
                write_page(folder)
    return found


def _by(recipe: Recipe, name: str, refit: bool, samples: int | None) -> Recipe:
    """The recipe with another criterion, in its usual settings for what follows the cut."""
    changed = recipe.model_dump(mode="json")
    own = {field.name for field in fields(CRITERIA[name])}
    kept = {key: value for key, value in changed["score"].items() if key in own}
    changed["score"] = {**kept, "criterion": name, "samples": samples or recipe.score.samples}
    if refit and changed["recover"]["reconstruct"] is None:
        changed["recover"]["reconstruct"] = {}
    if not refit:
        changed["recover"]["reconstruct"] = None
    changed["plan"]["refit"] = False
    made = validate_recipe(changed, recipe.name)
    assert isinstance(made, Recipe)
    return made


def _print(name: str, found: Comparison, folder: Path) -> None:
    metric = found.metric
    said = "refitted in closed form" if found.refitted else "without recovery"
    say(f"{name}: {METRICS[metric]} by the share of multiply-adds asked for, {said}; best mean first")
    rows = [
        [one, number(found.mean(one)), *(number(point.metrics[metric]) for point in found.of(one))]
        for one in found.ranked()
    ]
    print_table(["criterion", "mean", *(f"{at:g}" for at in found.shares)], rows)
    if "kl" in found.dense:
        rows = [[one, *(f"{point.metrics['kl']:.3g}" for point in found.of(one))] for one in found.ranked()]
        print_table(["KL in nats", *(f"{at:g}" for at in found.shares)], rows)
    best, images = found.ranked()[0], f"{scored_on(found.samples)}, measured on {found.images:,} others"
    say(
        f"got, {best}: {', '.join(share(point.macs) for point in found.of(best))} of the multiply-adds.",
        f"dense: {number(found.dense[metric])}; {images}.",
        f"curves: {folder / COMPARISON}",
    )
