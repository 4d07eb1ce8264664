"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from promptembedder.paths import closed_file, ending, expanded, unreadable


def test_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/at/home")
    assert expanded("~/x") == Path("/at/home/x")
    assert expanded(Path("~")) == Path("/at/home")
    for name in ("~nobody-of-that-name/x", "a/~/b", "/c~"):
        assert expanded(name) == Path(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("X.TXT.GZ", ".txt.gz"),
        ("folder.d/rows.JSONL", ".jsonl"),
        ("a.b.jsonl.gz", ".jsonl.gz"),
        ("x.gz", ".gz"),
        ("name", ""),
        (".hidden", ""),
    ],
)
def test_endings_in_any_case(name, expected):
    assert ending(name) == expected


def test_why_a_file_cannot_be_read(tmp_path, closed):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text("x")
    os.mkfifo(pipe)
    assert unreadable(file) is None
    assert closed_file(tmp_path / "none") is None
    assert unreadable(tmp_path / "none") == "No such file or directory"
    assert unreadable(tmp_path) == "Is a directory"
    assert unreadable(pipe) == "Not a regular file"  # opening would wait for a writer
    assert "null byte" in str(unreadable(Path("a\0b")))
    pipe.unlink()
    assert closed_file(tmp_path) is None
    closed(file)
    assert unreadable(file) == "Permission denied"
    assert closed_file(tmp_path) == f"{file} cannot be read: Permission denied"
