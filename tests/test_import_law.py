"""Which file may import what, read off the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tpvprune

ROOT = Path(tpvprune.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
REFERENCE = Path(__file__).with_name("reference.py")
STAGES = ("scoring", "planning", "surgery", "recovery")
# The command line, and what its files share.
CLI = {"cli.py", "analysiscli.py", "comparecli.py", "deploycli.py", "lookcli.py", "plancli.py", "selectcli.py"}
CLI |= {"showing.py", "options.py", "console.py"}


def imports(path: Path, package: str = "tpvprune") -> set[str]:
    """Dotted names of all that a file imports, at any depth; `from a import b` gives `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Of what a file imports, our modules, without the package: `plan`, `scoring.heads`."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in FILES}
    found = set()
    for name in imports(path):
        if name == "tpvprune" or name.startswith("tpvprune."):
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in modules:
                parts.pop()
            found.add(".".join(parts))
    return found


def users_of(package: str) -> set[str]:
    return {name for name, path in FILES.items() if any(i.split(".")[0] == package for i in imports(path))}


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("errors.py", set()),
        ("files.py", set()),
        ("lock.py", {"errors"}),
        ("version.py", set()),
        ("statedicts.py", set()),
        ("digests.py", set()),
        ("members.py", {"errors"}),
        ("types.py", {"errors", "files", "members"}),
        ("plan.py", {"errors", "files", "members", "types"}),
        ("batches.py", {"errors"}),
        ("calls.py", {"errors"}),
        ("copies.py", {"errors", "plan"}),
        ("source.py", set()),
        ("elastic.py", {"errors", "members", "source", "types"}),
        ("measures.py", set()),
        ("multihead.py", set()),
        ("reads.py", {"multihead"}),
        ("layers.py", {"copies", "elastic", "errors", "members", "multihead", "plan", "types"}),
        ("kinds.py", {"errors", "types"}),
        ("timing.py", {"batches", "calls", "kinds"}),
        ("tally.py", {"errors"}),
        ("scores.py", {"errors", "files", "tally", "types"}),
        ("budget.py", {"errors", "files", "types"}),
        ("curves.py", {"errors", "files", "types"}),
        ("comparison.py", {"errors", "files", "types"}),
        ("card.py", {"files", "measures", "plan", "version"}),
    ],
)
def test_the_nouns_import_only_what_lies_below_them(file: str, allowed: set[str]) -> None:
    assert ours(FILES[file]) <= allowed


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_each_other(stage: str) -> None:
    above = {
        "pipeline",
        "report",
        "checkpoint",
        "recipe",
        "mistakes",
        "sections",
        "inputs",
        "runfolder",
        "workflow",
        "zoo",
        "schedule",
        "stepping",
        "targets",
        "",
    }
    above |= {"analysis", "comparing", "comparison", "lock", "planstate", "recovering", "refits", "trust"}
    above |= {"curves", "deploy", "groupwise", "plots"} | {name.removesuffix(".py") for name in CLI}
    others = {*STAGES, *above} - {stage}
    for name, path in FILES.items():
        if name.startswith(f"{stage}/"):
            assert not {module for module in ours(path) if module.split(".")[0] in others}, name


def test_analysis_stands_above_the_stages_and_below_runs() -> None:
    above = {
        "recipe",
        "mistakes",
        "sections",
        "inputs",
        "runfolder",
        "workflow",
        "targets",
        "deploy",
        "card",
        "checkpoint",
        "pipeline",
        "zoo",
        "",
    }
    for name, path in FILES.items():
        found = {module.split(".")[0] for module in ours(path)}
        if name.startswith("analysis/"):
            assert not found & (above | {file.removesuffix(".py") for file in CLI}), name
        elif "analysis" in found:
            assert name in CLI | {"__init__.py"}, name


def test_zoo_imports_no_stage() -> None:
    for name, path in FILES.items():
        if name.startswith("zoo/"):
            assert not {module for module in ours(path) if module.split(".")[0] in STAGES}, name


def test_torch_pruning_is_a_reference_and_no_part() -> None:
    assert users_of("torch_pruning") == set()


def test_timm_is_imported_by_the_zoo_distillation_and_checkpoint_only() -> None:
    users = users_of("timm")
    assert users
    assert {name for name in users if not name.startswith("zoo/")} <= {
        "recovery/finetune.py",
        "recovery/optimisation.py",
        "checkpoint.py",
    }


@pytest.mark.parametrize(
    ("package", "only"),
    [
        ("yaml", "recipe.py"),
        ("matplotlib", "plots.py"),
        ("accelerate", "recovery/accelerating.py"),
        ("onnxruntime", "deploy/runtime.py"),
        ("jinja2", "deploy/page.py"),
    ],
)
def test_other_packages_have_few_importers(package: str, only: str) -> None:
    assert users_of(package) <= {only}


def test_what_the_command_line_prints_with_is_imported_by_its_files_alone() -> None:
    assert users_of("rich") | users_of("typer") <= CLI
    assert users_of("rich") >= {"console.py"}


def test_the_cli_is_imported_by_none_but_main() -> None:
    assert {name for name, path in FILES.items() if "cli" in ours(path)} <= {"__main__.py"}
    shared = {name.removesuffix(".py") for name in CLI}
    assert {name for name, path in FILES.items() if shared & ours(path)} <= CLI | {"__main__.py"}


def test_only_the_cli_prints() -> None:
    for name, path in FILES.items():
        if name in CLI:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], name


def test_only_recovery_makes_an_optimiser() -> None:
    users = {n for n, p in FILES.items() if any("optim" in i.split(".") for i in imports(p))}
    assert {name.split("/")[0] for name in users} == {"recovery"}


def test_nothing_pickles() -> None:
    for name, path in FILES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        called = {ast.unparse(c.func) for c in calls}
        assert not called & {"torch.save", "torch.load", "pickle.load", "pickle.loads", "pickle.dump"}, name


def test_the_reference_does_not_import_what_it_checks() -> None:
    mentioned = ours(REFERENCE)
    assert not {module for module in mentioned if module.split(".")[0] in STAGES or module == ""}
    assert mentioned == {"members", "types"}


def test_the_checks_above_see_what_they_look_for() -> None:
    assert "scoring.criteria" in ours(FILES["pipeline.py"])
    assert ours(FILES["__init__.py"]) >= {"plan", "types", "zoo.models"} - {"zoo.models"}
