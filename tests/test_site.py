"""The documentation site says all there is: every page is in the nav, every public name in the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import tpvprune as tp
from tpvprune.budget import BOUNDS

ROOT = Path(__file__).resolve().parent.parent
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for entry in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from pages(entry)


def test_every_page_is_in_the_nav_once() -> None:
    listed = list(pages(SITE["nav"]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == there


def test_every_public_name_is_in_the_reference_once() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    named = re.findall(r"^::: tpvprune\.(\w+)$", text, re.MULTILINE)
    assert set(named) == {*tp.__all__, "testing"} - {"__version__"}
    assert len(named) == len(set(named))


def test_ci_builds_the_site_strictly() -> None:
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_elsewhere() -> None:
    assert SITE["theme"]["font"] is False


def test_every_file_beside_the_folders_is_in_the_design() -> None:
    told = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    there = {path.stem for path in (ROOT / "tpvprune").glob("[!_]*.py")}
    assert {name for name in there if f"`{name}`" not in told} == set()


def test_every_bound_is_in_the_table_of_budgets() -> None:
    told = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    table = told.partition("| bound | written")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(BOUNDS)
