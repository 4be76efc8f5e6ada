"""Verbs that measure test prediction variance itself, and that advise by it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tpvprune.analysis.advice import BITS, Advice
from tpvprune.analysis.advice import advise as advised
from tpvprune.analysis.labelnoise import LabelNoise
from tpvprune.analysis.noises import FORMS, Finding, Setting
from tpvprune.analysis.quantise import quantise
from tpvprune.analysis.rounder import FLOAT
from tpvprune.analysis.sgd import SGD
from tpvprune.console import bars, log_line, out, print_json, print_table
from tpvprune.errors import DataError, InputError
from tpvprune.lookcli import Many, nats, say, share
from tpvprune.options import AsJson, Checkpoint, Data, Macs, Overrides, Target
from tpvprune.planning.allocate import allocate
from tpvprune.planning.graph import trace
from tpvprune.recipe import Recipe
from tpvprune.report import compare
from tpvprune.scoring.criteria import score
from tpvprune.scoring.tpv import TPV
from tpvprune.selectcli import select
from tpvprune.surgery.removal import apply
from tpvprune.targets import flags, resolve
from tpvprune.types import Graph
from tpvprune.workflow import Run
from tpvprune.zoo.pool import Pool
from tpvprune.zoo.streams import Stream


class ManyBits(Many):
    """Takes all numbers that follow `--bits` as its values."""

    option = "--bits"


NOISES = ("sgd", "label", "quant", "prune")
FITTED = 128  # inputs that label noise is fitted on: it takes hundreds of passes over them

Samples = Annotated[int, typer.Option(min=2, help="Training images, and as many held-out ones.")]
Head = Annotated[str, typer.Option(help="What drift means: softmax (half is KL in nats), logits, ...")]
Seed = Annotated[int, typer.Option(help="Of images and of all that is drawn.")]


def add_analysis_verbs(app: typer.Typer) -> None:
    """Register `tpv`, `select` and `advise`."""
    app.command("tpv")(tpv)
    app.command("select")(select)
    app.command("advise", cls=ManyBits)(advise)


def tpv(
    target: Target,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    noise: Annotated[
        list[str] | None, typer.Option(help="sgd, label, quant or prune; may be given again. Default: sgd and quant.")
    ] = None,
    form: Annotated[list[str] | None, typer.Option(help="trace or empirical; both by default.")] = None,
    bits: Annotated[int, typer.Option(min=1, max=16, help="quant: bits of a weight.")] = 8,
    per: Annotated[str, typer.Option(help="quant: one range a 'tensor' or a 'channel'.")] = "tensor",
    macs: Macs = None,
    lr: Annotated[float, typer.Option(help="sgd: step size.")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="sgd: samples of a step.")] = 32,
    penalty: Annotated[float, typer.Option(help="sgd, label: pull back to the weights.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="sgd: steps to burn in; label: steps of a fine-tuning.")] = 50,
    sigma: Annotated[float, typer.Option(help="label: noise on the outputs.")] = 0.1,
    draws: Annotated[int, typer.Option(min=1, help="Of the empirical form (sgd: chains, label: fine-tunings).")] = 8,
    rtol: Annotated[float, typer.Option(help="Relative standard error that traces stop at.")] = 0.05,
    head: Head = "softmax",
    samples: Samples = 512,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure how far noise in the weights moves the outputs, on training and on held-out images."""
    wanted = tuple(dict.fromkeys(noise or ("sgd", "quant")))
    strange = next((one for one in wanted if one not in NOISES), None)
    if strange is not None:
        raise InputError(f"--noise {strange} is not known; give some of {', '.join(NOISES)}")
    if "prune" in wanted and macs is None:
        raise InputError("--noise prune needs --macs, the multiply-adds to keep: 0.9")
    told = []
    for recipe, folder in resolve(target, flags(overrides, checkpoint=checkpoint, data=data), None):
        with bars() as progress:
            run = Run(recipe, folder, progress=progress, log=log_line)
            train, test = _images(run, recipe, samples, seed)
            setting = Setting(
                run.inputs.dense,
                train,
                test,
                head,
                tuple(form or FORMS),
                rtol=rtol,
                draws=draws,
                seed=seed,
                progress=progress,
            )
            if "sgd" in wanted and batch_size > len(train.pool):
                raise InputError(
                    f"--batch-size {batch_size} is more than the {len(train.pool)} training images there are; give at "
                    f"most that many, or more images (--data, --samples {samples})"
                )
            findings: list[Finding] = []
            for one in wanted:
                if one == "sgd":
                    settings = SGD(lr=lr, batch_size=batch_size, penalty=penalty, burn_in=steps, chains=draws)
                    findings += setting.sgd(settings)
                elif one == "quant":
                    findings += setting.quantisation(bits, per)
                elif one == "label":
                    noisy = LabelNoise(sigma=sigma, steps=steps, penalty=penalty, repeats=draws)
                    fitted = _first(train, FITTED)
                    findings += setting.labels(noisy, fitted, closed=_small(run.inputs.dense, fitted))
                else:
                    assert macs is not None
                    findings += setting.pruning(_plan(run, recipe, train, macs), f"prune, macs {macs}")
        told.append({"model": recipe.model.name, "head": head, "findings": [f.to_json() for f in findings]})
        if not as_json:
            _print_findings(recipe.model.name, findings, head)
    if as_json:
        print_json(told[0] if len(told) == 1 else told)


def _images(run: Run, recipe: Recipe, samples: int, seed: int) -> tuple[Any, Any]:
    """Batches of training and of held-out images."""
    assert recipe.data is not None or run.inputs.images  # which raises where no images are named
    assert recipe.data is not None
    run.inputs.check()
    pools: list[Pool | Stream] = [
        run.inputs.images.scored.sample(samples, seed),
        run.inputs.images.measured.sample(samples, seed),
    ]
    train, test = (pool.loader(recipe.data.batch_size, workers=recipe.data.workers) for pool in pools)
    return train, test


def _first(batches: Iterable[Any], count: int) -> list[Any]:
    """The first so many inputs, as batches held in memory."""
    found, left = [], count
    for images, *_ in batches:
        found.append(images[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    if not found:
        raise DataError("there is no batch; give images that can be read")
    return found


def _small(model: torch.nn.Module, fitted: list[Any]) -> bool:
    """Whether the training Jacobian can be held, and is made in about a minute."""
    with torch.no_grad():
        outputs = model(fitted[0][:1])
    entries = sum(map(len, fitted)) * outputs.numel() * sum(p.numel() for p in model.parameters())
    return bool(entries <= 2**25)


def _graph(run: Run, recipe: Recipe) -> Graph:
    return trace(run.inputs.dense, run.inputs.example(), depth=recipe.plan.depth, progress=run.progress)


def _plan(run: Run, recipe: Recipe, train: Any, macs: str) -> Any:
    graph = _graph(run, recipe)
    scores = score(run.inputs.dense, train, graph, TPV(), progress=run.progress)
    return allocate(scores, graph, recipe.limits().only(macs=macs), progress=run.progress)


def _print_findings(name: str, findings: list[Finding], head: str) -> None:
    rows = [
        [f.noise, f.form, _with_error(f.train), _with_error(f.test), _with_error(f.ratio), f"{f.train.samples:,}"]
        for f in findings
    ]
    out.print(f"{name}: TPV in the metric of the {head} head", highlight=False, markup=False)
    print_table(["noise", "form", "train", "held out", "train / held out", "images"], rows)
    lines = ["trace: to first order in the noise's covariance; empirical: weights changed, outputs measured."]
    if any(f.form == "rounded" for f in findings):
        lines.append("rounded: to levels at random places; what lies between the same two levels moves together.")
    if head == "softmax":
        lines.append("Half of a value is KL from the model as it is, in nats, while it is small.")
    if any(f.noise.startswith("label") for f in findings):
        lines.append(f"label: fitted on at most {FITTED} images; the closed form is made where the Jacobian is small.")
    if any(f.noise.startswith("prune") for f in findings):
        lines.append("prune: the plan is made from the training images, and so is better on them.")
    out.print("\n".join(lines), highlight=False, markup=False)


def _thousandths(kl: float) -> str:
    return f"{1000 * kl:.0f}" if kl >= 0.1 else nats(1000 * kl)


def _with_error(value: Any) -> str:
    return f"{value.value:.3g} ± {value.stderr:.1g}"


def advise(
    target: Target,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    drift: Annotated[float, typer.Option(help="KL from the dense model in nats, at most, as predicted.")] = 0.05,
    bits: Annotated[
        list[int] | None, typer.Option(help="Widths that weights may be rounded to, as --bits 8 4.", metavar="BITS")
    ] = None,
    per: Annotated[str, typer.Option(help="One range a 'tensor' or a 'channel'.")] = "channel",
    cost: Annotated[str, typer.Option(help="What is made small: bytes, or bitops (MACs times bits).")] = "bytes",
    measured: Annotated[bool, typer.Option("--measured", help="Prune and round for real, and measure.")] = False,
    out_file: Annotated[Path | None, typer.Option("--out", "-o", help="File for the plan (JSON).")] = None,
    samples: Samples = 512,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Say which layers to prune and which bit-width each can bear, under one budget of KL."""
    told = []
    for recipe, folder in resolve(target, flags(overrides, checkpoint=checkpoint, data=data), None):
        with bars() as progress:
            run = Run(recipe, folder, progress=progress, log=log_line)
            train, test = _images(run, recipe, samples, seed)
            graph = _graph(run, recipe)
            given: Any = {"per": per, "cost": cost, "budget": recipe.limits()}
            found = advised(
                run.inputs.dense, train, graph, drift, bits=tuple(bits or BITS), seed=seed, progress=progress, **given
            )
            kl = _measured(run.inputs.dense, test, found, given["per"], progress) if measured else None
        if out_file is not None:
            found.plan.save(out_file)
        told.append({"model": recipe.model.name, **found.to_json(), "measured": kl})
        if not as_json:
            _print_advice(recipe.model.name, found, kl, out_file)
    if as_json:
        print_json(told[0] if len(told) == 1 else told)


def _measured(model: Any, test: Any, found: Advice, per: Any, progress: Any) -> dict[str, float]:
    """KL on held-out images: of the cut alone, of rounding alone what is not cut, and of both."""
    cut = apply(model, found.plan)
    models = {
        "pruning": cut,
        "rounding": quantise(model, found.bits, per=per),
        "total": quantise(cut, found.bits, per=per),
    }
    metrics, _ = compare(models, model, test, progress=progress)
    return {name: one["kl"] for name, one in metrics.items()}


def _print_advice(name: str, found: Advice, kl: dict[str, float] | None, file: Path | None) -> None:
    widths = sorted({count for one in found.layers for count in one.kl_at_bits}, reverse=True)
    rows = [
        [
            one.name.removesuffix(".weight"),
            f"{one.params:,}",
            *(_thousandths(one.kl_at_bits[count]) for count in widths),
            share(one.kept),
            "float" if one.bits == FLOAT else str(one.bits),
        ]
        for one in found.layers
    ]
    say(f"{name}: KL in nats / 1000 of one layer's weights in so many bits; kept, bits: what {found.drift:g} nats buy")
    print_table(["layer", "weights", *map(str, widths), "kept", "bits"], rows)
    shares = sorted({at for one in found.groups for at in one.kl_at_share}, reverse=True)
    rows = []
    for group in found.groups:
        prices = [
            text
            for at in shares
            for text in (
                (_thousandths(group.kl_at_share[at]), share(group.saved_at_share[at]))
                if at in group.kl_at_share
                else ("-", "-")
            )
        ]
        rows.append([group.id, str(group.units), *prices, str(group.kept)])
    if rows:
        heads = [text for at in shares for text in (f"KL at {at:.0%}" if at else "KL gone", "saves")]
        say("KL in nats / 1000 with one group alone cut to a share of its units, and the MACs that saves")
        print_table(["group", "units", *heads, "kept"], rows)
    totals = [[f"all weights to {count} bits", nats(one)] for count, one in found.rounding_totals.items()]
    totals += [[f"pruned to {at:.0%} of the multiply-adds", nats(one)] for at, one in found.pruning_totals.items()]
    print_table(["predicted", "KL"], totals)
    mixes = {"mixed": found.mixed, **{f"{how} alone": mix for how, mix in found.alone.items()}}
    cells = [
        [how, nats(m.pruning), nats(m.rounding), nats(m.total), share(m.macs), f"{m.mean_bits:.2f}", share(m.cost)]
        for how, m in mixes.items()
    ]
    print_table(["spent on", "pruning", "rounding", "KL", "MACs", "bits", found.cost], cells)
    if kl is not None:
        say("measured on held-out images: " + ", ".join(f"{part} {nats(value)}" for part, value in kl.items()))
    say(f"{found.cost}: what is left, as a share of the dense model's in {FLOAT} bits; from {found.samples:,} images.")
    if file is not None:
        say(f"plan: {file}")
