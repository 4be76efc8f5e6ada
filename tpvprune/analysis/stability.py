"""TPV on training inputs against TPV on held-out ones, over any grid of settings (Arpit 2026, arXiv 2512.11089).

A network that is wide enough for its data moves alike on inputs it was trained on and on others, so that TPV can be
known without held-out inputs. Plotted against each other the two lie on the diagonal; how far off they are, and where
that breaks, is what this measures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpvprune.analysis.noises import Finding, Setting
from tpvprune.analysis.values import rank_correlation
from tpvprune.batches import Batch, Progress
from tpvprune.errors import InputError
from tpvprune.scoring.perturb import Isotropic

Case = tuple[nn.Module, Iterable[Batch], Iterable[Batch]]
Measures = Callable[[Setting], Iterable[Finding]]


@dataclass(frozen=True)
class StabilityPoint:
    """One model.

    Attributes:
        setting: what it was made with.
        findings: each noise in each form.
    """

    setting: Mapping[str, Any]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Stability:
    """What `stability` found.

    Attributes:
        points: one for each setting, in order.
    """

    points: tuple[StabilityPoint, ...]

    def where(self, **setting: Any) -> Stability:
        """The points whose setting has these values.

        Raises:
            InputError: there is none.
        """
        left = [p for p in self.points if all(p.setting.get(name) == value for name, value in setting.items())]
        if not left:
            raise InputError(f"no point has {', '.join(f'{k}={v!r}' for k, v in setting.items())}")
        return Stability(tuple(left))

    def of(self, noise: str, form: str) -> list[Finding]:
        """One noise's findings in one form, whose name begins with `noise`, in the order of the points.

        Raises:
            InputError: there is none.
        """
        left = [f for p in self.points for f in p.findings if f.noise.startswith(noise) and f.form == form]
        if not left:
            known = sorted({f"{f.noise} ({f.form})" for p in self.points for f in p.findings})
            raise InputError(f"there is no {noise} ({form}); there are {', '.join(known)}")
        return left

    def off_diagonal(self, noise: str, form: str) -> float:
        """Typical factor between train and test, one if equal: `exp` of the root mean square of the log ratio."""
        logs = [math.log(f.ratio.value) ** 2 for f in self.of(noise, form)]
        return math.exp(math.sqrt(sum(logs) / len(logs)))

    def rank_correlation(self, noise: str, form: str) -> float:
        """Spearman's, of train with test over the points."""
        found = self.of(noise, form)
        train, test = (torch.tensor([getattr(f, side).value for f in found]) for side in ("train", "test"))
        return rank_correlation(train, test)

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON-ready form."""
        return [{"setting": dict(p.setting), "findings": [f.to_json() for f in p.findings]} for p in self.points]


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of values, by name: the last name changes fastest.

    Args:
        values: for each name what it takes on, as `width=(1, 4, 16)`.
    """
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def stability(
    make: Callable[..., Case],
    settings: Iterable[Mapping[str, Any]],
    measures: Sequence[Measures] = (),
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Stability:
    """Measure TPV on training and on held-out inputs of a model for each setting.

    Args:
        make: called as `make(**setting)`; gives a trained model, its training inputs and held-out ones.
        settings: as from `grid(width=(1, 4, 16), samples=(10, 1000))`.
        measures: functions of a `Setting` that give findings, as `lambda s: s.sgd()`; independent noise of standard
            deviation 0.01 on every weight if there is none.
        progress: called as `progress("stability", points_done, points_to_do)`.
        options: of `Setting`: head, forms, rtol, draws, seed, output.

    Raises:
        InputError: there is no setting, or what is measured refuses one.
    """
    todo = [dict(one) for one in settings]
    if not todo:
        raise InputError("there is no setting; give some, as grid(width=(1, 16), samples=(10, 1000))")
    wanted = tuple(measures) or (lambda s: s.perturbed("isotropic, sigma 0.01", Isotropic(0.01)),)
    points = []
    for number, one in enumerate(todo, 1):
        model, train, test = make(**one)
        case = Setting(model, train, test, **options)
        points.append(StabilityPoint(one, tuple(f for measure in wanted for f in measure(case))))
        if progress:
            progress("stability", number, len(todo))
    return Stability(tuple(points))
