"""Recipes: strict keys, errors with file, key and line, overrides, and the built-in ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import tpvprune as tp
from tpvprune.recipe import Recipe, Suite, builtin_recipes, load_recipe, parse_recipe
from tpvprune.targets import resolve, resolve_model
from tpvprune.zoo.models import create_model

FULL = """
name: mine
model: {name: resnet18}
data:
  images: photos
budget:
  macs: 50%
  protect: [layer1]
recover:
  finetune:
    epochs: 2
"""


@pytest.mark.parametrize(
    ("images", "probes"), [(None, 1), (10**6, 1), (1280, 1), (899, 1), (640, 2), (300, 4), (100, 8), (1, 8)]
)
def test_few_images_are_probed_more_often(images, probes):
    assert parse_recipe(FULL, "mine.yaml").criterion(images).probes == probes
    assert parse_recipe(FULL, "mine.yaml", ["score.probes=3"]).criterion(images).probes == 3
    assert parse_recipe(FULL, "mine.yaml", ["score.criterion=wanda"]).criterion(images) == tp.Wanda()


def test_every_builtin_recipe_validates_and_its_model_can_be_built():
    assert {"quickstart", "quickstart_cnn", "quickstart_vit"} <= set(builtin_recipes())
    for name in builtin_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
        if isinstance(recipe, Suite):
            assert all(isinstance(load_recipe(part), Recipe) for part in recipe.runs)
        else:
            create_model(recipe.model.name, recipe.model.checkpoint, recipe.model.args)


def test_settings_come_out_as_the_library_takes_them():
    recipe = parse_recipe(FULL, "mine.yaml")
    assert recipe.limits() == tp.Budget(macs="50%", protect=("layer1",))
    assert recipe.criterion() == tp.TPV(compensated=True)
    assert recipe.distillation() == tp.Finetune(epochs=2)
    assert recipe.closed_form() == tp.Reconstruct()


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["recover.reconstruct=null"], tp.TPV()),
        (["score.over=all"], tp.TPV(over="all")),
        (["score.compensated=false", "score.head=margin"], tp.TPV(head="margin")),
        (["score.sensitivities=64", "score.probes=2"], tp.TPV(sensitivities=64, probes=2)),
        (["score.criterion=l1"], tp.L1()),
        (["score.criterion=fisher", "score.seed=3"], tp.Fisher(seed=3)),
        (["score.criterion=jbr"], tp.JBR()),
    ],
)
def test_a_recipe_names_its_criterion(overrides, wanted):
    assert parse_recipe(FULL, "mine.yaml", overrides).criterion() == wanted


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["score.criterion=l3"], "score.criterion"),
        (["score.criterion=l1", "score.probes=4"], "'l1' has no setting 'probes'"),
        (["score.over=all", "score.compensated=true"], "compensated=True"),
        (["score.sensitivities=-1"], "sensitivities=-1"),
    ],
)
def test_settings_that_a_criterion_lacks_are_refused(overrides, message):
    with pytest.raises(tp.RecipeError, match=message):
        parse_recipe(FULL, "mine.yaml", overrides)


@pytest.mark.parametrize("find", [resolve, resolve_model])
def test_a_key_is_set_once_on_the_command_line(find):
    with pytest.raises(tp.RecipeError, match=r"'score.seed=3'.* is set by 'score.seed = 2' too"):
        find("test_resnet", ["score.seed = 2", "score.seed=3"], None)
    words = ["data.images=images", "recover.finetune=null", "recover.finetune.epochs=3", "budget.macs=0.5"]
    [(recipe, _)] = find("test_resnet", words, None)
    assert recipe.distillation().epochs == 3
    with pytest.raises(tp.RecipeError, match=r"'budget=\{params: 0.9\}' would undo 'budget.macs=0.5', a part of it"):
        find("test_resnet", ["data.images=images", "budget.macs=0.5", "budget={params: 0.9}"], None)
    [(recipe, _)] = find("test_resnet", ["data.images=images", "sparsify.pattern=2:4"], None)
    assert recipe.sparsify.pattern == "2:4"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sparsify={}"], "give either sparsity, as 0.5, or pattern"),
        (["sparsify.sparsity=0.5", "sparsify.pattern='2:4'"], "give either sparsity, as 0.5, or pattern"),
        (["sparsify.sparsity=1.5"], "sparsify.sparsity"),
        (["sparsify.pattern=half"], "sparsify.pattern"),
        (["sparsify.pattern='4:2'"], "no N:M with N below M"),
        (["sparsify.sparsty=0.5"], "did you mean 'sparsity'"),
    ],
)
def test_zeros_are_asked_for_by_a_share_or_a_pattern(overrides, message):
    with pytest.raises(tp.RecipeError, match=message):
        parse_recipe(FULL, "mine.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["sparsify.pattern='2:4'"], tp.TPV(compensated="2:4")),
        (["sparsify.sparsity=0.5"], tp.TPV(compensated=True)),
        (["sparsify.sparsity=0.5", "recover.reconstruct=null"], tp.L1()),
        (["sparsify.sparsity=0.5", "sparsify.criterion=tpv", "recover.reconstruct=null"], tp.TPV()),
        (["sparsify.sparsity=0.5", "sparsify.criterion=l1"], tp.L1()),
        (
            ["sparsify.sparsity=0.5", "score.head=logits", "score.seed=3"],
            tp.TPV(head="logits", seed=3, compensated=True),
        ),
        (["sparsify.sparsity=0.5", "score.criterion=l1"], tp.TPV(compensated=True)),
    ],
)
def test_weights_are_scored_for_what_follows(overrides, wanted):
    recipe = parse_recipe(FULL, "mine.yaml", overrides)
    assert recipe.criterion_of_weights() == wanted
    if isinstance(wanted, tp.TPV):
        assert recipe.criterion_of_weights(100).probes == 8


def test_recipes_of_earlier_versions_that_name_a_probe_are_read():
    assert parse_recipe(FULL, "mine.yaml", ["score.criterion=wanda", "score.probes=1"]).criterion() == tp.Wanda()
    with pytest.raises(tp.RecipeError, match="no setting 'probes'"):
        parse_recipe(FULL, "mine.yaml", ["score.criterion=wanda", "score.probes=2"])


def test_channels_are_compensated_by_one_engine_alone():
    with pytest.raises(tp.RecipeError, match="'wanda' has no setting 'compensated'"):
        parse_recipe(FULL, "mine.yaml", ["score.criterion=wanda", "score.compensated=true"])
    with pytest.raises(tp.RecipeError, match="engine 'activations'"):
        parse_recipe(FULL, "mine.yaml", ["score.compensated=true", "score.engine=batched"])


def test_the_resolved_recipe_reads_back_as_itself():
    recipe = parse_recipe(FULL, "mine.yaml", ["score.probes=exact", "budget.per_group={layer2: 0.5}"])
    assert parse_recipe(recipe.to_yaml(), "resolved.yaml") == recipe


def test_overrides_replace_switch_off_and_make_sections():
    recipe = parse_recipe(FULL, "mine.yaml", ["budget.macs=1.2G", "recover.finetune=null", "eval.samples=7"])
    assert recipe.limits().macs == "1.2G"
    assert recipe.distillation() is None
    assert recipe.eval.samples == 7


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("name: a\nmodel: {name: b}\nbudgt: {macs: 0.5}\n", ["f.yaml, line 3", "'budgt'", "did you mean 'budget'"]),
        ("name: a\nmodel:\n  nam: b\n", ["line 3", "'model.nam'", "did you mean 'name'", "'model.name' is missing"]),
        ("name: a\nmodel: {name: b}\nbudget:\n  macs: [1]\n", ["line 4", "'budget.macs'"]),
        ("name: a\nmodel: {name: b}\nbudget:\n  macs: much\n", ["line 4", "macs='much' is no amount"]),
        ("name: a\nmodel: {name: b}\nscore:\n  probes: 0\n", ["line 4", "probes=0"]),
        ("name: a\nmodel: {name: b}\nrecover:\n  finetune:\n    lr: -1\n", ["line 5", "lr=-1"]),
        ("name: a\nmodel: {name: b}\nrecover:\n  finetune:\n    optimizer: adamx\n", ["line 5", "did you mean ada"]),
        ("name: a\nmodel: {name: b}\nscore: {head: sofmax}\n", ["line 3", "'score.head'"]),
        ("name: a\nmodel: b\n", ["line 2", "write model: {name: b}, or model.name=b"]),
        ("name: a\nmodel: {name: b}\ndata: photos\n", ["line 3", "keys are set: data.images, data.labels"]),
        ("name: a\nname: b\nmodel: {name: b}\n", ["line 2", "'name' stands twice"]),
        ("name: a\nmodel: [\n", ["line 3", "not YAML"]),
        ("- a\n", ["a recipe is a mapping"]),
        ("", ["a recipe is a mapping"]),
        ("model: {name: b}\n", ["'name' is missing"]),
        ("name: a\nmodel: !!python/object/apply:os.getcwd []\n", ["line 2", "run code is refused"]),
        ("name: a\nruns: []\n", ["line 2", "'runs'"]),
    ],
)
def test_mistakes_name_the_file_the_line_and_the_key(text, phrases):
    with pytest.raises(tp.RecipeError) as caught:
        parse_recipe(text, "f.yaml")
    for phrase in ["f.yaml", *phrases]:
        assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("override", "phrase"),
    [
        ("budget.mac=0.4", "did you mean 'macs'"),
        ("budget.macs", "is not key=value"),
        ("recover.finetune.epochs=many", "'recover.finetune.epochs'"),
        ("budget.macs=[", "is no YAML"),
        ("recover.finetune.clip=0", "clip=0"),
        ("budget.protect=layer1", "give a list, as [layer1]"),
        ("recover=null", "left out one by one, as recover.reconstruct=null and recover.finetune=null"),
        ("model=resnet50", "write model: {name: resnet50}, or model.name=resnet50"),
        ("recover.finetune.optimizer=adamx", "optimizer='adamx' is no optimiser of timm; did you mean ada"),
        ("recover.finetune.optimizer=adahessian", "takes second derivatives"),
    ],
)
def test_wrong_overrides_are_named(override, phrase):
    with pytest.raises(tp.RecipeError) as caught:
        parse_recipe(FULL, "mine.yaml", [override])
    assert override.partition("=")[0] in str(caught.value)
    assert phrase in str(caught.value)


def test_a_suite_takes_no_override():
    with pytest.raises(tp.RecipeError, match="list of recipes"):
        load_recipe("quickstart", ["budget.macs=0.4"])


def test_a_drift_is_not_bounded_beside_zeros_that_it_would_not_count() -> None:
    words = ["budget.macs=null", "budget.drift=0.05", "sparsify.sparsity=0.5"]
    load_recipe("quickstart_cnn", words[:2])
    with pytest.raises(tp.RecipeError, match=r"drift=0\.05 bounds what leaves.*leave sparsify out"):
        load_recipe("quickstart_cnn", words)


def listed(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"name: {path.stem}\nruns: [{', '.join(names)}]\n")
    return path


def test_recipes_of_a_list_are_looked_for_beside_it(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.yaml").write_text(FULL)
    outer = listed(tmp_path / "all.yaml", "deep/inner.yaml", "quickstart_vit")
    listed(tmp_path / "deep" / "inner.yaml", "mine.yaml", "quickstart_cnn")
    found = resolve(str(outer), (), Path("out"))
    assert [(recipe.name, str(place)) for recipe, place in found] == [
        (load_recipe(str(tmp_path / "deep" / "mine.yaml")).name, "out/inner/mine"),
        ("quickstart_cnn", "out/inner/quickstart_cnn"),
        ("quickstart_vit", "out/quickstart_vit"),
    ]


def test_a_list_of_recipes_that_leads_back_to_itself_is_refused(tmp_path: Path):
    one = listed(tmp_path / "one.yaml", "two.yaml")
    listed(tmp_path / "two.yaml", f"../{tmp_path.name}/one.yaml")
    with pytest.raises(tp.RecipeError, match=r"two\.yaml lists .*one\.yaml, which lists"):
        resolve(str(one), (), None)


def test_recipes_of_a_list_do_not_share_a_folder(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(FULL)
    both = listed(tmp_path / "both.yaml", "a/mine.yaml", "b/mine.yaml")
    with pytest.raises(tp.RecipeError, match=r"two recipes of .* would write to out/mine"):
        resolve(str(both), (), Path("out"))


def test_a_missing_file_and_a_misspelt_name(tmp_path: Path):
    with pytest.raises(tp.RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(tp.RecipeError, match="did you mean quickstart"):
        load_recipe("quickstat")


def test_recipes_are_plain_yaml_without_tags():
    for text in builtin_recipes().values():
        assert "!" not in text
        assert isinstance(yaml.safe_load(text), dict)


def keys_of(kind: type[BaseModel], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a section and of those in it, with its default; None for one that must be given."""
    for name, field in kind.model_fields.items():
        options = (field.annotation, *get_args(field.annotation))
        inner = [one for one in options if isinstance(one, type) and issubclass(one, BaseModel)]
        for one in inner:
            yield from keys_of(one, f"{before}{name}.")
        if not inner:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            yield before + name, list(default) if isinstance(default, tuple) else default


def test_the_page_of_recipes_names_every_key_once_with_its_default():
    page = (Path(__file__).resolve().parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w.]+)` \| (?:`(.+?)`|none) \|", page.partition("## Every key")[2], re.MULTILINE)
    told = dict(table)
    assert len(told) == len(table)
    wanted = dict(keys_of(Recipe))
    assert set(told) == set(wanted)
    for key, default in wanted.items():  # a word such as `no` is what it is, not what YAML makes of it
        read = told[key].strip('"') if isinstance(default, str) else yaml.safe_load(told[key] or "null")
        assert read == default, key


def test_full_precision_is_asked_for_by_the_word_that_yaml_takes_for_false():
    text = "name: a\nmodel: {name: b}\nrecover: {finetune: {precision: no}}\n"
    assert parse_recipe(text, "mine.yaml").distillation() == tp.Finetune()
    recipe = parse_recipe(FULL, "mine.yaml", ["recover.finetune.precision=no"])
    assert recipe.distillation() == tp.Finetune(epochs=2)
    assert parse_recipe(recipe.to_yaml(), "resolved.yaml") == recipe
    with pytest.raises(tp.RecipeError, match=r"recover.finetune.precision.*'no', 'fp16' or 'bf16'.*got True"):
        parse_recipe(FULL, "mine.yaml", ["recover.finetune.precision=yes"])


def test_engines_of_single_weights_are_none_of_a_recipe():
    with pytest.raises(tp.RecipeError, match=r"score\.engine.*'auto', 'activations', 'batched' or 'per_sample'"):
        parse_recipe(FULL, "mine.yaml", ["score.engine=factored"])


def test_the_joint_allocator_is_for_criteria_that_keep_effects():
    for words in (["score.criterion=l1"], ["score.criterion=jbr"], ["score.compensated=true"], ["score.over=all"]):
        with pytest.raises(tp.RecipeError, match=r"'plan.allocator=joint'.*score\.criterion=tpv keeps"):
            parse_recipe(FULL, "mine.yaml", ["plan.allocator=joint", *words])
    for words in ([], ["score.head=logits"], ["score.compensated=true", "score.sensitivities=64"]):
        assert parse_recipe(FULL, "mine.yaml", ["plan.allocator=joint", *words]).planning().allocator == "joint"


@pytest.mark.parametrize(
    "text", ["sparsify: {pattern: 2:4}", "sparsify:\n  pattern: 2:4", "sparsify: {pattern: '2:4'}"]
)
def test_a_pattern_needs_no_quotes(text):
    assert parse_recipe(f"{FULL}{text}\n", "mine.yaml").sparsify.pattern == "2:4"
    assert parse_recipe(FULL, "mine.yaml", ["sparsify={pattern: 4:8}"]).sparsify.pattern == "4:8"
    assert parse_recipe(FULL, "mine.yaml", ["score.samples=1280"]).score.samples == 1280
