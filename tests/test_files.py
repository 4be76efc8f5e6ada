from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from tpvprune import files
from tpvprune.recipe import builtin_recipes
from tpvprune.recovery.spill import Spilled
from tpvprune.zoo.models import checkpoint_path


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


def test_a_write_that_fails_names_the_file_and_not_its_neighbour(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_text(tmp_path / "a", "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(FileExistsError) as caught:
        files.write_text(Path(__file__) / "a", "new")
    assert caught.value.filename == str(Path(__file__) / "a")


def test_what_killed_writes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    left = [tmp_path / f".a.json.x{files.PART}", tmp_path / "in" / f".b.y{files.PART}"]
    kept = [tmp_path / "a.json", tmp_path / ".hidden", tmp_path / f"photo{files.PART}", tmp_path / "in" / "b"]
    for path in (*left, *kept):
        path.touch()
    files.sweep(tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


def test_a_full_temporary_folder_is_named() -> None:
    class Full:
        def write(self, data: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    spilled = Spilled([])
    spilled._file.close()
    spilled._file = Full()
    with pytest.raises(OSError, match="No space left") as caught:
        spilled._write(b"x")
    assert caught.value.filename == tempfile.gettempdir()


def test_what_comes_with_the_package_is_found_in_a_source_tree_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (Path(files.__file__).parents[1] / "recipes").is_dir():
        pytest.skip("the package is installed, and runs from no source tree")
    wanted = builtin_recipes()
    assert "quickstart" in wanted

    def gone(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(files.resources, "files", gone)
    assert builtin_recipes() == wanted
    assert checkpoint_path("builtin:digits_cnn.safetensors").is_file()
    with pytest.raises(ModuleNotFoundError):
        files.packaged("nothing")
