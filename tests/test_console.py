"""Bars on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tpvprune import console


def test_the_bar_that_was_told_of_last_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[console.Bar] = []

    class Kept(console.Bar):
        def __enter__(self) -> Kept:
            made.append(self)
            return self

    monkeypatch.setattr(console, "Bar", Kept)
    monkeypatch.setattr(console, "err", Console(file=io.StringIO(), force_terminal=True))
    shown = []
    with console.bars() as tell:
        assert tell is not None
        told = [("plan", 0, 3), ("score", 1, 5), ("score", 5, 5), ("plan", 2, 3), ("score", 1, None), ("plan", 3, 3)]
        for what in told:
            tell(*what)
            shown.append([(t.description, t.completed, t.total) for t in made[0].tasks if t.visible])
    assert shown == [[what] for what in told]
    assert len(made[0].tasks) == 2


def test_there_are_no_bars_where_output_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "err", Console(file=io.StringIO(), force_terminal=False))
    with console.bars() as tell:
        assert tell is None
