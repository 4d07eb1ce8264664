"""What was once lost, doubled or mixed up: repeated ids in chains, two jobs at once, limits, links, odd names."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_corpus import TOPIC, assert_refused, job_of, manifest, read, rows_of, saved, texts_of, vectors, write_jsonl

from promptembedder import PromptEmbedderError
from promptembedder.bulk import encode_corpus
from promptembedder.bulk.corpus import LocalRunner

__all__ = ["saved"]  # a fixture


def ids_of(output):
    return read(output)["id"].to_pylist()


def test_a_part_that_loses_a_row_holds_the_first_use_of_another_id(saved, tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"id": "1", "text": "a"}])
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"id": "1", "text": "b"}, {"id": "2", "text": "c"}])
    write_jsonl(tmp_path / "in" / "c.jsonl", [{"id": "2", "text": "d"}, {"id": "3", "text": "e"}])
    for _ in range(2):
        done = encode_corpus(job_of(saved), [tmp_path / "in"], tmp_path / "out")
        assert (done.rows, done.rejected, done.complete) == (3, 2, True)
        assert sorted(ids_of(tmp_path / "out")) == ["1", "2", "3"]


def test_rows_that_are_new_and_left_out_are_not_taken_from_the_known_ones(saved, tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows_of(texts_of(5)))
    encode_corpus(job_of(saved), [tmp_path / "in"], tmp_path / "out")
    write_jsonl(tmp_path / "in" / "b.jsonl", rows_of(["another text", "one more"], 4))
    done = encode_corpus(job_of(saved), [tmp_path / "in"], tmp_path / "out")
    assert (done.rows, done.embedded, done.skipped, done.rejected) == (6, 2, 5, 1)


def test_another_job_that_writes_while_the_model_opens_is_seen(saved, tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows_of(texts_of(5)))

    class Late(LocalRunner):
        def open(self, plan):
            super().open(plan)
            encode_corpus(job_of(saved), [tmp_path / "in"], tmp_path / "out")

    other = job_of(saved, instructions={"topic": "Find the tone."})
    with pytest.raises(PromptEmbedderError, match="holds another job: instructions"):
        encode_corpus(other, [tmp_path / "in"], tmp_path / "out", runner=Late())
    assert manifest(tmp_path / "out")["instructions"][0]["instruction"] == TOPIC
    # The same job has nothing left to do.
    write_jsonl(tmp_path / "in" / "a.jsonl", rows_of(texts_of(7)))
    done = encode_corpus(job_of(saved), [tmp_path / "in"], tmp_path / "out", runner=Late())
    assert (done.rows, done.embedded) == (7, 0)


def test_parts_without_a_manifest_are_refused(command, saved, tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows_of(texts_of(5)))
    encode_corpus(job_of(saved), [tmp_path / "in"], tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    done = command("encode", saved, tmp_path / "in", "-o", f"{tmp_path}/out/", "--device=cpu", "-i", "Find the tone.")
    assert_refused(done, "no manifest.json; choose an empty folder")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_limits_one_after_the_other(saved, tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows_of(texts_of(400)))
    for limit in (10, 200, 300, 400):
        done = encode_corpus(job_of(saved), [tmp_path / "in"], tmp_path / "out", limit=limit)
        found = ids_of(tmp_path / "out")
        assert sorted(found) == sorted(f"id {n}" for n in range(limit))
        assert done.written == limit
    assert done.complete


def test_signs_of_chains_in_names(saved, tmp_path):
    write_jsonl(tmp_path / "x::y.jsonl", rows_of(texts_of(3)))
    encode_corpus(job_of(saved), [tmp_path / "x::y.jsonl"], tmp_path / "a::b" / "out")
    assert len(ids_of(tmp_path / "a::b" / "out")) == 3


def test_a_file_has_one_address(saved, tmp_path):
    """However it is reached; an output in the corpus is known, too."""
    write_jsonl(tmp_path / "in" / "deep" / "a.jsonl", rows_of(texts_of(3)))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    sources = [tmp_path / "in", tmp_path / "in" / "deep" / "..", tmp_path / "link"]
    for _ in range(2):
        done = encode_corpus(job_of(saved), sources, tmp_path / "link" / "out")
        assert done.rows == 3


def test_a_link_to_a_file_says_the_format_by_its_own_name(saved, tmp_path):
    """As in the hub's cache, where files have names without endings."""
    write_jsonl(tmp_path / "blobs" / "a1b2", rows_of(texts_of(3)))
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "blobs" / "a1b2")
    encode_corpus(job_of(saved), [tmp_path / "rows.jsonl"], tmp_path / "out")
    assert ids_of(tmp_path / "out") == [f"id {n}" for n in range(3)]


def test_the_text_can_be_kept(saved, tmp_path):
    texts = texts_of(3)
    write_jsonl(tmp_path / "a.jsonl", rows_of(texts))
    pq.write_table(pa.table({"id": [0, 1, 2], "body": texts, "text": ["x", "y", "z"]}), tmp_path / "b.parquet")
    encode_corpus(job_of(saved, keep=("text",)), [tmp_path / "a.jsonl"], tmp_path / "one")
    encode_corpus(job_of(saved, keep=("text",)), [tmp_path / "b.parquet"], tmp_path / "two", text_field="body")
    assert read(tmp_path / "one")["text"].to_pylist() == texts
    assert read(tmp_path / "two")["text"].to_pylist() == ["x", "y", "z"]
    np.testing.assert_array_equal(vectors(read(tmp_path / "one"), "topic"), vectors(read(tmp_path / "two"), "topic"))


def test_a_csv_file_of_a_spreadsheet(saved, tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"text","id"\r\n"one, two","a"\r\n')
    encode_corpus(job_of(saved), [tmp_path / "a.csv"], tmp_path / "out")
    assert ids_of(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_bad_value_of_a_kept_column_costs_one_row(saved, tmp_path, kind):
    if kind == "jsonl":
        write_jsonl(
            tmp_path / "a.jsonl", [{"id": "a", "text": "one", "k": "good"}, r'{"id":"b","text":"two","k":"\ud800"}']
        )
    else:
        (tmp_path / "a.csv").write_bytes(b"id,text,k\na,one,good\nb,two,\xff\n")
    done = encode_corpus(job_of(saved, keep=("k",)), [tmp_path / f"a.{kind}"], tmp_path / "out")
    assert (done.rows, done.rejected) == (1, 1)
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert reject["reason"] == "column 'k' is not valid UTF-8"


def broken(values):
    """Strings of bytes that are no UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": broken([b"a", b"\xff"]), "text": ["one", "two"]}, "column 'id' holds values that are not valid"),
        ({"id": ["a", "b"], "text": ["one", "two"], "k": broken([b"a", b"\xff"])}, "column 'k' holds values"),
    ],
)
def test_bytes_that_are_no_words_in_parquet(command, saved, tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    keep = ["--keep=k"] if "k" in table else []
    done = command("encode", saved, tmp_path / "a.parquet", "-o", f"{tmp_path}/out/", "--device=cpu", *keep)
    assert done.code == 2
    assert message in done.err


def test_a_column_twice_in_parquet(command, saved, tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    done = command("encode", saved, tmp_path / "a.parquet", "-o", f"{tmp_path}/out/", "--device=cpu")
    assert_refused(done, "has 2 columns 'text', expected one")


def test_a_damaged_part_is_named(command, saved, tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows_of(texts_of(5)))
    encode_corpus(job_of(saved), [tmp_path / "in"], tmp_path / "out")
    (part,) = (tmp_path / "out" / "parts").iterdir()
    part.write_bytes(b"")
    write_jsonl(tmp_path / "in" / "b.jsonl", rows_of(texts_of(1), 9))
    done = command("encode", saved, tmp_path / "in", "-o", f"{tmp_path}/out/", "--device=cpu", f"--named=topic={TOPIC}")
    assert_refused(done, part.name, "is damaged", "remove it, and run again")


@pytest.mark.parametrize("held", ['{"mine": 1}', "[]"])
def test_ranges_of_something_else(command, saved, tmp_path, held):
    write_jsonl(tmp_path / "in" / "a.jsonl", rows_of(texts_of(5)))
    encode_corpus(job_of(saved, precision="int8"), [tmp_path / "in"], tmp_path / "out")
    (tmp_path / "out" / "ranges.json").write_text(held)
    write_jsonl(tmp_path / "in" / "b.jsonl", rows_of(texts_of(1), 9))
    options = ("--device=cpu", f"--named=topic={TOPIC}", "--precision=int8")
    done = command("encode", saved, tmp_path / "in", "-o", f"{tmp_path}/out/", *options)
    assert_refused(done, "ranges.json holds no ranges of this job")


def test_strict_of_what_is_done(saved, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*rows_of(texts_of(3)), {"id": "x", "text": ""}])
    encode_corpus(job_of(saved), [tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(PromptEmbedderError, match=r"1 rows are left out, see .*rejects.jsonl"):
        encode_corpus(job_of(saved), [tmp_path / "a.jsonl"], tmp_path / "out", strict=True)
