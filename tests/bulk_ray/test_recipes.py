"""The examples of docs/bulk.md run as they stand, and find what a search by hand finds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import promptembedder
from made_up_texts import write_corpus
from promptembedder.bulk import Job, encode_corpus

GUIDE = (Path(__file__).parents[2] / "docs" / "bulk.md").read_text(encoding="utf-8")
NAME = "smollm2-135m"
NAMED = {"topic": "Identify the topic of the text.", "tone": "Identify the tone of the text."}
QUERY = "ferries and harbours"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    write_corpus(folder / "corpus", 200, files=2)
    encode_corpus(Job(NAME, NAMED, keep=("year",)), [folder / "corpus"], folder / "vectors")
    return folder


def run(heading: str, package: str) -> dict[str, Any]:
    """Names after the example under a heading."""
    pytest.importorskip(package)
    section = re.split(r"\n#+ ", GUIDE.split(f"# {heading}\n", 1)[1])[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(block, heading, "exec"), names)
    return names


def nearest(place: Path, column: str) -> list[int]:
    table = pq.read_table(place / "vectors" / "parts")
    query = promptembedder.encode(promptembedder.load(NAME), [QUERY], NAMED[column])[0]
    scores = np.stack(table[column].to_numpy()) @ query
    return [table["id"][int(n)].as_py() for n in np.argsort(-scores)[:5]]


def test_the_command_of_the_guide(place):
    command = re.search(r"^promptembedder encode .*?(?=^```)", GUIDE, re.M | re.S)[0]
    for name, text in NAMED.items():
        assert f'--named {name}="{text}"' in command


def test_lancedb(place, monkeypatch):
    monkeypatch.chdir(place)
    hits = run("LanceDB", "lancedb")["hits"]
    assert [hit["id"] for hit in hits] == nearest(place, "topic")
    assert set(hits[0]) >= {"year", "topic", "tone"}


def test_qdrant(place, monkeypatch):
    monkeypatch.chdir(place)
    names = run("Qdrant", "qdrant_client")
    assert [hit.payload["id"] for hit in names["hits"]] == nearest(place, "tone")
    names["client"].close()


def test_faiss(place, monkeypatch):
    monkeypatch.chdir(place)
    assert run("FAISS", "faiss")["hits"] == nearest(place, "topic")


def test_a_pipeline_of_ones_own(capsys):
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False)
    try:
        run("In a pipeline of your own", "ray")
    finally:
        ray.shutdown()
    assert "(576,)" in capsys.readouterr().out
