"""One run at a time in an output folder; who is dead holds none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from promptembedder import PromptEmbedderError, lock


def test_a_folder_is_held_by_one(tmp_path):
    folder = tmp_path / "new" / "run"
    with lock.held(folder):
        message = f"another run is writing to output folder {folder}; wait until it ends, or choose another output"
        with pytest.raises(PromptEmbedderError, match=message), lock.held(folder):
            pass
        with lock.held(tmp_path / "other"):
            pass
    with pytest.raises(ZeroDivisionError), lock.held(folder):
        1 / 0  # noqa: B018
    with lock.held(folder):
        pass
    assert [path.name for path in folder.iterdir()] == [".run.lock"]


def test_a_killed_process_holds_nothing(tmp_path):
    code = (
        "import pathlib, sys, time\nfrom promptembedder import lock\n"
        "with lock.held(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(PromptEmbedderError, match="another run"), lock.held(tmp_path):
            pass
        process.kill()
    with lock.held(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    message = f"results folder {below} cannot be written: "
    with pytest.raises(PromptEmbedderError, match=message), lock.held(below, "results folder"):
        pass
