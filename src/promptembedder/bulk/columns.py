"""Which columns of a corpus are read, and of what type they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import types

from promptembedder.errors import PromptEmbedderError

# Columns of a part beside those of instructions and of the corpus.
OWN = ("id", "chunk", "start", "end", "digest")
# Of a block: what is embedded; a kept column may be called "text".
TEXT = "text to embed"
_ID_KINDS = ("integer", "string", "large_string", "binary", "large_binary", "fixed_size_binary", "decimal", "date")


@dataclass(frozen=True)
class Columns:
    """Columns of every file of a corpus.

    Attributes:
        text: name of the text's column.
        id: name of the id's column; unset: ids are made up, of a file's name and the row's number.
        id_type: Arrow type of ids.
        kept: further columns that go into the output, with their types.
    """

    text: str
    id: str | None
    id_type: pa.DataType
    kept: tuple[tuple[str, pa.DataType], ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """Of a block: id, text and what is kept."""
        return pa.schema([("id", self.id_type), (TEXT, pa.large_string()), *self.kept])

    @property
    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "text": self.text,
            "id": self.id,
            "id_type": str(self.id_type),
            "kept": {n: str(t) for n, t in self.kept},
        }


def of_schema(schema: pa.Schema, where: str, text: str, identity: str | None, keep: Sequence[str]) -> Columns:
    """Columns of a Parquet file.

    Raises:
        PromptEmbedderError: one is missing, or its values cannot be texts, ids or flat values.
    """
    for one in (text, *([identity] if identity else []), *keep):
        if one not in schema.names:
            raise PromptEmbedderError(f"{where} has no column {one!r}, only {', '.join(schema.names)}")
        if schema.names.count(one) > 1:
            raise PromptEmbedderError(f"{where} has {schema.names.count(one)} columns {one!r}, expected one")
    found = plain(schema.field(text).type)
    if not (types.is_string(found) or types.is_large_string(found)):
        raise PromptEmbedderError(f"{where}: column {text!r} is {found}, expected strings to embed")
    name = identity or ("id" if "id" in schema.names else None)
    if name is not None and types.is_null(schema.field(name).type):
        name = None
    id_type = pa.string() if name is None else plain(schema.field(name).type)
    if not any(getattr(types, f"is_{kind}")(id_type) for kind in _ID_KINDS):
        raise PromptEmbedderError(f"{where}: column {name!r} is {id_type}; ids must be integers, strings or bytes")
    kept = tuple((one, plain(schema.field(one).type)) for one in keep)
    for one, kind in kept:
        _check_flat(where, one, kind)
    return Columns(text, name, id_type, kept)


def of_records(
    records: Sequence[dict[str, Any]], where: str, text: str, identity: str | None, keep: Sequence[str]
) -> Columns:
    """Columns of rows of JSONL, by the first of them.

    Raises:
        PromptEmbedderError: as in `of_schema`.
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    for one in (text, *([identity] if identity else []), *keep):
        if one not in names:
            raise PromptEmbedderError(f"{where} has no field {one!r}, only {', '.join(names)}")
    name = identity or ("id" if any(record.get("id") is not None for record in records[:1]) else None)
    kept = []
    for one in keep:
        kind = _type_of([record.get(one) for record in records])
        _check_flat(where, one, kind)
        kept.append((one, pa.string() if types.is_null(kind) else kind))
    if name is None:
        return Columns(text, None, pa.string(), tuple(kept))
    given = [record[name] for record in records if record.get(name) is not None]
    if given and (isinstance(given[0], bool) or not isinstance(given[0], (str, int))):
        raise PromptEmbedderError(
            f"{where}: field {name!r} is {type(given[0]).__name__}; ids must be integers or strings"
        )
    id_type = pa.int64() if given and isinstance(given[0], int) else pa.string()
    return Columns(text, name, id_type, tuple(kept))


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        return pa.infer_type(values)
    except (pa.ArrowException, OverflowError):  # of several types; those of other types than the first are refused
        return pa.infer_type([value for value in values if value is not None][:1])


def plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary-encoded column."""
    return kind.value_type if types.is_dictionary(kind) else kind


def _check_flat(where: str, name: str, kind: pa.DataType) -> None:
    if types.is_nested(kind):
        raise PromptEmbedderError(f"{where}: column {name!r} is nested ({kind}); --keep takes flat columns")
