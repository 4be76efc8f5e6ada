"""What a run works on: the device, the dense model and the images that a recipe names."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from tpvprune.batches import Progress
from tpvprune.deploy.examples import Changed
from tpvprune.errors import DataError, ModelError
from tpvprune.planning.latency import LatencyTable, default_cache, latency_table
from tpvprune.processes import launched, of_all, process
from tpvprune.recipe import Recipe
from tpvprune.scoring.criteria import Criterion
from tpvprune.types import Graph
from tpvprune.zoo.data import input_size, open_pool, overlap
from tpvprune.zoo.models import create_model
from tpvprune.zoo.pool import Loader, Pool
from tpvprune.zoo.streams import Stream, StreamLoader

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
                raise DataError(f"{data.images} holds a single image; one to score on and one to measure on are needed")
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
