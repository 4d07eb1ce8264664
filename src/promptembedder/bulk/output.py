"""The folder that a job writes to: parts, a manifest, rejected rows; on a disk or in an object store.

    parts/KEY-NUMBER-DIGEST.parquet   a block of a source file; KEY stands for the file, DIGEST for the block's content
    manifest.json                     the job's settings, and what is done
    rejects.jsonl                     rows that were left out
    ranges.json                       of values, for int8

A part appears whole or not at all, whatever is killed. So a part that is there is done, and needs no other record.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from promptembedder import atomic
from promptembedder.bulk.sources import file_system, opening
from promptembedder.errors import PromptEmbedderError

PARTS, MANIFEST, REJECTS, RANGES = "parts", "manifest.json", "rejects.jsonl", "ranges.json"
# Beside the columns of a part: facts of its block.
_FACTS = b"promptembedder"


@dataclass(frozen=True)
class Output:
    """An output folder.

    Attributes:
        url: with its protocol, as `whole_address` gives it.
    """

    url: str

    @property
    def local(self) -> Path | None:
        """The folder where it is on a disk."""
        return Path(self.url.removeprefix("file://")) if self.url.startswith("file://") else None

    def __str__(self) -> str:
        return str(self.local or self.url)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            with opening(str(self)):
                yield
        except PromptEmbedderError as error:
            raise PromptEmbedderError(str(error).replace("source", "output", 1).replace("read", "used", 1)) from error

    def _at(self, name: str) -> tuple[Any, str]:
        return file_system(f"{self.url}/{name}" if name else self.url)

    def names(self, inner: str = "") -> list[str]:
        """Names of the files in the folder or in a folder of it, sorted; hidden ones are left out."""
        with self._naming():
            fs, path = self._at(inner)
            fs.invalidate_cache()
            infos = fs.ls(path, detail=True) if fs.exists(path) else []
            found = sorted(info["name"].rstrip("/").rpartition("/")[2] for info in infos)
            return [name for name in found if name and name[0] != "."]

    def read(self, name: str) -> bytes | None:
        """Content of a file; None where it is not there."""
        with self._naming():
            fs, path = self._at(name)
            try:
                return bytes(fs.cat_file(path))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole."""
        with self._naming():
            if self.local is not None:
                with atomic.replacing(self.local / name) as scratch:
                    scratch.write_bytes(content)
            else:  # an object appears when all of it has arrived
                fs, path = self._at(name)
                fs.pipe_file(path, content)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Content of a JSON file; None where it is not there.

        Raises:
            PromptEmbedderError: it is not JSON.
        """
        content = self.read(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError as error:
            raise PromptEmbedderError(f"{self}/{name} is not JSON: {error}") from error

    def remove(self, name: str) -> None:
        """Remove a file that is there."""
        with self._naming():
            fs, path = self._at(name)
            fs.rm_file(path)

    @contextmanager
    def part(self, name: str) -> Iterator[pq.ParquetFile]:
        """A part, opened.

        Raises:
            PromptEmbedderError: it is damaged.
        """
        with self._naming():
            fs, path = self._at(f"{PARTS}/{name}")
            raw = fs.open(path, "rb")
        try:
            with raw, pq.ParquetFile(raw) as parquet:
                yield parquet
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise PromptEmbedderError(
                f"part {self}/{PARTS}/{name} is damaged ({error}); remove it, and run again"
            ) from error

    def write_part(self, name: str, table: pa.Table, facts: dict[str, Any]) -> None:
        """Write a part whole, with facts of its block."""
        table = table.replace_schema_metadata({_FACTS: json.dumps(facts)})
        small = [entry.name for entry in table.schema if not pa.types.is_fixed_size_list(entry.type)]
        sink = io.BytesIO()
        pq.write_table(table, sink, use_dictionary=[n for n in small if n != "digest"])
        self.write(f"{PARTS}/{name}", sink.getvalue())


def facts_of(parquet: pq.ParquetFile) -> dict[str, Any]:
    """Facts of the block that a part was made of."""
    return json.loads((parquet.schema_arrow.metadata or {}).get(_FACTS, b"{}"))  # type: ignore[no-any-return]


def part_name(key: str, number: int, digest: str) -> str:
    """File name of a part."""
    return f"{key}-{number:06d}-{digest}.parquet"
