"""Files appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from promptembedder import atomic


def test_a_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with atomic.replacing(target) as scratch:
        scratch.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o644


def fail_halfway(block: AbstractContextManager[Path], file_in: Callable[[Path], Path]) -> None:
    with block as scratch:
        file_in(scratch).write_text("new")
        raise ValueError("halfway")


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    atomic.write_text(target, "old")
    with pytest.raises(ValueError, match="halfway"):
        fail_halfway(atomic.replacing(target), lambda scratch: scratch)
    with pytest.raises(ValueError, match="halfway"):
        fail_halfway(atomic.filling(tmp_path), lambda folder: folder / "file.txt")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_filled_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    with atomic.filling(folder) as scratch:
        (scratch / "a").write_text("1")
        assert [path.is_dir() for path in folder.iterdir()] == [True]
    assert [path.name for path in folder.iterdir()] == ["a"]
