"""What the files of the command line print with."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document, on one line."""
    sys.stdout.write(json.dumps(value) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A rich table on a terminal, tab-separated plain lines when piped."""
    if not out.is_terminal:
        for row in (header, *rows):
            sys.stdout.write("\t".join(row).rstrip() + "\n")
        return
    table = Table(title=title or None, title_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def number(value: Any) -> str:
    """A number as people read it; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
