"""The sections of a recipe: strict, with the fields and defaults of the settings that they turn into."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Optional, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from tpvprune.budget import BOUNDS, Budget, n_of_m
from tpvprune.recovery.reconstruct import Reconstruct
from tpvprune.recovery.settings import Finetune, GaussNewton
from tpvprune.schedule import Planning
from tpvprune.scoring.heads import HEADS
from tpvprune.scoring.registry import CRITERIA
from tpvprune.scoring.tpv import TPV


class Strict(BaseModel):
    """Frozen; takes no unknown key and no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _section_of(settings: type, name: str, /, without: Sequence[str] = (), **more: Any) -> Any:
    """A strict recipe section with a settings dataclass's fields and defaults but for some, and `more` of its own."""
    hints = get_type_hints(settings)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if field.name in more or field.name in without:
            continue
        fields[field.name] = (hints[field.name], field.default)
    return create_model(name, __base__=Strict, **fields, **more)


def _named(text: str) -> str:
    if not text.strip():
        raise ValueError("nothing is named; give a path, or leave the key out")
    return text


Named = Annotated[str, AfterValidator(_named)]  # an empty path would be the current folder


class ModelSection(Strict):
    """Which network: a timm name or `cifar_resnet20` and the like, its weights, its arguments."""

    name: str
    checkpoint: Named | None = None
    args: dict[str, Any] = Field(default_factory=dict)


class DataSection(Strict):
    """Unlabeled images, see `open_pool`. `labels` are measured with, and read by what asks for them by its name."""

    images: Named | None = None  # for a recipe that leaves them to the command line
    labels: Named | None = None
    size: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=64, ge=1)
    workers: int = Field(default=0, ge=0)


class EvalSection(Strict):
    """Images to measure on. Without `images`: the odd positions of `data`, and scoring keeps to the even ones."""

    images: Named | None = None
    labels: Named | None = None
    samples: int | None = Field(default=None, ge=1)
    examples: int = Field(default=12, ge=0)  # thumbnails of images whose answer changed, for the report


ScoreSection: Any = _section_of(
    TPV,
    "ScoreSection",
    # An object, no ranking to prune by, and no timm model returns anything but a tensor.
    without=("reference", "perturbation", "output"),
    criterion=(Literal[tuple(CRITERIA)], "tpv"),
    head=(Literal[tuple(sorted(HEADS))], "softmax"),
    engine=(Literal["auto", "activations", "batched", "per_sample"], "auto"),  # factored: of single weights alone
    compensated=(bool | None, None),  # None: if a refit follows
    probes=(int | Literal["exact"] | None, None),  # None: 1, and more where there are few images, see `probes_for`
    samples=(int | None, Field(default=1280, ge=1)),
)
_ANY_BOUND: Any = dict.fromkeys(BOUNDS, (float | str | None, None))
BudgetSection: Any = _section_of(
    Budget,
    "BudgetSection",
    **_ANY_BOUND,
    per_group=(dict[str, float], Field(default_factory=dict)),
)
ReconstructSection: Any = _section_of(
    Reconstruct, "ReconstructSection", samples=(int | None, Field(default=1000, ge=1))
)
# On the images of the closed form.
RefineSection: Any = _section_of(GaussNewton, "RefineSection", augment=(bool, True))
FinetuneSection: Any = _section_of(
    Finetune,
    "FinetuneSection",
    samples=(int | None, Field(default=None, ge=1)),
    batch_size=(int | None, Field(default=None, ge=1)),
    augment=(bool, True),
    # YAML 1.1 reads the word `no` as false.
    precision=(Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(lambda v: "no" if v is False else v)], "no"),
)


PlanSection: Any = _section_of(
    Planning,
    "PlanSection",
    depth=(bool, False),  # whether residual blocks may be skipped as a whole, see `trace`
    trace_seconds=(float | None, Field(default=None, gt=0)),  # to give up tracing after
)


class SparsifySection(Strict):
    """Single weights held at zero in what the cut leaves: a share of them, or N of every M. See `sparsify`."""

    sparsity: float | None = Field(default=None, gt=0, lt=1)
    pattern: str | None = Field(default=None, pattern=r"^\d+:\d+$")
    scope: Literal["global", "layer"] = "global"
    protect: tuple[str, ...] = ()
    criterion: Literal["l1", "tpv"] | None = None  # None: "tpv", compensated, if a refit follows, else "l1"

    @model_validator(mode="after")
    def _one_of_two(self) -> SparsifySection:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity, as 0.5, or pattern, as '2:4'")
        if self.pattern is not None:
            n_of_m(self.pattern)
        return self


class LatencySection(Strict):
    """What milliseconds are measured with: the batch, and whether the model runs under `torch.compile`."""

    batch_size: int = Field(default=8, ge=1)
    compiled: bool = False


class RecoverSection(Strict):
    """What follows the cut; null leaves a step out."""

    reconstruct: Optional[ReconstructSection] = Field(default_factory=ReconstructSection)  # noqa: UP045
    refine: Optional[RefineSection] = None  # noqa: UP045
    fold: bool = False
    batchnorm: bool = False
    finetune: Optional[FinetuneSection] = Field(default_factory=FinetuneSection)  # noqa: UP045
