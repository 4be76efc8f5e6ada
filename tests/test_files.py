from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpvprune import files


def test_files_are_written_and_read(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b.txt", "größer\n\n")
    assert files.read_text(tmp_path / "a" / "b.txt") == "größer\n"
    files.write_bytes(tmp_path / "a" / "b.txt", b"\x00")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"\x00"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    files.write_text(tmp_path / "a", "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert files.read_text(tmp_path / "a") == "old\n"
