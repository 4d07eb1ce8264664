"""Corpus and output in an object store on loopback."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from made_up_texts import write_corpus
from promptembedder import PromptEmbedderError, build, save
from promptembedder.bulk import Job, encode_corpus


@pytest.fixture
def bucket(monkeypatch):
    """A bucket that holds nothing."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    httpx.post(f"http://{host}:{port}/moto-api/reset")  # the tests of a process share what it holds
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("bucket")
    yield store
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def job(tmp_path, tiny_settings):
    save(build(tiny_settings(), device="cpu"), tmp_path / "model")
    return Job(str(tmp_path / "model"), {"topic": "Find the topic."}, device="cpu", keep=("year",))


def test_as_on_a_disk(bucket, job, tmp_path):
    write_corpus(tmp_path / "corpus", 1000, files=3)
    bucket.put(str(tmp_path / "corpus"), "bucket/corpus", recursive=True)
    encode_corpus(job, [tmp_path / "corpus"], tmp_path / "out")
    done = encode_corpus(job, ["s3://bucket/corpus"], "s3://bucket/out")
    assert (done.rows, done.embedded, done.complete) == (1000, 1000, True)
    table = pq.read_table("bucket/out/parts", filesystem=bucket).sort_by("id")
    wanted = pq.read_table(tmp_path / "out" / "parts").sort_by("id")
    assert table.drop_columns(["topic"]).equals(wanted.drop_columns(["topic"]))
    np.testing.assert_array_equal(*(np.stack(one["topic"].to_numpy()) for one in (table, wanted)))
    assert json.loads(bucket.cat("bucket/out/manifest.json"))["state"] == "complete"


def test_only_what_is_new_is_read(bucket, job, tmp_path):
    """A file that has not changed is not read again."""
    write_corpus(tmp_path / "corpus", 600, files=2)
    bucket.put(str(tmp_path / "corpus"), "bucket/corpus", recursive=True)
    encode_corpus(job, ["s3://bucket/corpus"], "s3://bucket/out")
    write_corpus(tmp_path / "new", 100, files=1, seed=14, first=600)
    bucket.put(str(tmp_path / "new" / "14-000.jsonl"), "bucket/corpus/14-000.jsonl")
    read = []
    opened = s3fs.S3FileSystem.open
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            s3fs.S3FileSystem, "open", lambda fs, path, *a, **k: (read.append(path), opened(fs, path, *a, **k))[1]
        )
        done = encode_corpus(job, ["s3://bucket/corpus"], "s3://bucket/out")
    assert (done.rows, done.embedded, done.skipped) == (700, 100, 600)
    # The first file is looked into for its columns.
    assert {path for path in read if "/corpus/" in path} == {"bucket/corpus/13-000.jsonl", "bucket/corpus/14-000.jsonl"}


def test_what_is_not_there(bucket, job, tmp_path):
    with pytest.raises(PromptEmbedderError, match=r"s3://bucket/nothing cannot be read: no such file or folder"):
        encode_corpus(job, ["s3://bucket/nothing"], tmp_path / "out")
    with pytest.raises(PromptEmbedderError, match="s3://other/corpus cannot be read: "):
        encode_corpus(job, ["s3://other/corpus"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
