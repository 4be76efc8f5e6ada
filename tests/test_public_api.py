from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import tpvprune as tp


def _modules() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(tp.__path__, "tpvprune.") if not m.name.endswith("__main__"))


def test_all_is_sorted_and_without_repeats() -> None:
    def order(name: str) -> tuple[int, str]:  # as ruff sorts: constants, classes, the rest
        return (0 if name.isupper() else 1 if name[0].isupper() else 2), name

    assert tp.__all__ == sorted(set(tp.__all__), key=order)


@pytest.mark.parametrize("name", [n for n in tp.__all__ if n != "__version__"])
def test_public_name_is_importable_and_documented(name: str) -> None:
    thing = getattr(tp, name)
    own = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert own
    assert own.strip()
    # What dataclasses write themselves is the signature again, not a docstring.
    assert not own.startswith(f"{name}(")


def test_everything_public_in_the_package_is_in_all() -> None:
    public = {n for n, v in vars(tp).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public <= set(tp.__all__)


@pytest.mark.parametrize("name", _modules())
def test_modules_are_documented(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_version_is_that_of_the_package() -> None:
    assert tp.__version__ == importlib.import_module("tpvprune.version").__version__


def test_errors_form_one_tree() -> None:
    errors = [v for v in vars(importlib.import_module("tpvprune.errors")).values() if inspect.isclass(v)]
    assert all(issubclass(e, tp.TpvpruneError) for e in errors)
    mendable = {tp.ModelError, tp.CheckpointError, tp.DataError, tp.RecipeError, tp.BudgetError, tp.PlanError}
    assert all(issubclass(e, tp.InputError) and issubclass(e, ValueError) for e in mendable | {tp.NonFiniteError})
    assert not issubclass(tp.InternalError, ValueError)
    for error in errors:
        assert error.__name__ in importlib.import_module("tpvprune.errors").__doc__
