"""Observations from weight gradients: single weights, blocks, and any perturbation of any unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Outputs, Progress, finite_outputs, model_inputs
from tpvprune.errors import InputError, ModelError
from tpvprune.scoring.activations import backward, tensors
from tpvprune.scoring.engine import Parts, global_number, stream, wide
from tpvprune.scoring.gradients import (
    Captured,
    Side,
    factor_of_inputs,
    factor_of_slopes,
    from_factors,
    layers_of,
    only,
    score_gradient,
    sides,
)
from tpvprune.scoring.layout import outermost
from tpvprune.scoring.perturb import Perturbation
from tpvprune.scoring.probing import Probing, detached
from tpvprune.scoring.streaming import Observation
from tpvprune.tally import Tally
from tpvprune.types import Graph


def gradient_observations(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    probing: Probing,
    perturbation: Perturbation,
    engine: str,
    over: str,
    first: int,
    progress: Progress | None,
) -> Iterator[Observation]:
    """One observation a batch; see `gradients` for the engines.

    Raises:
        InputError: the engine cannot score these units.
        ModelError: a layer is of a kind the engine does not know.
    """
    parts = sides(model, graph, perturbation, over)
    if engine == "factored" and any(side.member.index is not None for own in parts.values() for side in own):
        raise InputError("engine='factored' scores single weights; take blocks of (1, 1), or engine='batched'")
    if engine == "factored" and any(group.kind != "weight" for group in graph.groups):
        raise InputError("engine='factored' scores single weights; give a graph from weight_graph")
    work: Any = {"batched": _batched, "per_sample": _per_sample, "factored": _factored}[engine]
    splitter, captured = Parts(), None if engine == "batched" else Captured(model, list(layers_of(parts)))
    for local, inputs in enumerate(model_inputs(model, batches, "score", progress)):
        generators = probing.generators(first + local)
        signs = _signs(probing, first + local, len(inputs))

        def run(
            part: slice, inputs: Tensor = inputs, generators: list[torch.Generator] = generators, signs: Tensor = signs
        ) -> Any:
            return work(model, inputs[part], parts, probing, generators, over, captured or signs[part])

        found = splitter(len(inputs), run, generators)
        if engine == "batched":
            yield Observation(_of_gradients(found, parts, probing, len(inputs), over))
        else:
            tally = Tally()
            for one in found:
                tally = tally + one
            yield Observation(Tally(tally.sums, tally.samples, tally.squares, tally.rows, 1))


def _batched(
    model: nn.Module,
    inputs: Tensor,
    parts: Mapping[str, Sequence[Side]],
    probing: Probing,
    generators: list[torch.Generator],
    over: str,
    signs: Tensor,
) -> dict[str, Tensor]:
    """Gradients of one part of a batch, one a probe, `(probes, *weight)` per parameter."""
    names = list(parts)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with only(model, names) as wanted, torch.enable_grad():
        output = finite_outputs(model, inputs, probing.output)
        _check_reached(output)
        for cotangent, last in probing.cotangents(detached(output), generators):
            cotangent = _signed(cotangent, signs)
            for name, parameter, gradient in zip(
                names, wanted, backward(output, cotangent, wanted, keep_graph=not last), strict=True
            ):
                found[name].append(torch.zeros_like(parameter) if gradient is None else gradient.detach())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def _signs(probing: Probing, batch: int, samples: int) -> Tensor:
    """A sign for each sample of a batch: random where the cotangents are not, one otherwise."""
    if probing.probes != "exact":
        return torch.ones(samples)
    generator = stream(probing.seed, global_number(batch), 0)
    return torch.randint(0, 2, (samples,), generator=generator) * 2.0 - 1.0


def _signed(cotangent: Outputs, signs: Tensor) -> Outputs:
    if isinstance(cotangent, dict):
        return {name: _signed(value, signs) for name, value in cotangent.items()}  # type: ignore[misc]
    return cotangent * signs.to(cotangent).reshape(-1, *(1,) * (cotangent.ndim - 1))


def _check_reached(output: Tensor | dict[str, Tensor]) -> None:
    if not any(value.requires_grad for value in tensors(output)):
        raise ModelError("no weight of the graph is on the way to the model's output")


def row_of(
    found: Sequence[Mapping[str, Tensor]], parts: Mapping[str, Sequence[Side]], coherent: bool, shared: int = 1
) -> dict[str, Tensor]:
    """What the gradient of a whole batch says of every unit, `(1, units)` per group, to be summed over batches.

    Single weights, which are many, in their own type, others in float64; nothing is squared in half precision.

    Args:
        found: gradients of each part of the batch, `(draws, *weight)` per parameter; squares of draws are added up.
        parts: from `sides`.
        coherent: see `score_gradient`.
        shared: what the gradients are divided by.
    """
    whole = {name: sum(wide(one[name]) for one in found) / shared for name in found[0]}
    loose = {side.group for own in parts.values() for side in own if side.member.dim is None}
    units = score_gradient(whole, parts, coherent)  # type: ignore[arg-type]
    return {group: (v if group in loose else v.double()).sum(0, keepdim=True) for group, v in units.items()}


def _of_gradients(
    found: list[dict[str, Tensor]], parts: Mapping[str, Sequence[Side]], probing: Probing, batch: int, over: str
) -> Tally:
    """The square of a batch's whole gradient over its size: one row that stands for the batch."""
    rows = row_of(found, parts, over == "consume")
    return Tally.of_rows({group: v / (probing.count * batch) for group, v in rows.items()}, stands_for=batch)


def _per_sample(
    model: nn.Module,
    inputs: Tensor,
    parts: Mapping[str, Sequence[Side]],
    probing: Probing,
    generators: list[torch.Generator],
    over: str,
    captured: Captured,
) -> Tally:
    """The tally of one part of a batch, a row a sample.

    A unit whose weights lie in several layers needs the gradients of all of them at once; layer after layer is
    enough where each unit lies in one, as single weights and blocks do.
    """
    batch, layers = len(inputs), layers_of(parts)
    units = {side.group: side.units for own in parts.values() for side in own}
    homes: dict[str, set[str]] = {}
    for name, own in parts.items():
        for side in own:
            homes.setdefault(side.group, set()).add(name)
    alone = all(len(names) == 1 for names in homes.values())
    like = next(model.parameters())
    many = any(side.member.dim is None for own in parts.values() for side in own)
    kind = torch.float32 if many and like.dtype != torch.float64 else torch.float64
    probes = list[dict[str, list[Tensor]]]()
    with only(model, []), captured(inputs) as seen, torch.enable_grad():
        output = finite_outputs(model, inputs, probing.output)
        _check_reached(output)
        names, ends = seen.ends()
        for cotangent, last in probing.cotangents(detached(output), generators):
            slopes: dict[str, list[Tensor]] = {name: [] for name in layers}
            found = backward(output, cotangent, ends, keep_graph=not last)
            for name, end, slope in zip(names, ends, found, strict=True):
                slopes[name].append(torch.zeros_like(end) if slope is None else slope.detach())
            probes.append(slopes)
        if alone:
            tally: dict[str, Tally] = {}
            for layer, name in layers.items():
                pieces = zip(*(seen.sample_gradients(layer, slopes[layer], batch) for slopes in probes), strict=True)
                for piece in pieces:
                    rows = _mean_rows([{name: gradient} for _, gradient in piece], parts, probing, over)
                    for group, value in rows.items():
                        tally[group] = tally.get(group, Tally()) + Tally.of_rows({group: value.to(kind)})
            one = next(iter(tally.values()))
            return Tally({g: t.sums[g] for g, t in tally.items()}, one.samples, one.squares, one.rows, 1)
        values = {g: torch.zeros(batch, count, dtype=torch.float64, device=like.device) for g, count in units.items()}
        for slopes in probes:
            gradients = {
                name: torch.cat([g for _, g in seen.sample_gradients(layer, slopes[layer], batch)])
                for layer, name in layers.items()
            }
            for group, value in _mean_rows([gradients], parts, probing, over).items():
                values[group] += value
        return Tally.of_rows(values)


def _mean_rows(
    gradients: list[dict[str, Tensor]], parts: Mapping[str, Sequence[Side]], probing: Probing, over: str
) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    for one in gradients:
        for group, value in score_gradient(one, parts, over == "consume").items():
            rows[group] = rows[group] + value if group in rows else value
    return {group: value / probing.count for group, value in rows.items()}


def _factored(
    model: nn.Module,
    inputs: Tensor,
    parts: Mapping[str, Sequence[Side]],
    probing: Probing,
    generators: list[torch.Generator],
    over: str,
    captured: Captured,
) -> Tally:
    """The tally of the two factors of every weight, one row for the part."""
    batch, layers = len(inputs), layers_of(parts)
    sums: dict[str, Tensor] = {}

    def add(key: str, value: Tensor) -> None:
        sums[key] = sums[key] + value if key in sums else value

    with only(model, []), captured(inputs) as seen, torch.enable_grad():
        output = finite_outputs(model, inputs, probing.output)
        _check_reached(output)
        names, ends = seen.ends()
        calls = [module for name in layers for module in seen.calls[name]]
        for name in layers:
            add(f"{layers[name]}#read", factor_of_inputs(seen.calls[name], seen.inputs[name], batch))
        for cotangent, last in probing.cotangents(detached(output), generators):
            found = backward(output, cotangent, ends, keep_graph=not last)
            for name, module, end, slope in zip(names, calls, ends, found, strict=True):
                slope = outermost(torch.zeros_like(end) if slope is None else slope.detach(), seen.axis(module))
                add(f"{layers[name]}#written", factor_of_slopes(module, slope, batch) / probing.count)
    rows = {key: (value / batch).unsqueeze(0).flatten(1) for key, value in sums.items()}
    return Tally.of_rows(rows, stands_for=batch)


def factored_scores(
    means: Mapping[str, Tensor], model: nn.Module, graph: Graph, perturbation: Perturbation
) -> dict[str, Tensor]:
    """Scores of single weights from the means of the factors."""
    parts = sides(model, graph, perturbation, "consume")
    out: dict[str, Tensor] = {}
    for layer, name in layers_of(parts).items():
        module = model.get_submodule(layer)
        groups = int(getattr(module, "groups", 1))
        read, written = (means[f"{name}#{kind}"] for kind in ("read", "written"))
        for side in parts[name]:
            energy = from_factors(module, read.reshape(groups, -1), written.reshape(groups, -1))
            total = torch.zeros_like(energy)
            for moment in (None if side.mean is None else side.mean.square(), side.variance):
                if moment is not None:
                    total = total + energy * moment.to(energy)
            out[side.group] = side.fold(total)
    return out
