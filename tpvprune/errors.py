"""Every exception the package raises on purpose, in one tree.

    TpvpruneError                 anything below; the CLI exits 1
    ├── InputError (ValueError)   the caller can mend it; the CLI exits 2
    │   ├── ModelError            unknown model, wrong arguments, output of a kind the head cannot read
    │   │   └── UnseenError       what units do cannot be told from what layers are given
    │   ├── CheckpointError       weights missing, corrupt, of other shapes, or in need of code execution
    │   ├── DataError             images or batches missing, empty, unreadable, of another shape
    │   ├── RecipeError           a recipe's file, key, value or override
    │   ├── BudgetError           a budget that cannot be read or cannot be reached (names the floor)
    │   ├── PlanError             a plan, graph or scores that do not fit the model or each other
    │   └── NonFiniteError        NaN or infinity in a model's outputs (names the first module)
    ├── ExportError               a file for another runtime does not give what the model gives
    └── InternalError             a promise of this package that did not hold; please report it

Each message names the thing at fault and says what to do next.
"""

from __future__ import annotations


class TpvpruneError(Exception):
    """Base of everything raised on purpose."""


class InputError(TpvpruneError, ValueError):
    """Something given by the caller is wrong and can be mended by the caller."""


class ModelError(InputError):
    """The model is unknown, cannot be built, or returns something that cannot be scored."""


class UnseenError(ModelError):
    """What units do to the outputs cannot be told, sample by sample, from what layers are given."""


class CheckpointError(InputError):
    """Weights are missing, corrupt, of another shape, or would need code execution to load."""


class DataError(InputError):
    """Images or batches are missing, empty, unreadable or of another shape."""


class RecipeError(InputError):
    """A recipe's file, key, value or override is wrong."""


class BudgetError(InputError):
    """A budget cannot be read, or cannot be reached."""


class PlanError(InputError):
    """A plan, graph or scores do not fit the model or each other."""


class NonFiniteError(InputError):
    """A model's outputs hold NaN or infinity."""

    @classmethod
    def of_layer(cls, name: str) -> NonFiniteError:
        """That a layer is given some."""
        return cls(f"layer {name!r} is given NaN or infinity; check the input and the weights")


class InternalError(TpvpruneError):
    """A promise of this package did not hold."""


class ExportError(TpvpruneError):
    """A file that was written for another runtime does not give what the model gives."""
