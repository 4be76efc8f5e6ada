"""Each noise in both forms, on training and on held-out inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from tpvprune.analysis.empirical import moved_by, movements
from tpvprune.analysis.estimate import tpv
from tpvprune.analysis.labelnoise import LabelNoise, label_noise_closed, label_noise_movements
from tpvprune.analysis.perturbations import Change, RandomGrid, sgd_noise
from tpvprune.analysis.sgd import SGD, sgd_movements
from tpvprune.analysis.values import Estimate, crossed, crossed_ratio
from tpvprune.batches import Batch, Progress, Selector, inputs_of
from tpvprune.errors import InputError
from tpvprune.plan import Plan
from tpvprune.scoring.heads import Head
from tpvprune.scoring.perturb import Rounding
from tpvprune.surgery.removal import apply

FORMS = ("trace", "empirical")


@dataclass(frozen=True)
class Finding:
    """One noise in one form.

    Attributes:
        noise: what was done to the weights, with its settings.
        form: "trace" or "empirical"; "closed" for label noise, "rounded" for weights that lie on a grid.
        train: TPV on the training inputs.
        test: TPV on held-out inputs.
        ratio: of the two, train over test, with an error that knows of draws that both share.
    """

    noise: str
    form: str
    train: Estimate
    test: Estimate
    ratio: Estimate

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """What every noise is measured with.

    Attributes:
        model: it is left as it was.
        train: unlabeled training inputs, readable more than once.
        test: held-out inputs, readable more than once.
        head: the metric.
        forms: which of "trace" and "empirical".
        rtol: of traces; None reads all batches.
        draws: of the empirical form.
        seed: of all that is drawn.
        output: which part of what the model returns counts.
        progress: called as `progress(stage, done, total)`.
    """

    model: nn.Module
    train: Iterable[Batch]
    test: Iterable[Batch]
    head: str | Head = "softmax"
    forms: Sequence[str] = FORMS
    rtol: float | None = 0.05
    draws: int = 16
    seed: int = 0
    output: Selector = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        strange = [form for form in self.forms if form not in FORMS]
        if strange or not self.forms:
            raise InputError(f"forms={list(self.forms)!r} must be some of {', '.join(FORMS)}")

    def _traces(self, noise: str, change: Change | Plan) -> Iterable[Finding]:
        if "trace" not in self.forms:
            return
        one, other = (
            tpv(
                self.model,
                batches,
                change,
                self.head,
                rtol=self.rtol,
                seed=self.seed + place,
                output=self.output,
                progress=self.progress,
            )
            for place, batches in enumerate((self.train, self.test))
        )
        yield Finding(noise, "trace", one, other, one.over(other))

    def _found(self, noise: str, form: str, measure: Callable[[Iterable[Batch]], Tensor]) -> Finding:
        return found(noise, form, measure(self.train), measure(self.test))

    def _common(self) -> dict[str, Any]:
        return {"seed": self.seed, "output": self.output, "progress": self.progress}

    @property
    def _sets(self) -> Mapping[str, Iterable[Batch]]:
        return {"train": self.train, "test": self.test}

    def _drawn(self, noise: str, form: str, change: Change) -> Finding:
        return self._found(
            noise,
            form,
            lambda batches: movements(self.model, batches, change, self.head, draws=self.draws, **self._common()),
        )

    def perturbed(self, noise: str, change: Change) -> list[Finding]:
        """Any perturbation."""
        drawn = [self._drawn(noise, "empirical", change)] if "empirical" in self.forms else []
        return [*self._traces(noise, change), *drawn]

    def quantisation(self, bits: int, per: Any = "tensor") -> list[Finding]:
        """Rounding to `2^bits` levels: independent noise, and weights that are rounded to levels at random places."""
        noise = f"quant, {bits} bits a {per}"
        found = self.perturbed(noise, Rounding(bits, per))
        return [*found, self._drawn(noise, "rounded", RandomGrid(bits, per))] if "empirical" in self.forms else found

    def pruning(self, plan: Plan, name: str = "prune") -> list[Finding]:
        """A plan: predicted, and applied."""
        findings = list(self._traces(name, plan))
        if "empirical" in self.forms:
            small = apply(self.model, plan)

            def measure(some: Iterable[Batch]) -> Tensor:
                return moved_by(self.model, small, some, self.head, output=self.output, progress=self.progress)

            findings.append(self._found(name, "empirical", measure))
        return findings

    def sgd(self, settings: SGD | None = None) -> list[Finding]:
        """Steps of SGD around the weights."""
        settings = settings or SGD()
        noise = f"sgd, lr {settings.lr:g}, batch {settings.batch_size}"
        findings = list(self._traces(noise, sgd_noise(settings.lr, settings.batch_size)))
        if "empirical" in self.forms:
            moved = sgd_movements(self.model, self.train, self._sets, settings, self.head, **self._common())
            findings.append(found(noise, "empirical", moved["train"], moved["test"]))
        return findings

    def labels(
        self, settings: LabelNoise | None = None, fitted: Iterable[Batch] | None = None, closed: bool = True
    ) -> list[Finding]:
        """Noise on targets.

        Args:
            settings: of the noise and of fine-tuning; its penalty holds in both forms.
            fitted: inputs that are fitted, and that "train" is measured on; all training inputs if left out.
            closed: whether the trace form is the closed one; without it there is none.
        """
        settings = settings or LabelNoise()
        some = self.train if fitted is None else fitted
        noise, sets, findings = f"label, sigma {settings.sigma:g}", {"train": some, "test": self.test}, []
        if "trace" in self.forms and closed:
            # Fine-tuning follows a mean over inputs, the closed form is of their sum.
            inputs = sum(len(inputs_of(batch)) for batch in some) if settings.penalty else 0
            moved = label_noise_closed(
                self.model,
                some,
                sets,
                settings.sigma,
                self.head,
                ridge=settings.penalty * inputs,
                output=self.output,
                progress=self.progress,
            )
            findings.append(found(noise, "closed", moved["train"], moved["test"]))
        if "empirical" in self.forms:
            moved = label_noise_movements(self.model, some, sets, settings, self.head, **self._common())
            findings.append(found(noise, "empirical", moved["train"], moved["test"]))
        return findings


def found(noise: str, form: str, train: Tensor, test: Tensor) -> Finding:
    """A finding from movements `(draws, inputs)` on the two sets of inputs."""
    return Finding(noise, form, crossed(train), crossed(test), crossed_ratio(train, test))
