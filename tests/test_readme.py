"""What the README says is what happens."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tpvprune import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


GUIDES = sorted((ROOT / "docs").rglob("*.md"))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["told"].bytes == (tmp_path / "small.pt2").stat().st_size < names["told"].dense_bytes
    assert f"{names['told'].bytes:,} bytes" in capsys.readouterr().out
    assert (tmp_path / "out/tpvprune.json").is_file()
    assert sum(p.numel() for p in names["again"].parameters()) < sum(p.numel() for p in names["model"].parameters())


@pytest.mark.parametrize(
    "guide", [g for g in GUIDES if blocks("python", g.read_text(encoding="utf-8"))], ids=lambda guide: guide.name
)
def test_python_blocks_of_a_guide_run_one_after_the_other(guide, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks("python", guide.read_text(encoding="utf-8")):
        if "torchao" in code and find_spec("torchao") is None:
            pytest.skip("torchao is not installed; python -m pip install 'tpvprune[quantize]'")
        exec(compile(code, guide.name, "exec"), names)


def test_the_verbs_named_exist():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    named = set(re.findall(r"\| `tpvprune (\w+)", README)) | {"score", "plan", "apply", "recover", "eval", "report"}
    assert named <= known


def test_the_page_of_the_command_line_lists_every_verb():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    known |= {group.name for group in cli.app.registered_groups}
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page.partition("| exit code")[0], re.MULTILINE)
    assert {verb for row in rows for verb in re.findall(r"`(\w+)`", row)} == known


def test_ci_runs_the_test_command_of_the_readme():
    commands = [block.strip() for block in blocks("bash")]
    test_command = next(c for c in commands if "pytest" in c)
    assert test_command in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target.partition("#")[0]).exists(), target
