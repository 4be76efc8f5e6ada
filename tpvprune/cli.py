"""The command line: one verb a stage, recipes, and a first use without a recipe.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

from tpvprune.analysiscli import add_analysis_verbs
from tpvprune.budget import BOUNDS
from tpvprune.checkpoint import ABOUT, image_shape, load
from tpvprune.comparecli import compare as compare_verb
from tpvprune.console import bars, err, number, out, print_json, print_table
from tpvprune.deploycli import add_deploy_verbs
from tpvprune.errors import InputError, RecipeError, TpvpruneError
from tpvprune.files import write_text
from tpvprune.lookcli import add_verbs
from tpvprune.options import (
    AsJson,
    Bytes,
    Checkpoint,
    Data,
    Drift,
    Labels,
    Latency,
    Macs,
    Out,
    Overrides,
    Params,
    Target,
)
from tpvprune.plancli import plans_app
from tpvprune.processes import launched
from tpvprune.recipe import Suite, builtin_recipes, find_recipe, load_recipe
from tpvprune.report import compare
from tpvprune.showing import finish
from tpvprune.targets import flags, is_saved_model, resolve, resolve_model
from tpvprune.timing import latencies
from tpvprune.version import __version__
from tpvprune.zoo.data import input_size, open_pool

SHARED = {"run", "prune", "trace", "score", "plan", "apply", "recover", "eval", "report"}
"""Verbs that several processes do together."""

app = typer.Typer(
    help="Prune any timm checkpoint from unlabeled images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(plans_app, name="plans")


def _version(asked: bool) -> None:
    if asked:
        out.print(f"tpvprune {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on the way.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.ERROR if launched()[0] else logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_time=False, show_path=False)],
        force=True,
    )
    if not verbose:
        warnings.filterwarnings("ignore", module=r"(torch|timm|accelerate|torchvision)\b")


@app.command()
def run(
    target: Annotated[str, typer.Argument(help="A recipe: a built-in name or a YAML file; or a run's folder.")],
    overrides: Overrides = None,
    out_dir: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe from images to report. Run again to go on where it stopped."""
    finish(resolve(target, overrides or [], out_dir), "report", as_json)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A timm model name, or cifar_resnet20 and the like.")],
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    labels: Labels = None,
    macs: Macs = None,
    params: Params = None,
    size: Bytes = None,
    latency_ms: Latency = None,
    drift: Drift = None,
    out_dir: Out = None,
    as_json: AsJson = False,
) -> None:
    """Prune a model without a recipe."""
    bounds = {"macs": macs, "params": params, "bytes": size, "latency_ms": latency_ms, "drift": drift}
    given = flags(overrides, checkpoint=checkpoint, data=data, labels=labels, **bounds)
    named = {
        key for key, equals, value in (word.partition("=") for word in given) if value.strip(" '\"") not in ("", "null")
    }
    if not named & {"data", "data.images"}:
        raise InputError("--data is missing; give a folder of images (labels are not needed)")
    if not named & {"budget", *(f"budget.{name}" for name in BOUNDS)}:
        raise InputError("no budget; give --macs 0.5, --params 0.5, --bytes 20MB, --latency-ms '8 ms' or --drift 0.05")
    finish(resolve_model(model, given, out_dir), "report", as_json)


def _stage(name: str, text: str) -> None:
    """Register one stage's verb: all of them read the same target and differ in where they stop."""

    def command(
        target: Target,
        overrides: Overrides = None,
        checkpoint: Checkpoint = None,
        data: Data = None,
        labels: Labels = None,
        macs: Macs = None,
        params: Params = None,
        size: Bytes = None,
        latency_ms: Latency = None,
        drift: Drift = None,
        out_dir: Out = None,
        as_json: AsJson = False,
    ) -> None:
        bounds = {"macs": macs, "params": params, "bytes": size, "latency_ms": latency_ms, "drift": drift}
        given = flags(overrides, checkpoint=checkpoint, data=data, labels=labels, **bounds)
        if name == "eval" and is_saved_model(target):
            if overrides or checkpoint or any(bounds.values()) or out_dir:
                raise InputError("a saved model is measured with --data and --labels alone")
            if launched()[0] == 0:
                _evaluate(Path(target), data, labels, as_json)
        else:
            finish(resolve(target, given, out_dir), name, as_json)

    app.command(name, help=text)(command)


_stage("trace", "Find what can be pruned together, and what cannot.")
_stage("score", "Score every unit from unlabeled images (traces first if needed).")
_stage("plan", "Choose what leaves under the budget (scores first if needed).")
_stage("apply", "Cut the plan's units out and save the smaller model.")
_stage("recover", "Bring accuracy back on unlabeled images.")
_stage("eval", "Measure before, pruned and recovered on images the scorer did not see.")
add_deploy_verbs(app)
add_verbs(app)
app.command("compare")(compare_verb)
add_analysis_verbs(app)


@recipes_app.command("ls")
def recipes_ls(as_json: AsJson = False) -> None:
    """List the built-in recipes."""
    rows = []
    for name in builtin_recipes():
        recipe = load_recipe(name)
        rows.append({"name": name, "description": recipe.description})
    if as_json:
        print_json(rows)
    else:
        print_table(["name", "description"], [[row["name"], row["description"]] for row in rows])


@recipes_app.command("show")
def recipes_show(target: Annotated[str, typer.Argument(help="A built-in name or a YAML file.")]) -> None:
    """Print a recipe."""
    out.print(find_recipe(target)[1].rstrip(), highlight=False, markup=False)


@recipes_app.command("copy")
def recipes_copy(
    target: Annotated[str, typer.Argument(help="A built-in name or a YAML file.")],
    path: Annotated[Path, typer.Argument(help="Where to; a file that exists is not overwritten.")],
) -> None:
    """Copy a recipe to edit it."""
    if path.exists():
        raise RecipeError(f"{path} exists; choose another name")
    write_text(path, find_recipe(target)[1])
    out.print(f"{target} -> {path}", highlight=False)


@recipes_app.command("validate")
def recipes_validate(
    targets: Annotated[list[str], typer.Argument(help="Names, files, or folders searched for .yaml files.")],
) -> None:
    """Check recipes without running them."""
    files: list[str] = []
    for target in targets:
        if Path(target).is_dir():
            found = sorted(p for p in Path(target).rglob("*") if p.suffix in (".yaml", ".yml"))
            if not found:
                raise RecipeError(f"{target} holds no .yaml file")
            files += map(str, found)
        else:
            files.append(target)
    wrong = []
    for file in files:
        try:
            if isinstance(load_recipe(file), Suite):
                resolve(file, (), None)  # and what it lists
        except RecipeError as error:
            wrong.append(str(error))
        else:
            out.print(f"{file}: valid", highlight=False)
    if wrong:
        raise RecipeError("\n".join(wrong))


def _evaluate(folder: Path, data: str | None, labels: str | None, as_json: bool) -> None:
    """Measure a saved model alone: what it costs, and accuracy where labels are given."""
    if data is None or not data.strip():
        raise InputError("--data is missing; give images to measure on")
    model = load(folder)
    shape = image_shape(model)
    size = shape[1] if shape != input_size(model) and shape[1:] == shape[1:2] * 2 else None
    batches = open_pool(data, model, size=size, labels=labels).loader(64)
    with bars() as progress:
        metrics, images = compare({"model": model}, model, batches, progress=progress)
    first = next(iter(batches))[0][:8]
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    told = {
        "params": about["params"],
        "macs": about["macs"],
        "latency_ms": latencies({"model": model}, first)["model"],
        "images": images,
    }
    if "top1" in metrics["model"]:
        told["top1"] = metrics["model"]["top1"]
    if as_json:
        print_json(told)
    else:
        print_table(["measure", "value"], [[name, number(value)] for name, value in told.items()])


def main() -> None:
    """Entry point: runs the command and turns errors into messages and exit codes.

    Of several processes of a launcher the first alone does what is no run of a recipe.
    """
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if launched()[0] and verb not in SHARED:
        return
    try:
        app()
    except InputError as error:
        _fail(error, 2)
    except TpvpruneError as error:
        _fail(error, 1)
    except OSError as error:
        _fail(error, 1, _in_words(error))


def _in_words(error: OSError) -> str:
    """What the system refused, and what to do about it."""
    told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{told}; make room and give the same command again, what was finished is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{told}; choose another --out, or change who may write there"
    return told


def _fail(error: Exception, code: int, told: str = "") -> None:
    rank, told = launched()[0], told or str(error)
    if rank:  # what the first process meets too is told twice, what it does not would not be told at all
        told = f"process {rank}: {told}"
    elif "--json" in sys.argv:
        print_json({"error": type(error).__name__, "message": told})
    err.print(f"tpvprune: {told}", style="red" if err.is_terminal else None, highlight=False, markup=False)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
