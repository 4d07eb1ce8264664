"""Standard streams that are closed, full, or of a terminal with few characters."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

import promptembedder
from conftest import INSTRUCTION
from promptembedder.cli import app as cli


@pytest.fixture
def model(tiny_model, tmp_path):
    promptembedder.save(tiny_model("gemma3"), tmp_path / "model")
    return tmp_path / "model"


def in_shell(script):
    """Run `promptembedder` as `$P` of a shell script."""
    return subprocess.run(
        ["sh", "-c", f'P="{sys.executable} -m promptembedder"; {script}'],
        capture_output=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("name", ["encode", "bridge"])
def test_closed_standard_input(name, command, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_prepare_streams", lambda: monkeypatch.setattr(sys, "stdin", None))
    models = ["smollm2-135m"] * (2 if name == "bridge" else 1)
    ended = command(name, *models, "-", "-o", tmp_path / "v.npy")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "promptembedder: standard input is closed; give a file of texts\n"


@pytest.mark.parametrize("arguments", [["info", "smollm2-135m"], ["explain", "smollm2-135m"], ["--version"], []])
def test_closed_standard_output(arguments, command, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_prepare_streams", lambda: monkeypatch.setattr(sys, "stdout", None))
    ended = command(*arguments)
    assert ended.code == 2
    assert ended.err == "promptembedder: standard output is closed\n"


@pytest.mark.slow
def test_a_shell_that_closes_them():
    ended = in_shell(
        "$P info smollm2-135m >&-; echo $?; $P encode smollm2-135m <&-; echo $?; $P info no-model 2>&-; echo $?"
    )
    assert ended.stdout == b"2\n2\n2\n"
    assert ended.stderr.decode().splitlines() == [
        "promptembedder: standard output is closed",
        "promptembedder: standard input is closed; give a file of texts",
    ]


def test_output_that_cannot_be_written():
    ended = in_shell("$P info smollm2-135m >/dev/full; echo $?; $P --version | true")
    assert ended.stdout == b"2\n"
    assert ended.stderr.decode() == "promptembedder: No space left on device\n"


def test_a_stream_of_few_characters(model, command, monkeypatch):
    """Code page 1252 has no mark that tokens of sentencepiece begin with."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", errors="strict"))
    ended = command("explain", model, INSTRUCTION, "--top", 400)
    assert (ended.code, ended.err) == (0, "")
    assert b"soft token 5" in raw.getvalue()
    assert b"\\x" in raw.getvalue()


@pytest.mark.parametrize("name", ["encode", "explain", "bridge"])
def test_an_instruction_of_undecodable_bytes(name, command, tmp_path):
    undecodable = os.fsdecode(b"Caf\xe9")
    arguments = {
        "encode": ["smollm2-135m", "-", "-i", undecodable],
        "explain": ["smollm2-135m", undecodable],
        "bridge": ["smollm2-135m", "smollm2-135m", "-", "-i", undecodable],
    }[name]
    ended = command(name, *arguments, stdin="a text")
    assert ended.code == 2
    what = "INSTRUCTION" if name == "explain" else "--instruction"
    assert ended.err == f"promptembedder: {what} is not valid UTF-8 text\n"
