"""Measure models before and after, honestly, and put it into a `Report`."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.batches import (
    Batch,
    Progress,
    Selector,
    device_of,
    evaluation_mode,
    finite_output,
    inputs_of,
    is_classifier,
    labels_of,
    length_of,
)
from tpvprune.budget import Budget
from tpvprune.digests import tensor_digest
from tpvprune.errors import DataError
from tpvprune.measures import REPORT_FORMAT, Measure, Report
from tpvprune.plan import Plan, drift_of
from tpvprune.planning.latency import LatencyTable
from tpvprune.planning.widths import costs_of
from tpvprune.timing import device_name, latencies
from tpvprune.types import check_format, read_json

Each = Callable[[Tensor, Tensor, Mapping[str, Tensor], "Tensor | None"], None]
PACKAGES = ("tpvprune", "torch", "timm", "numpy")
logger = logging.getLogger(__name__)
KEPT = 1 << 28  # bytes of a model's answers


class Answers:
    """What a model answers, kept by what it was asked: plans are measured against the dense one time and again.

    On a CPU alone, where a pass takes far longer than to know inputs again.

    Args:
        model: its weights stay as they are.
        output: which part of what it returns counts.
    """

    def __init__(self, model: nn.Module, output: Selector = None) -> None:
        self.model, self.output = model, output
        self._kept, self._room = dict[str, Tensor](), KEPT

    def __call__(self, inputs: Tensor) -> Tensor:
        """The output, `(batch, ...)`.

        Raises:
            NonFiniteError: it holds NaN or infinity.
        """
        if inputs.device.type != "cpu":
            return finite_output(self.model, inputs, self.output)
        key = tensor_digest(inputs)
        found = self._kept.get(key)
        if found is None:
            found = finite_output(self.model, inputs, self.output)
            if found.nbytes <= self._room:
                self._kept[key], self._room = found, self._room - found.nbytes
        return found


@torch.no_grad()
def compare(
    models: Mapping[str, nn.Module],
    dense: nn.Module,
    batches: Iterable[Batch],
    *,
    output: Selector = None,
    kept: Answers | None = None,
    labelled: bool = True,
    each: Each | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, float]], int]:
    """Drift of several models from the dense one, and accuracy where the batches hold labels.

    Args:
        models: by name; the dense one may be among them.
        dense: the reference.
        batches: held-out inputs, with labels (-1: none) or without.
        output: which part of what the models return is compared.
        kept: what the reference answers, of the same output, where that is kept from call to call.
        labelled: whether labels are looked at. Those that are no numbers of classes are told, and do not count.
        each: called once a batch with the inputs, the dense model's output, all outputs by name, and the labels or
            None.
        progress: called as `progress("eval", batches_done, batches_to_do)`.

    Returns:
        Per model `kl` (nats, mean of KL(dense || model)), `agreement` (share of equal top-1) and `top1`
        (if labelled); for outputs that are not `(batch, classes)` the mean squared distance `mse`.
        And the number of images.

    Raises:
        DataError: there is no batch.
        NonFiniteError: a model gives NaN or infinity.
    """
    sums = {name: dict[str, float]() for name in models}
    images = told = 0
    unfit: str | None = None
    total, asked = length_of(batches), kept or partial(finite_output, dense, select=output)
    with evaluation_mode(dense, *models.values()):
        for number, batch in enumerate(batches, 1):
            inputs = inputs_of(batch).to(device_of(dense))
            labels = labels_of(batch) if labelled else None
            reference = asked(inputs)
            images += len(inputs)
            if labels is not None and labels.ndim == 1 and is_classifier(reference):
                unfit = unfit or _no_classes(labels, *reference.shape)
            labels = None if unfit else labels
            known = labels is not None and labels.ndim == 1 and bool((labels >= 0).any())
            told += int((labels >= 0).sum()) if known and labels is not None else 0
            answers = {n: reference if m is dense else finite_output(m, inputs, output) for n, m in models.items()}
            for name, answer in answers.items():
                for key, value in _distances(reference, answer, labels if known else None).items():
                    sums[name][key] = sums[name].get(key, 0.0) + value
            if each:
                each(inputs, reference, answers, labels)
            if progress:
                progress("eval", number, total)
    if images == 0:
        raise DataError("there is no image to measure on; give at least one batch")
    if unfit:
        logger.warning(
            "no top-1 is told, because %s; give (inputs, labels) with a number of a class for each input, -1 for none, "
            "or inputs alone",
            unfit,
        )
        for found in sums.values():
            found.pop("top1", None)
    counts = {"top1": told}
    return {
        name: {key: value / counts.get(key, images) for key, value in found.items()} for name, found in sums.items()
    }, images


def _no_classes(labels: Tensor, samples: int, classes: int) -> str | None:
    """Why labels `(batch,)` are no numbers of classes; None where they are."""
    if labels.is_floating_point() or labels.is_complex():
        return f"labels are of {labels.dtype}"
    if len(labels) != samples:
        return f"there are {len(labels)} labels for {samples} inputs of a batch"
    if samples and int(labels.max()) >= classes:
        return f"label {int(labels.max())} is none of the model's {classes} classes, 0 to {classes - 1}"
    return None


def _distances(reference: Tensor, output: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Sums over the batch."""
    if not is_classifier(output):
        return {"mse": float((output - reference).double().square().flatten(1).mean(1).sum())}
    p, q = reference.double().log_softmax(1), output.double().log_softmax(1)
    top = output.argmax(1)
    sums = {
        "kl": float(F.kl_div(q, p, reduction="sum", log_target=True)),
        "agreement": float((top == reference.argmax(1)).sum()),
    }
    if labels is not None:
        sums["top1"] = float((top == labels.to(top.device)).sum())  # -1, for none, is no class
    return sums


def environment(latency_batch: int, device: torch.device) -> dict[str, Any]:
    """Versions, machine and how latency was taken."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return {
        "python": sys.version.split()[0],
        "versions": versions,
        "device": f"{device.type}: {device_name(device)}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "latency": f"median of one eager forward pass, batch {latency_batch}",
    }


def stored_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A report as it was written.

    Raises:
        PlanError: the file is missing, broken or of another version.
    """
    found = read_json(path, "report")
    check_format(found, REPORT_FORMAT, f"report {path}")
    return dict(found)


def asked_and_got(
    budget: Budget, plan: Plan, latency: LatencyTable | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per bounded cost, what was written and its absolute value; and what the plan comes to, with its share."""
    asked: dict[str, Any] = {}
    got: dict[str, Any] = {}
    for name in budget.quantities:
        dense, left = (costs_of(name, plan.graph, keep, latency=latency).total for keep in (None, plan.keep))
        asked[name] = {"as_written": budget.as_written[name], "at_most": budget.bound(name, dense)}
        got[name] = {"value": left, "share": left / dense}
    if budget.most_drift is not None:
        asked["drift"] = {"as_written": budget.as_written["drift"], "at_most": budget.most_drift}
        got["drift"] = {"value": drift_of(plan.made_by), "share": None}
    return asked, got


def build(
    *,
    dense: nn.Module,
    pruned: nn.Module,
    recovered: nn.Module | None,
    plan: Plan,
    budget: Budget,
    batches: Iterable[Batch],
    predicted: float | None,
    seconds: Mapping[str, float],
    data: Mapping[str, Any],
    output: Selector = None,
    latency: LatencyTable | None = None,
    latency_batch: int = 8,
    steps: Iterable[Mapping[str, Any]] = (),
    labelled: bool = True,
    each: Each | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure the three models on the same held-out batches and write the report.

    Args:
        dense: the original.
        pruned: from `apply`.
        recovered: from `recover`, or None.
        plan: what was removed.
        budget: what was asked.
        batches: images that the scorer did not see.
        predicted: the scorer's first-order KL of the plan in nats, or None.
        seconds: per stage so far.
        data: what each stage saw.
        output: see `compare`.
        latency: what milliseconds were planned by.
        latency_batch: examples of the batch that is timed.
        steps: what was done, in order.
        labelled: see `compare`.
        each: see `compare`.
        progress: see `compare`.

    Raises:
        DataError: there is no batch.
        NonFiniteError: a model gives NaN or infinity.
    """
    start = time.perf_counter()
    models = {"before": dense, "pruned": pruned} | ({"recovered": recovered} if recovered is not None else {})
    metrics, images = compare(models, dense, batches, output=output, labelled=labelled, each=each, progress=progress)
    sample = inputs_of(next(iter(batches))).to(device_of(dense))[:latency_batch]
    if len(sample) < latency_batch:
        sample = sample.repeat(-(-latency_batch // len(sample)), *[1] * (sample.ndim - 1))[:latency_batch]
    taken = latencies(models, sample)
    graph = plan.graph
    costs = {"before": (graph.params(), graph.macs()), "pruned": (plan.params, plan.macs)}
    measures = {name: Measure(*costs.get(name, costs["pruned"]), taken[name], metrics[name]) for name in models}
    asked, got = asked_and_got(budget, plan, latency)
    if "latency_ms" in got:  # what was predicted; measured on the model that came out
        got["latency_ms"]["measured"] = taken[list(models)[-1]]
    drift = {
        "predicted_kl": predicted,
        "pruned_kl": metrics["pruned"].get("kl"),
        "pruned_agreement": metrics["pruned"].get("agreement"),
        "recovered_kl": metrics.get("recovered", {}).get("kl"),
        "recovered_agreement": metrics.get("recovered", {}).get("agreement"),
    }
    return Report(
        asked=asked,
        got=got,
        before=measures["before"],
        pruned=measures["pruned"],
        recovered=measures.get("recovered"),
        drift=drift,
        steps=tuple(steps),
        seconds={**seconds, "eval": round(time.perf_counter() - start, 2)},
        data={**data, "measured": images},
        environment=environment(len(sample), device_of(dense)),
    )
