"""A corpus of files to a folder of parts: the same rows whatever the format, the way there and the number of tries."""

from __future__ import annotations

import gzip
import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from promptembedder import PromptEmbedderError, encode, load, save
from promptembedder.bulk import encode_corpus
from promptembedder.bulk import job as job_module
from promptembedder.bulk.corpus import LocalRunner
from promptembedder.bulk.job import Job

TOPIC, TONE = "Find the topic.", "Find the tone."
WORDS = ["the", "river", "town", "bank", "guitar", "rain", "bridge", "children", "rates", "bread", "water", "light"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_settings):
    from promptembedder import build

    folder = tmp_path_factory.mktemp("bulk") / "model"
    save(build(tiny_settings(), device="cpu"), folder)
    return folder


@pytest.fixture(scope="module")
def model(saved):
    return load(saved, device="cpu")


def texts_of(count: int, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    return [f"{' '.join(drawn.choices(WORDS, k=drawn.randint(1, 12)))} {n}" for n in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def rows_of(texts: list[str], first: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"id {n}", "text": text, "year": 1990 + n % 7} for n, text in enumerate(texts, first)]


def read(output: Path) -> pa.Table:
    return pq.read_table(output / "parts")


def vectors(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), np.float32)


def manifest(output: Path) -> dict[str, Any]:
    return json.loads((output / "manifest.json").read_text())


def job_of(saved: Path, **changes: Any) -> Job:
    return Job(str(saved), changes.pop("instructions", {"topic": TOPIC}), device="cpu", **changes)


def assert_refused(outcome, *parts):
    assert outcome.code == 2, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.strip() and not line.startswith("Encoding")]
    assert len(lines) == 1, outcome.err
    for part in parts:
        assert part in lines[0]


# -- what is written --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_under_two_instructions(command, saved, model, tmp_path):
    texts = texts_of(300)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows_of(texts[:170]))
    write_jsonl(tmp_path / "corpus" / "deeper" / "b.jsonl", rows_of(texts[170:], 170))
    output = tmp_path / "out"
    done = command(
        *("encode", saved, tmp_path / "corpus", "-o", f"{output}/", "--device=cpu", "--keep=year"),
        *(f"--named=topic={TOPIC}", f"--named=tone={TONE}"),
    )
    assert (done.code, done.out) == (0, ""), done.err
    assert "holds 300 rows: embedded 300, skipped 0" in done.err
    table = read(output)
    assert table.schema.names == ["id", "year", "topic", "tone", "digest"]
    order = np.argsort([int(one.split()[1]) for one in table["id"].to_pylist()])
    table = table.take(order)
    assert table["id"].to_pylist() == [f"id {n}" for n in range(300)]
    assert table["year"].to_pylist() == [1990 + n % 7 for n in range(300)]
    expected = encode(model, texts, [TOPIC, TONE])
    for name, wanted in zip(("topic", "tone"), expected, strict=True):
        np.testing.assert_allclose(vectors(table, name), wanted, atol=1e-5)
    facts = manifest(output)
    assert (facts["state"], facts["counts"]) == ("complete", {"rows": 300, "written": 300, "rejected": 0})
    assert [one["instruction"] for one in facts["instructions"]] == [TOPIC, TONE]
    assert all(len(one["digest"]) == 16 for one in facts["instructions"])
    assert (output / "rejects.jsonl").read_text() == ""
    assert sorted(p.name for p in output.iterdir() if p.name[0] != ".") == ["manifest.json", "parts", "rejects.jsonl"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "csv", "txt", "txt.gz"])
def test_every_format_gives_the_same_rows(saved, tmp_path, kind, model):
    texts = [*texts_of(260), 'one, "two"', "naïve ☃"]
    path = tmp_path / "corpus" / f"a.{kind}"
    path.parent.mkdir()
    rows = [{"id": f"id {n}", "body": text} for n, text in enumerate(texts)]
    quoted = [text.replace('"', '""') for text in texts]
    content = {
        "jsonl": "".join(json.dumps(row) + "\n\n" for row in rows),
        "csv": "\ufeffid,body\n" + "".join(f'id {n},"{text}"\n' for n, text in enumerate(quoted)),
        "txt": "\n".join(texts),
    }.get(kind.removesuffix(".gz"))
    if content is None:
        pq.write_table(pa.table({"id": [r["id"] for r in rows], "body": texts}), path, row_group_size=100)
    else:
        data = content.encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    done = encode_corpus(job_of(saved), [tmp_path / "corpus"], tmp_path / "out", text_field="body")
    assert (done.rows, done.rejected, done.complete) == (262, 0, True)
    table = read(tmp_path / "out")
    made_up = [f"a.{kind}#{n}" for n in range(262)]
    assert table["id"].to_pylist() == (made_up if kind.startswith("txt") else [row["id"] for row in rows])
    np.testing.assert_allclose(vectors(table, "topic"), encode(model, texts, TOPIC), atol=1e-5)
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 3  # of 128 rows


@pytest.mark.parametrize("precision", ["float16", "int8", "binary", "ubinary"])
def test_precisions(saved, model, tmp_path, precision):
    texts = texts_of(150)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    encode_corpus(job_of(saved, precision=precision, truncate_dim=16), [tmp_path / "a.txt"], tmp_path / "out")
    wanted = encode(model, texts, TOPIC)[:, :16]
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    found = np.array(read(tmp_path / "out")["topic"].to_pylist())
    if precision == "float16":
        np.testing.assert_allclose(found, wanted, atol=1e-3)
    elif precision == "int8":
        ranges = json.loads((tmp_path / "out" / "ranges.json").read_text())["topic"]
        least, greatest = np.array(ranges["least"]), np.array(ranges["greatest"])
        np.testing.assert_allclose(least, wanted[:128].min(0), atol=1e-5)
        step = (greatest - least) / 255
        inside = (wanted >= least) & (wanted <= greatest)
        assert (np.abs((found + 128.5) * step + least - wanted)[inside] <= (step * 0.51 + 1e-5).max()).all()
        assert found.min() >= -128
        assert found.max() <= 127
    else:
        packed = found.astype(np.int8).view(np.uint8) ^ 128 if precision == "binary" else found.astype(np.uint8)
        bits = np.unpackbits(packed, axis=-1)
        assert (bits == (wanted > 0))[np.abs(wanted) > 1e-5].all()


def test_chunks_have_spans_and_the_embeddings_of_their_words(saved, model, tmp_path):
    long, short = " ".join(texts_of(20)), "Rain."
    write_jsonl(tmp_path / "a.jsonl", [{"id": 7, "text": long, "lang": "en"}, {"id": 8, "text": short, "lang": "de"}])
    job = job_of(saved, chunk_tokens=32, overlap=8, keep=("lang",))
    done = encode_corpus(job, [tmp_path / "a.jsonl"], tmp_path / "out")
    table = read(tmp_path / "out")
    rows = table.drop_columns(["topic", "digest"]).to_pylist()
    assert (done.rows, done.written) == (2, len(rows))
    assert rows[-1] == {"id": 8, "chunk": 0, "start": 0, "end": len(short), "lang": "de"}
    parts = rows[:-1]
    assert [one["chunk"] for one in parts] == list(range(len(parts)))
    assert parts[0]["start"] == 0
    assert parts[-1]["end"] == len(long)
    tokens = [len(model.tokenizer(long[one["start"] : one["end"]])["input_ids"]) for one in parts]
    assert max(tokens) <= 33  # words may be cut into other tokens at the start of a text
    assert all(a["start"] < b["start"] < a["end"] < b["end"] for a, b in pairwise(parts))
    words = [long[one["start"] : one["end"]] for one in parts] + [short]
    np.testing.assert_allclose(vectors(table, "topic"), encode(model, words, TOPIC), atol=1e-5)


# -- stopped, and again -----------------------------------------------------------------------------------------


class Stopping(LocalRunner):
    """Stops after so many blocks."""

    def __init__(self, after: int) -> None:
        self.after = after

    def run(self, *arguments):
        for n, found in enumerate(super().run(*arguments)):
            yield found
            if n == self.after:
                raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_stopped_job_goes_on(saved, tmp_path, kind):
    texts = texts_of(700)
    for n in range(2):
        rows = rows_of(texts[350 * n : 350 * (n + 1)], 350 * n)
        write_jsonl(tmp_path / "corpus" / f"{n}.jsonl", rows)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus" / f"{n}.parquet")
    sources = [str(tmp_path / "corpus" / f"*.{kind}")]
    encode_corpus(job_of(saved), sources, tmp_path / "whole")
    embedded = 0
    for after in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(job_of(saved), sources, tmp_path / "out", runner=Stopping(after))
        assert manifest(tmp_path / "out")["state"] == "running"
    parts = len(list((tmp_path / "out" / "parts").iterdir()))
    assert 3 <= parts < 6
    done = encode_corpus(job_of(saved), sources, tmp_path / "out")
    embedded += done.embedded
    assert (done.rows, done.complete) == (700, True)
    assert 0 < done.embedded < 700 - 128
    assert done.skipped == 700 - done.embedded
    one, other = (read(tmp_path / name).sort_by("id") for name in ("whole", "out"))
    assert one["id"].to_pylist() == other["id"].to_pylist()
    np.testing.assert_array_equal(vectors(one, "topic"), vectors(other, "topic"))
    assert [p.name for p in sorted((tmp_path / "whole" / "parts").iterdir())] == [
        p.name for p in sorted((tmp_path / "out" / "parts").iterdir())
    ]


@pytest.mark.slow
def test_a_grown_corpus_is_embedded_where_it_is_new(saved, tmp_path):
    """Rows added in front, changed, moved to another file and removed; the output is that of a first run."""
    texts = texts_of(600)
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    write_jsonl(corpus / "a.jsonl", rows_of(texts[:300]))
    write_jsonl(corpus / "b.jsonl", rows_of(texts[300:550], 300))
    write_jsonl(corpus / "gone.jsonl", rows_of(texts[550:], 550))
    first = encode_corpus(job_of(saved, keep=("year",)), [corpus], output)
    assert (first.embedded, first.skipped) == (600, 0)
    again = encode_corpus(job_of(saved, keep=("year",)), [corpus], output)
    assert (again.embedded, again.skipped, again.complete) == (0, 600, True)
    new = [{"id": "new", "text": "a new text", "year": 1}]
    changed = rows_of(texts[:300])
    changed[17]["text"] = "a text that has changed"
    changed[18]["year"] = 5
    write_jsonl(corpus / "a.jsonl", [*new, *changed])
    (corpus / "gone.jsonl").unlink()
    write_jsonl(corpus / "c.jsonl", rows_of(texts[550:580], 550))
    opened = []
    runner = LocalRunner()
    runner.open = lambda plan: (opened.append(plan), LocalRunner.open(runner, plan))
    grown = encode_corpus(job_of(saved, keep=("year",)), [corpus], output, runner=runner)
    assert (grown.embedded, grown.rows, grown.skipped) == (2, 581, 579)
    encode_corpus(job_of(saved, keep=("year",)), [corpus], tmp_path / "fresh")
    one, other = read(output).sort_by("id"), read(tmp_path / "fresh").sort_by("id")
    assert one.drop_columns(["topic"]).to_pylist() == other.drop_columns(["topic"]).to_pylist()
    np.testing.assert_allclose(vectors(one, "topic"), vectors(other, "topic"), atol=1e-6)
    names = [{p.name for p in (place / "parts").iterdir()} for place in (output, tmp_path / "fresh")]
    assert names[0] == names[1]
    assert len(opened) == 1


def test_nothing_new_opens_no_model(command, saved, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    options = ("encode", saved, tmp_path / "a.txt", "-o", f"{tmp_path}/out/", "--device=cpu")
    assert command(*options).code == 0
    monkeypatch.setattr(LocalRunner, "open", lambda *_: pytest.fail("opened"))
    done = command(*options)
    assert done.code == 0
    assert "embedded 0, skipped 2 known ones" in done.err
    (tmp_path / "a.txt").unlink()
    assert_refused(command(*options), "a.txt cannot be read: no such file")


def test_limit_is_a_beginning(command, saved, tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows_of(texts_of(300)))
    write_jsonl(tmp_path / "corpus" / "b.jsonl", rows_of(texts_of(100, 1), 300))
    options = ("encode", saved, tmp_path / "corpus", "-o", f"{tmp_path}/out/", "--device=cpu")
    done = command(*options, "--limit", 150)
    assert done.code == 0
    assert "holds 150 rows: embedded 150" in done.err
    assert "the corpus has more" in done.err
    assert "texts a second: the whole corpus takes about " in done.err
    assert sorted(read(tmp_path / "out")["id"].to_pylist()) == sorted(f"id {n}" for n in range(150))
    assert manifest(tmp_path / "out")["state"] == "incomplete"
    done = command(*options)
    assert "holds 400 rows: embedded 250, skipped 150" in done.err
    assert sorted(read(tmp_path / "out")["id"].to_pylist()) == sorted(f"id {n}" for n in range(400))


# -- rows and files that cannot be used -------------------------------------------------------------------------

BAD_ROWS = {
    "not json": ("{nonsense", "not JSON"),
    "no object": ("17", "expected one JSON object per line"),
    "no text": ({"id": "x"}, "text is missing"),
    "blank": ({"id": "x", "text": " "}, "text is empty"),
    "number": ({"id": "x", "text": 5}, "text is int, expected a string"),
    "surrogate": ('{"id": "x", "text": "\\ud800"}', "text is not valid UTF-8"),
    "no id": ({"text": "words"}, "id is missing"),
    "other id": ({"id": 5, "text": "words"}, "id is int, expected a string"),
    "repeated id": ({"id": "id 3", "text": "words"}, "id 'id 3' is used twice, also in file://"),
    "kept": ({"id": "x", "text": "words", "year": "soon"}, "column 'year' is 'soon', expected int64"),
}


def test_bad_rows_are_left_out(command, saved, tmp_path):
    good, bad = rows_of(texts_of(9)), [row for row, _ in BAD_ROWS.values()]
    write_jsonl(tmp_path / "a.jsonl", [*good[:5], *bad, *good[5:]])
    options = ("encode", saved, tmp_path / "a.jsonl", "-o", f"{tmp_path}/out/", "--device=cpu", "--keep=year")
    done = command(*options)
    assert done.code == 0, done.err
    assert f"{len(bad)} rows left out, see rejects.jsonl" in done.err
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["source"] for reject in rejects} == {f"file://{tmp_path}/a.jsonl"}
    found = {reject["line"]: reject["reason"] for reject in rejects}
    for line, (name, (_, reason)) in enumerate(BAD_ROWS.items(), 6):
        assert reason in found.pop(line), name
    assert not found
    assert read(tmp_path / "out")["id"].to_pylist() == [f"id {n}" for n in range(9)]
    assert f"skipped 9 known ones, {len(bad)} rows left out" in command(*options).err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blank", "repeated id"])
def test_a_bad_row_stops_a_strict_job(command, saved, tmp_path, name):
    row, reason = BAD_ROWS[name]
    write_jsonl(tmp_path / "a.jsonl", [*rows_of(texts_of(5)), row])
    outcome = command("encode", saved, tmp_path / "a.jsonl", "-o", f"{tmp_path}/out/", "--device=cpu", "--strict")
    assert_refused(outcome, "a.jsonl, line 6: ", reason)


def test_bad_rows_of_parquet(saved, tmp_path):
    texts = pa.array([b"one", b"\xff\xfe", b" ", None, b"five"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": [1, 2, 3, 4, None], "text": texts}), tmp_path / "a.parquet")
    done = encode_corpus(job_of(saved), [tmp_path / "a.parquet"], tmp_path / "out")
    assert (done.rows, done.rejected) == (1, 4)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in rejects] == [
        (2, "text is not valid UTF-8"),
        (3, "text is empty"),
        (4, "text is missing"),
        (5, "id is missing"),
    ]


@pytest.mark.slow
def test_the_first_row_of_an_id_stays_whatever_its_file(saved, tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows_of(texts_of(200)))
    write_jsonl(tmp_path / "corpus" / "b.jsonl", rows_of(texts_of(150, 1), 150))
    done = encode_corpus(job_of(saved), [tmp_path / "corpus"], tmp_path / "out")
    assert (done.rows, done.rejected) == (300, 50)
    table = read(tmp_path / "out")
    assert sorted(table["id"].to_pylist()) == sorted(f"id {n}" for n in range(300))
    lines = [json.loads(line)["line"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 51))
    again = encode_corpus(job_of(saved), [tmp_path / "corpus"], tmp_path / "out")
    assert (again.embedded, again.rows, again.rejected) == (0, 300, 50)
    # When the first ones go, those that were left out are the only ones.
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows_of(texts_of(100)))
    less = encode_corpus(job_of(saved), [tmp_path / "corpus"], tmp_path / "out")
    assert (less.rows, less.rejected, less.embedded) == (250, 0, 50)
    wanted = [f"id {n}" for n in (*range(100), *range(150, 300))]
    assert sorted(read(tmp_path / "out")["id"].to_pylist()) == sorted(wanted)


def test_a_repeated_id_of_chunks_takes_all_its_rows(saved, tmp_path):
    long = " ".join(texts_of(20))
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": "Rain."}, {"id": 1, "text": long}, {"id": 2, "text": long}])
    done = encode_corpus(job_of(saved, chunk_tokens=32), [tmp_path / "a.jsonl"], tmp_path / "out")
    ids = read(tmp_path / "out")["id"].to_pylist()
    assert (done.rows, done.rejected) == (2, 1)
    assert ids.count(1) == 1
    assert ids.count(2) == len(ids) - 1 > 2


def corrupt(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_one_corrupt_file_among_many(command, saved, tmp_path, kind):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(12):
        rows = rows_of(texts_of(3, n), 3 * n)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), corpus / f"{n:02d}.parquet")
        else:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            (corpus / f"{n:02d}.jsonl.gz").write_bytes(gzip.compress(data))
    whole = (corpus / f"05.{kind}").read_bytes()
    corrupt(corpus / f"05.{kind}")
    options = ("encode", saved, corpus, "-o", f"{tmp_path}/out/", "--device=cpu")
    assert_refused(command(*options), "1 of 12 files cannot be read, the others are done: ", f"05.{kind}")
    assert manifest(tmp_path / "out")["state"] == "incomplete"
    assert read(tmp_path / "out").num_rows == 33
    strict = command("encode", saved, corpus, "-o", f"{tmp_path}/strict/", "--device=cpu", "--strict")
    assert_refused(strict, f"05.{kind}")
    (corpus / f"05.{kind}").write_bytes(whole)
    assert "holds 36 rows: embedded 3, skipped 33" in command(*options).err


# -- what is refused before anything is written -----------------------------------------------------------------


def parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


REFUSED = {
    "mixed formats": (
        lambda c: (write_jsonl(c / "a.jsonl", rows_of(["x"])), parquet(c / "b.parquet", text=["x"])),
        [],
        ["several formats: jsonl (a.jsonl), parquet (b.parquet)"],
    ),
    "unknown ending": (lambda c: (c.mkdir(), (c / "a.docx").write_text("x")), [], ["a.docx", "says no format"]),
    "no files": (lambda c: c.mkdir(), [], ["no files in "]),
    "not there": (lambda c: None, [], ["corpus cannot be read: no such file or folder"]),
    "no rows": (lambda c: write_jsonl(c / "a.jsonl", []), [], ["no rows in 1 files"]),
    "text column missing": (
        lambda c: parquet(c / "a.parquet", id=[1], words=["x"]),
        [],
        ["a.parquet has no column 'text', only id, words"],
    ),
    "text field missing": (
        lambda c: write_jsonl(c / "a.jsonl", [{"id": 1}]),
        [],
        ["a.jsonl has no field 'text', only id"],
    ),
    "kept column missing": (
        lambda c: write_jsonl(c / "a.jsonl", rows_of(["x"])),
        ["--keep=month"],
        ["no field 'month', only id, text, year"],
    ),
    "id column missing": (
        lambda c: parquet(c / "a.parquet", text=["x"]),
        ["--id-field=key"],
        ["no column 'key', only text"],
    ),
    "binary text": (lambda c: parquet(c / "a.parquet", text=[b"x"]), [], ["column 'text' is binary, expected strings"]),
    "nested text": (lambda c: parquet(c / "a.parquet", text=[["x"]]), [], ["'text' is list<", "expected strings"]),
    "nested id": (
        lambda c: parquet(c / "a.parquet", text=["x"], id=[[1]]),
        [],
        ["'id' is list<", "ids must be"],
    ),
    "nested kept": (
        lambda c: write_jsonl(c / "a.jsonl", [{"text": "x", "tags": ["y"]}]),
        ["--keep=tags"],
        ["'tags' is nested (list<", "--keep takes flat columns"],
    ),
    "name taken": (
        lambda c: write_jsonl(c / "a.jsonl", rows_of(["x"])),
        ["--named=digest=Find."],
        ["'digest' already"],
    ),
    "overlap": (lambda c: None, ["--chunk-tokens=4", "--overlap=4"], ["--overlap is 4, expected less"]),
    "long chunks": (lambda c: None, ["--chunk-tokens=99999"], ["--chunk-tokens is 99999", "the model reads"]),
    "workers": (lambda c: None, ["--workers=2"], ["give --ray, too"]),
    "bridge": (lambda c: None, ["--bridge=x"], ["--bridge is not for a corpus"]),
}


@pytest.mark.parametrize(("make", "options", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_written(command, saved, tmp_path, make, options, told):
    make(tmp_path / "corpus")
    assert_refused(command("encode", saved, tmp_path / "corpus", "-o", f"{tmp_path}/out/", *options), *told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--named=tone=Find the tone."], "instructions is "),
        (["--precision=float16"], "precision is float32 there, and float16 here"),
        (["--keep=year"], "columns is "),
        (["--chunk-tokens=8"], "chunk_tokens is None there, and 8 here"),
    ],
)
def test_an_output_of_another_job(command, saved, tmp_path, options, told):
    write_jsonl(tmp_path / "a.jsonl", rows_of(["one", "two"]))
    output = tmp_path / "out"
    assert command("encode", saved, tmp_path / "a.jsonl", "-o", f"{output}/", "--device=cpu").code == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    outcome = command("encode", saved, tmp_path / "a.jsonl", "-o", f"{output}/", *options)
    assert_refused(outcome, f"output {output} holds another job: ", told, "choose another folder")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_an_output_of_another_model_or_corpus(saved, model, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").write_text("two\n")
    output = tmp_path / "out"
    encode_corpus(job_of(saved), [tmp_path / "a.txt"], output)
    with pytest.raises(PromptEmbedderError, match="another job: sources is"):
        encode_corpus(job_of(saved), [tmp_path / "b.txt"], output)
    other = load(saved, device="cpu")
    other[0].alignment.weight.data += 1
    save(other, tmp_path / "other")
    with pytest.raises(PromptEmbedderError, match=r"another job: model is \{'digest': .* choose another folder"):
        encode_corpus(job_of(tmp_path / "other"), [tmp_path / "a.txt"], output)


def test_a_folder_with_something_else(command, saved, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    outcome = command("encode", saved, tmp_path / "a.txt", "-o", f"{tmp_path}/out/")
    assert_refused(outcome, "holds diary.txt and no manifest.json")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["diary.txt"]


def test_a_file_of_another_schema_than_the_first(command, saved, tmp_path):
    parquet(tmp_path / "corpus" / "a.parquet", id=[1, 2], text=["one", "two"])
    parquet(tmp_path / "corpus" / "b.parquet", id=["x"], text=["three"])
    outcome = command("encode", saved, tmp_path / "corpus", "-o", f"{tmp_path}/out/", "--device=cpu")
    assert_refused(outcome, "1 of 2 files cannot be read, the others are done", "column 'id' is string, expected int64")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--keep=a"], "--keep is for a corpus: give a folder as output"),
        (["--named=a=b"], "--named is for a corpus"),
        (["--precision=int8"], "csv, int8 and binary are for a corpus"),
        (["b.txt"], "b.txt is a corpus: give a folder as output"),
    ],
)
def test_options_of_a_corpus_need_a_folder(command, saved, tmp_path, options, told):
    assert_refused(command("encode", saved, "a.txt", *options, "-o", tmp_path / "v.npy"), told)


def test_ray_is_an_extra(command, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "promptembedder.bulk.ray_runner", raising=False)
    outcome = command("encode", saved, "a.txt", "-o", f"{tmp_path}/out/", "--ray=auto")
    assert_refused(outcome, "--ray needs ray, which is not installed: pip install 'promptembedder[bulk]'")


def test_the_output_may_lie_in_the_corpus(saved, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("one\n")
    for _ in range(2):
        done = encode_corpus(job_of(saved), [tmp_path / "corpus"], tmp_path / "corpus" / "out")
        assert done.rows == 1


@pytest.mark.slow
def test_addresses_of_any_file_system(saved, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    texts = texts_of(200)
    with memory.open("/bucket/corpus/a.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of(texts))
    for rows, embedded in ((200, 200), (200, 0)):
        done = encode_corpus(job_of(saved), ["memory://bucket/corpus"], "memory://bucket/out")
        assert (done.rows, done.embedded) == (rows, embedded)
    encode_corpus(job_of(saved), ["memory://bucket/corpus"], tmp_path / "out")
    names = sorted(info["name"].rpartition("/")[2] for info in memory.ls("/bucket/out/parts", detail=True))
    assert names == sorted(p.name for p in (tmp_path / "out" / "parts").iterdir())
    with pytest.raises(PromptEmbedderError, match="cannot be read"):
        encode_corpus(job_of(saved), ["nonsense://bucket/corpus"], tmp_path / "other")


def test_the_model_is_known_by_its_weights_not_its_name(saved):
    assert job_module.model_identity(saved) == job_module.model_identity(f"{saved}/")
