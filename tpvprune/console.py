"""How the command line prints: tables, numbers, progress bars, and one JSON document for machines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from tpvprune.batches import Progress

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
_documents: TextIO | None = None  # where `print_json` writes, while others write elsewhere


def log_line(line: str) -> None:
    """One line on the way, to standard error."""
    err.print(line, highlight=False, markup=False)


@contextmanager
def bars() -> Iterator[Progress | None]:
    """Bars on a terminal; nothing but the stage lines when piped."""
    if not err.is_terminal:
        yield None
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Bar(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks or done <= 1:
                if stage in tasks:
                    bar.remove_task(tasks[stage])
                tasks[stage] = bar.add_task(stage, total=total)
            for name, task in tasks.items():
                bar.update(task, visible=name == stage)
            bar.update(tasks[stage], completed=done, total=total)

        yield tell


@contextmanager
def one_document() -> Iterator[None]:
    """Standard output is for `print_json` alone: what is printed by others goes to standard error."""
    global _documents
    before, _documents = _documents, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _documents = before


def print_json(value: Any) -> None:
    """One document, one line. JSON has no word for NaN and infinity: they are null."""
    (_documents or sys.stdout).write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(one) for key, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
    return value


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", first_at_most: int | None = None
) -> None:
    """A rich table on a terminal, tab-separated plain lines when piped.

    Args:
        header: a name a column.
        rows: cells as text; columns of numbers stand to the right.
        title: above the table, on a terminal alone.
        first_at_most: widest the first column may be, where the others need the room.
    """
    if not out.is_terminal:
        for row in (header, *rows):
            sys.stdout.write("\t".join(row).rstrip() + "\n")
        return
    table = Table(title=title or None, title_justify="left")
    for place, name in enumerate(header):
        numbers = place > 0 and all(row[place][:1] in "-0123456789" for row in rows)
        widest = first_at_most if place == 0 else None
        table.add_column(name, justify="right" if numbers else "left", overflow="fold", max_width=widest)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def number(value: Any) -> str:
    """Whole numbers with their thousands apart, others to four digits, None as a dash, truth as yes or no."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
