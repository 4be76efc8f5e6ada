"""Importance of every unit, as a value that is saved once and used for any number of budgets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, isfinite

from tpvprune.errors import PlanError
from tpvprune.files import write_bytes
from tpvprune.types import check_format

SCORES_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of every unit: what the outputs are predicted to move when it alone is removed.

    Attributes:
        values: float64 `(units,)` per group. For `TPV` with the softmax head, half of a value is nats of KL.
        stderr: standard error of each value, same shapes; None where the criterion has none.
        criterion: how they were made, in words.
        samples: examples seen.
        probes: cotangents per example; "exact" if the sum over outputs was taken.
        seed: seed of the probes.
        model_id: fingerprint of the model scored.
    """

    values: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor] | None
    criterion: str
    samples: int
    probes: int | str
    seed: int
    model_id: str

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if value.ndim != 1 or not bool(isfinite(value).all()):
                raise PlanError(f"scores of group {name!r} are not finite values of shape (units,)")

    def save(self, path: str | PathLike[str]) -> None:
        """Write the scores as safetensors, with how they were made in the header."""
        tensors = {f"value/{name}": value.contiguous() for name, value in self.values.items()}
        tensors |= {f"stderr/{name}": value.contiguous() for name, value in (self.stderr or {}).items()}
        about = {"format": SCORES_FORMAT, "criterion": self.criterion, "samples": self.samples}
        about |= {"probes": self.probes, "seed": self.seed, "model_id": self.model_id}
        write_bytes(path, save(tensors, metadata={"tpvprune": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read scores written by `save`.

        Raises:
            PlanError: the file is missing, corrupt, or of another format.
        """
        if not Path(path).is_file():
            raise PlanError(f"no scores at {path}; run the score stage first")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("tpvprune", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise PlanError(f"{path} is no scores file: {error}") from error
        check_format(about, SCORES_FORMAT, f"scores {path}")
        values = {key[6:]: value for key, value in tensors.items() if key.startswith("value/")}
        stderr = {key[7:]: value for key, value in tensors.items() if key.startswith("stderr/")}
        about.pop("format")
        try:
            return cls(values=values, stderr=stderr or None, **about)
        except TypeError as error:
            raise PlanError(f"scores {path} are incomplete ({error}); score again") from error
