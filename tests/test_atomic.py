"""Files appear whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from promptembedder import PromptEmbedderError, atomic


def test_a_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with atomic.replacing(target) as scratch:
        scratch.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    assert list(target.parent.iterdir()) == [target]


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
    for content in ("1", "2"):
        with atomic.filling(folder) as scratch:
            (scratch / "a").write_text(content)
            assert not folder.exists() or (folder / "a").read_text() == "1"
        assert [path.name for path in folder.iterdir()] == ["a"]
        (folder / "a").chmod(0o640)
    assert (folder / "a").read_text() == "2"
    assert mode(folder / "a") == 0o640


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[None]:
    former = os.umask(0o027)
    yield
    os.umask(former)


def test_new_files_go_by_the_umask_and_former_ones_keep_their_mode(tmp_path: Path, umask: None) -> None:
    """Also files that their writer makes readable by their owner alone, as safetensors does."""

    def private(path: Path) -> None:
        path.write_text("new")
        path.chmod(0o600)

    for former in (None, 0o600, 0o664):
        if former is not None:
            for path in (tmp_path / "file", tmp_path / "model" / "w", tmp_path / "report" / "r"):
                path.chmod(former)
            (tmp_path / "model").chmod(0o700)
        with atomic.replacing(tmp_path / "file") as file:
            file.unlink()
            private(file)
        with atomic.replacing_folder(tmp_path / "model") as folder:
            (folder / "below").mkdir(0o700)
            private(folder / "w")
        with atomic.filling(tmp_path / "report") as folder:
            private(folder / "r")
        found = [mode(tmp_path / name) for name in ("file", "model/w", "report/r")]
        assert found == [0o640 if former is None else former] * 3
        assert mode(tmp_path / "model") == (0o750 if former is None else 0o700)
        assert mode(tmp_path / "model" / "below") == 0o750


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for name in ("file", "none"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "far" / "file").write_text("old")
    for name in ("file", "none"):
        atomic.write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "far" / name).read_text() == "new"
    with atomic.filling(tmp_path / "far") as folder:
        (folder / "file").write_text("filled")
    (tmp_path / "model").symlink_to(tmp_path / "far")
    with atomic.replacing_folder(tmp_path / "model") as folder:
        (folder / "w").write_text("new")
    assert (tmp_path / "model").is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["w"]


def test_what_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        atomic.write_text(tmp_path / "pipe", "new")
    with pytest.raises(IsADirectoryError):
        atomic.write_text(tmp_path, "new")
    (tmp_path / "kept").write_text("old")
    (tmp_path / "kept").chmod(0o444)
    monkeypatch.setattr(os, "access", lambda path, *_, **__: os.stat(path).st_mode & 0o222)  # also where root tests
    with pytest.raises(PermissionError, match="write-protected"):
        atomic.write_text(tmp_path / "kept", "new")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="it is the current folder"), atomic.replacing_folder(Path()):
        pytest.fail("opened")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "pipe"]


def in_a_child(act: Callable[[], object]) -> None:
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def test_what_a_killed_process_left_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    def killed() -> None:
        with atomic.scratch(tmp_path) as place:
            (place / "half").write_text("half")
            os._exit(9)

    in_a_child(killed)
    (left,) = tmp_path.iterdir()
    like_ours = tmp_path / ".promptembedder-0123456789ab"
    like_ours.mkdir()
    (like_ours / "notes.txt").write_text("mine")
    with atomic.scratch(tmp_path) as place:
        assert not left.exists()
        (place / "half").write_text("half")
        in_a_child(lambda: atomic.clear_abandoned(tmp_path))
        assert (place / "half").exists()
    assert list(tmp_path.iterdir()) == [like_ours]
    assert (like_ours / "notes.txt").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replaced_folder_keeps_what_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    for name in ("model/w", "model/old", "model/inner/w", "model/inner/notes", "model/.git/refs/head"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "model" / "link").symlink_to("nowhere")
    ours = {Path(name) for name in ("w", "old", "inner", "inner/w")}
    with atomic.replacing_folder(tmp_path / "model", ours.__contains__) as folder:
        (folder / "w").write_text("new")
    found = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*")}
    assert found == {"w", "inner", "inner/notes", ".git", ".git/refs", ".git/refs/head", "link"}
    assert (tmp_path / "model" / "w").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_back_where_its_successor_did_not_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an exchange in one step there is a moment when no folder is in place."""
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_text("old")
    rename = Path.rename

    def replace_folder(end: Callable[[], object]) -> None:
        def ends_at_last(path: Path, target: Path) -> Path:
            if target == tmp_path / "model" and path.parent.name == "new":
                end()
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", ends_at_last)
        with atomic.replacing_folder(tmp_path / "model") as folder:
            (folder / "w").write_text("new")

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(fail)
    assert (tmp_path / "model" / "w").read_text() == "old"
    in_a_child(lambda: replace_folder(lambda: os._exit(9)))
    assert not (tmp_path / "model").exists()
    atomic.clear_abandoned(tmp_path)
    assert (tmp_path / "model" / "w").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_that_were_made_for_nothing_go(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="halfway"):
        fail_halfway(atomic.replacing(tmp_path / "new" / "deeper" / "file"), lambda file: file)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("text")
    (tmp_path / "link").symlink_to("input")
    (tmp_path / "other").write_text("text")
    for name in ("input", "link"):
        with pytest.raises(PromptEmbedderError, match=f"{name} is the input .*input; choose another file"):
            atomic.refuse_input(tmp_path / name, "-", tmp_path / "input")
    atomic.refuse_input(tmp_path / "other", "-", tmp_path / "input")
    atomic.refuse_input(tmp_path / "none", tmp_path / "input", tmp_path / "gone")
