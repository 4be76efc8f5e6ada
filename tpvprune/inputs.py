"""What a run works on: the device, the dense model and the images that a recipe names."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from tpvprune.batches import Progress, finite_output
from tpvprune.calls import running
from tpvprune.deploy.examples import Changed
from tpvprune.errors import BudgetError, DataError, ModelError, RecipeError
from tpvprune.planning.latency import LatencyTable, default_cache, latency_table
from tpvprune.planning.patterns import matching_groups
from tpvprune.planning.weights import weight_graph
from tpvprune.processes import launched, of_all, process
from tpvprune.recipe import Recipe
from tpvprune.scoring.criteria import Criterion
from tpvprune.types import Graph
from tpvprune.zoo.data import input_size, open_pool, overlap
from tpvprune.zoo.models import create_model
from tpvprune.zoo.pool import Loader, Pool
from tpvprune.zoo.streams import Stream, StreamLoader, shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """What is scored and recovered on, and what is measured on; the two share no image."""

    scored: Pool | Stream
    measured: Pool | Stream


class Inputs:
    """What one recipe names, opened when it is first asked for.

    Args:
        recipe: the recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def device(self) -> torch.device:
        """Where the run happens."""
        wanted = self.recipe.device
        if launched()[1] > 1 and ":" in wanted:
            raise ModelError(
                f"device {wanted!r} is one for all of {launched()[1]} processes; give device=cuda, or auto"
            )
        try:
            device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"device {wanted!r} cannot be used: {str(error).splitlines()[0]}; try device=cpu"
            ) from error
        return device

    @cached_property
    def dense(self) -> nn.Module:
        """The original model with its weights."""
        section = self.recipe.model
        return create_model(section.name, section.checkpoint, section.args, self.recipe.seed).to(self.device)

    @cached_property
    def images(self) -> Images:
        """What is scored on and what is measured on; the two share no image."""
        data, held = self.recipe.data, self.recipe.eval
        if data is None or data.images is None:
            raise DataError("no images are named; set data.images (--data) to a folder, an array file or 'digits'")
        if held.images is None:
            scored, measured = open_pool(
                data.images, self.dense, size=data.size, labels=held.labels or data.labels
            ).split()
            if not len(measured):
                count = "a single image" if len(scored) else "no image"
                more = ", and shards are counted by their name, as wds/FOLDER@shard-{0..9}.tar|5000"
                raise DataError(
                    f"{data.images} holds {count}; one to score on and one to measure on are needed"
                    f"{more if shards(data.images) is not None else ''}"
                )
        else:
            if overlap(data.images, held.images):
                raise DataError(
                    f"eval.images={held.images} and data.images={data.images} share images; give other ones, or leave "
                    "eval.images out to measure on the odd positions"
                )
            if data.labels is not None and held.labels is None:
                logger.warning(
                    "data.labels (--labels) is of data.images; for accuracy on eval.images give eval.labels too"
                )
            scored = open_pool(data.images, self.dense, size=data.size, labels=data.labels)
            measured = open_pool(held.images, self.dense, size=data.size, labels=held.labels)
        return Images(scored, measured.sample(held.samples, self.recipe.seed))

    def check(self) -> None:
        """See whether the model runs on the images that are scored.

        Raises:
            DataError: none can be read.
            ModelError: it does not run on images of that shape.
            NonFiniteError: it gives NaN or infinity for them.
        """
        first = next(iter(self.loader(self.images.scored)), None)
        if first is None:
            raise DataError(f"{self.images.scored.name}: no image can be read; give other images")
        images = first[0].to(self.device)
        with torch.no_grad(), running(self.dense, ((images,), {})):
            finite_output(self.dense, images)

    def check_zeros(self) -> None:
        """See whether layers that `sparsify` protects are there.

        Raises:
            BudgetError: a pattern matches nothing (with near names).
        """
        if self.recipe.sparsify is not None and self.recipe.sparsify.protect:
            graph = weight_graph(self.dense)
            for pattern in self.recipe.sparsify.protect:
                try:
                    matching_groups(graph, pattern)
                except BudgetError as error:
                    raise BudgetError(f"sparsify.protect: {error}") from error

    def check_distillation(self) -> None:
        """See whether there is what the distillation compares, which begins late.

        Raises:
            RecipeError: the model has no such module.
            DataError: labels are to be learnt, and there are none.
        """
        settings = self.recipe.distillation()
        if settings is None:
            return
        modules = dict(self.dense.named_modules())
        for name in settings.features:
            if not name or name not in modules:
                near = difflib.get_close_matches(name, modules, n=3)
                hint = f"did you mean {', '.join(near)}?" if near else "give names of named_modules()"
                raise RecipeError(f"recover.finetune.features: {name!r} is no module of the model; {hint}")
        if settings.label_weight and not self.images.scored.labelled:
            raise DataError(
                f"recover.finetune.label_weight={settings.label_weight} needs labels of the images that are distilled "
                "on; give them with --labels (data.labels), or leave label_weight at 0"
            )

    def loader(
        self, pool: Pool | Stream, *, batch_size: int | None = None, train: bool = False, augment: bool = False
    ) -> Loader | StreamLoader:
        """Batches of a pool, of the recipe's size and seed; several processes that train share each of them."""
        data = self.recipe.data
        assert data is not None
        return pool.loader(
            batch_size or data.batch_size,
            shuffle=train,
            augment=augment,
            workers=data.workers,
            seed=self.recipe.seed,
            share=process() if train else (0, 1),
        )

    def dealt(self, pool: Pool | Stream) -> Loader | StreamLoader:
        """Of the batches of a pool those that fall to this process; they do in turns."""
        assert self.recipe.data is not None
        (rank, world), size = process(), self.recipe.data.batch_size
        return self.loader(pool if world == 1 else pool.part(lambda place: place // size % world == rank))

    def tell_skipped(self, pool: Pool | Stream) -> None:
        """Count what any process could not read in all of them.

        Raises:
            DataError: it is too much.
        """
        pool.skipped.update({name: why for skipped in of_all(dict(pool.skipped)) for name, why in skipped.items()})
        if isinstance(pool, Pool):
            pool.check_skipped()

    def example(self) -> Tensor:
        """Zeros of one image, `(1, channels, height, width)`."""
        size = self.recipe.data.size if self.recipe.data else None
        return torch.zeros(1, *input_size(self.dense, size), device=self.device)

    def latency(self, graph: Graph, progress: Progress | None) -> LatencyTable | None:
        """A table of this machine, where milliseconds are planned by; measured once and kept between runs."""
        recipe = self.recipe
        if recipe.budget.latency_ms is None and recipe.plan.per != "latency_ms":
            return None
        example = self.example().expand(recipe.latency.batch_size, -1, -1, -1).contiguous()
        compiled, cache = recipe.latency.compiled, default_cache()
        return latency_table(self.dense, graph, example, compiled=compiled, cache=cache, progress=progress)

    def scored(self) -> Pool | Stream:
        """The images that scores are made of."""
        return self.images.scored.sample(self.recipe.score.samples, self.recipe.seed)

    def criterion(self) -> Criterion:
        """How those images are scored."""
        return self.recipe.criterion(len(self.scored()))

    def changed(self, model: str) -> Changed:
        """Collects images whose answer changed; those of a folder were normalised, and are shown as they were."""
        data, held = self.recipe.data, self.recipe.eval
        assert data is not None
        images = held.images or data.images
        assert images is not None
        known = getattr(self.dense, "pretrained_cfg", None) or {}
        scale = (known.get("mean", ()), known.get("std", ())) if Path(images).is_dir() else ((), ())
        return Changed(model, held.examples, *scale)
