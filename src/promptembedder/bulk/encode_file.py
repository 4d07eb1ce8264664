"""Texts of a file to embeddings in a file, streamed; what the `encode` command does.

Shapes: N texts, E width of what is stored.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.model.folder import describe
from promptembedder.paths import ending, expanded
from promptembedder.progress import bar

if TYPE_CHECKING:
    from promptembedder.data.texts import TextFormat

# How values are stored.
Stored = Literal["float32", "float16", "ubinary"]
_BATCHES_PER_CHUNK = 32


def encode_file(
    model: str | Path,
    texts: str,
    output: Path,
    *,
    instruction: str | None = None,
    document: bool = False,
    kind: TextFormat | None = None,
    text_field: str = "text",
    id_field: str | None = None,
    batch_size: int = 32,
    max_text_tokens: int | None = None,
    truncate_dim: int | None = None,
    precision: Stored = "float32",
    bridge: Path | None = None,
    device: str | None = None,
) -> tuple[int, int]:
    """Embed texts of any number, in their order; the output appears when all are done.

    Args:
        model: folder, name or hub id of a saved model.
        texts: file of lines, JSONL or Parquet; `-` is standard input.
        output: `.npy` (N, E), or `.parquet` with columns id and embedding. Embeddings there are replaced, nothing else.
        instruction: unset: the model's default.
        document: take the model's document instruction.
        kind: of the texts' format; unset: by the file's ending.
        text_field: field of the text in JSONL and Parquet.
        id_field: field of the id, which is an integer, a string or bytes; unset: `id`, or the row's number, from 0,
            where no row has one.
        batch_size: texts per forward.
        max_text_tokens: truncate texts to this many tokens; unset: the model's limit.
        truncate_dim: keep this many dimensions, the first ones, at unit length again.
        precision: how values are stored; `ubinary` keeps a bit of each, eight to a byte.
        bridge: map the embeddings into an older model's space (`promptembedder.bulk.bridge`).
        device: where the model runs; unset: the accelerator, if there is one.

    Returns:
        N and E, the latter in values, not bytes.

    Raises:
        PromptEmbedderError: options contradict each other; the model, a text, an id or the bridge cannot be read; the
            output cannot be written, is one of the inputs, or holds something else than embeddings.
        MissingExtraError: Parquet without pyarrow.
    """
    _check(instruction, document, bridge, truncate_dim, precision)
    texts, output = str(expanded(texts)), expanded(output)
    atomic.refuse_input(output, texts, *([] if bridge is None else [bridge]))
    dimensions = describe(model)["dimensions"]
    # A missing model is reported before the libraries are imported, which takes seconds.
    import numpy as np

    from promptembedder.bulk.bridge import PROBE
    from promptembedder.bulk.bridge import load as load_bridge
    from promptembedder.bulk.writers import embedding_writer
    from promptembedder.model.store import load

    over = None if bridge is None else load_bridge(bridge)
    width = min(truncate_dim or sys.maxsize, dimensions)
    if over is not None:
        over(np.zeros((0, width)))  # refuses a bridge of another width before the model opens
        width = over.weight_DF.shape[1]
    stored, dtype = ((width + 7) // 8, np.uint8) if precision == "ubinary" else (width, np.dtype(precision))

    ids_kept = ending(output) == ".parquet"

    def rows() -> Iterator[tuple[Any, str]]:
        return _rows(texts, kind, text_field, id_field, ids_kept)

    id_type = _id_type(texts, kind, id_field) if ids_kept else None
    # The writer comes first: an output that cannot be written is reported before the model opens.
    with embedding_writer(output, stored, np.dtype(dtype), id_type) as writer:
        # A file is read twice, so that an error in its last line is reported before the model opens. Of other input
        # only the first chunk is read before.
        total = sum(1 for _ in rows()) if Path(texts).is_file() else None
        chunks = _chunked(rows(), _BATCHES_PER_CHUNK * batch_size)
        first = list(itertools.islice(chunks, 1))
        embedder = load(model, device=device)
        if max_text_tokens is not None:
            embedder.max_seq_length = max_text_tokens
        options: dict[str, Any] = {"prompt": instruction, "batch_size": batch_size, "show_progress_bar": False}
        options |= {"precision": "ubinary"} if precision == "ubinary" else {}
        options |= {"task": "document"} if document else {}
        options |= {"truncate_dim": width} if truncate_dim is not None else {}
        if over is not None:
            over.check(embedder.encode([PROBE], **options)[0])
        elif truncate_dim is not None or embedder.truncate_dim is not None:
            options["normalize_embeddings"] = True  # a part of a vector of length 1 is shorter
        count = 0
        for chunk in _progress(itertools.chain(first, chunks), total):
            ids, batch = zip(*chunk, strict=True)
            embeddings = embedder.encode(list(batch), **options)
            writer.write(list(ids), embeddings if over is None else over(embeddings).astype(dtype))
            count += len(ids)
    return count, width


def _check(
    instruction: str | None,
    document: bool,
    bridge: Path | None,
    truncate_dim: int | None,
    precision: Stored,
) -> None:
    """Refuse options that contradict each other."""
    if instruction is not None and (document or not instruction.strip()):
        raise PromptEmbedderError("--instruction must be a sentence and cannot go with --document")
    if bridge is not None and (truncate_dim is not None or precision == "ubinary"):
        raise PromptEmbedderError("--bridge needs whole embeddings: leave --truncate-dim and ubinary out")


def _rows(
    texts: str, kind: TextFormat | None, text_field: str, id_field: str | None, ids: bool
) -> Iterator[tuple[Any, str]]:
    from promptembedder.data.texts import read_texts

    with needs_extra("parquet", "reading Parquet"):
        yield from read_texts(texts, kind, text_field, id_field, ids=ids)


def _id_type(texts: str, kind: TextFormat | None, id_field: str | None) -> Any | None:
    from promptembedder.data.texts import parquet_id_type

    with needs_extra("parquet", "reading Parquet"):
        return parquet_id_type(texts, kind, id_field)


def _chunked(rows: Iterator[tuple[Any, str]], size: int) -> Iterator[list[tuple[Any, str]]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _progress(chunks: Iterator[list[tuple[Any, str]]], total: int | None) -> Iterator[list[tuple[Any, str]]]:
    """Count texts on standard error; how many will come from standard input is unknown."""
    with bar(unit=" texts", desc="Encoding", total=total) as shown:
        for chunk in chunks:
            yield chunk
            shown.update(len(chunk))
