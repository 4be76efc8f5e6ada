"""Every built-in recipe runs: two steps of it on a toy of its kind, with random weights and few images."""

from __future__ import annotations

from pathlib import Path

import pytest

import tpvprune as tp
from tests.test_cli import CLASSES, make_images
from tpvprune.recipe import Recipe, builtin_recipes, load_recipe
from tpvprune.workflow import Run

ONE = [name for name in builtin_recipes() if isinstance(load_recipe(name), Recipe)]
DEFAULT = ("imagenet_resnet50", "imagenet_vit_small", "sparse_2_4")  # the others differ in numbers alone


def toy(recipe: Recipe, place: Path) -> list[str]:
    """Overrides that leave a recipe's own settings, and make two batches of eight images of its data."""
    few = ["score.samples=8", "eval.samples=4", "eval.examples=0", "data.batch_size=4", "data.workers=0"]
    if recipe.recover.reconstruct is not None:
        few.append("recover.reconstruct.samples=8")
    if recipe.recover.finetune is not None:
        few += ["recover.finetune.epochs=1", "recover.finetune.samples=8", "recover.finetune.batch_size=4"]
    if recipe.plan.steps > 1:
        few.append("plan.steps=2")
    if recipe.model.checkpoint is not None:  # digits, which ship with the package
        return few
    transformer = recipe.model.name.startswith(("vit", "deit", "swin"))
    name, args = (
        ("test_vit", "{num_classes: %d, img_size: 32}") if transformer else ("test_resnet", "{num_classes: %d}")
    )
    return [*few, f"model.name={name}", f"model.args={args % CLASSES}", f"data.images={place}", "data.size=32"]


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in ONE])
def test_two_steps_of_a_recipe(name: str, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 16)
    whole = load_recipe(name)
    assert isinstance(whole, Recipe)
    recipe = load_recipe(name, toy(whole, tmp_path / "images"))
    assert isinstance(recipe, Recipe)
    told = Run(recipe, tmp_path / "out").until("recover")
    tuned = ["finetune"] if whole.recover.finetune else []  # which may bring a net of random weights no closer
    assert told["steps"] == ["reconstruct", *([] if "left_out" in told else tuned)]
    assert len(told.get("epochs", [])) == len(tuned)
    plan = tp.Plan.load(tmp_path / "out" / "plan.json")
    share = plan.macs / plan.graph.macs()
    assert share <= whole.budget.macs
    if whole.sparsify is None:
        assert share < 1
        assert plan.zeros == 0
    else:
        assert plan.sparsity == pytest.approx(whole.sparsify.sparsity or 0.5, abs=0.01)
    tp.load(tmp_path / "out")


@pytest.mark.parametrize("name", ONE)
def test_a_recipe_says_how_it_is_run(name: str) -> None:
    recipe, text = load_recipe(name), builtin_recipes()[name]
    assert isinstance(recipe, Recipe)
    if recipe.data is None or recipe.data.images is None:
        assert f"# tpvprune run {name} model.checkpoint=" in text
        with pytest.raises(tp.DataError, match=r"no images are named; set data\.images"):
            _ = Run(recipe, "nowhere").inputs.images
