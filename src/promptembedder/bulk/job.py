"""What a job is: the settings that decide what its output holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from promptembedder.bulk.columns import OWN, Columns
from promptembedder.digest import sha256_of
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.folder import describe, folder_of, read_saved
from promptembedder.model.named import check_named

# How values are stored. `binary` keeps a bit of each, eight to an int8; `ubinary` the same, to a uint8.
Stored = Literal["float32", "float16", "int8", "binary", "ubinary"]


@dataclass(frozen=True)
class Job:
    """Settings of a job.

    Attributes:
        model: folder, name or hub id of a saved model.
        instructions: by name; each has a column of that name in the output.
        precision: how values are stored.
        max_text_tokens: most tokens of a text; longer ones are truncated; unset: the model's limit.
        truncate_dim: keep this many dimensions, the first ones, at length 1 again; unset: all.
        chunk_tokens: tokens of a part of a text, each of which makes a row; unset: a row for each text.
        overlap: tokens that a part shares with the one before.
        batch_tokens: of one forward; unset: 2,048 on a CPU, 16,384 on an accelerator.
        device: where the model runs; unset: the accelerator, if there is one.
        keep: columns of the corpus that go into the output.
    """

    model: str
    instructions: Mapping[str, str]
    precision: Stored = "float32"
    max_text_tokens: int | None = None
    truncate_dim: int | None = None
    chunk_tokens: int | None = None
    overlap: int = 0
    batch_tokens: int | None = None
    device: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_named(self.instructions)
        for name in (*self.keep, *self.instructions):
            if name in OWN or (name in self.keep and name in self.instructions):
                raise PromptEmbedderError(f"the output has a column {name!r} already; choose another name")
        if len(set(self.keep)) < len(self.keep):
            raise PromptEmbedderError("a column is given to --keep twice")
        if self.chunk_tokens is None and self.overlap:
            raise PromptEmbedderError("--overlap is for parts of texts: give --chunk-tokens, too")
        if self.chunk_tokens is not None and not 0 <= self.overlap < self.chunk_tokens:
            raise PromptEmbedderError(
                f"--overlap is {self.overlap}, expected less than --chunk-tokens, {self.chunk_tokens}"
            )

    def check_against(self, facts: Mapping[str, Any]) -> None:
        """Refuse settings that the model cannot have, before it opens.

        Args:
            facts: of the model, as `describe` gives them.

        Raises:
            PromptEmbedderError: it cannot.
        """
        limit = min(self.max_text_tokens or facts["max_text_tokens"], facts["max_text_tokens"])
        if self.chunk_tokens is not None and self.chunk_tokens > limit:
            raise PromptEmbedderError(
                f"--chunk-tokens is {self.chunk_tokens}, and the model reads {limit} tokens of a text"
            )

    def identity(self, columns: Columns, sources: Sequence[str], part_rows: int) -> dict[str, Any]:
        """All that parts of one output must have in common."""
        return {
            "sources": list(sources),
            "model": model_identity(self.model),
            "instructions": dict(self.instructions),
            "columns": columns.facts,
            "precision": self.precision,
            "max_text_tokens": self.max_text_tokens,
            "truncate_dim": self.truncate_dim,
            "chunk_tokens": self.chunk_tokens,
            "overlap": self.overlap,
            "part_rows": part_rows,
        }


def model_identity(model: str | Path) -> dict[str, str]:
    """Digests of a model's own weights and settings and of its backbone; opens no LLM."""
    folder = folder_of(model)
    saved = read_saved(folder)
    files = [saved.weights_file, *([] if saved.instructions is not None else [saved.prompter_weights])]
    settings = [folder / name for name in ("promptembedder.json", "config_sentence_transformers.json", "modules.json")]
    return {
        "digest": sha256_of([path for path in [*settings, *files] if path.is_file()])[:16],
        "backbone": saved.base_models.backbone,
        "backbone_fingerprint": saved.base_models.backbone_fingerprint,
    }


def chosen_instructions(
    model: str, instruction: str | None, document: bool, named: Mapping[str, str]
) -> dict[str, str]:
    """Instructions by name: `query` for the one given or the model's own, `document`, and those that have names."""
    if instruction is not None and document:
        raise PromptEmbedderError("--instruction must be a sentence and cannot go with --document")
    if instruction is not None and "query" in named:
        raise PromptEmbedderError("--named query: the name is given twice, --instruction is named query")
    facts = describe(model)
    if document:
        return {"document": facts["document_instruction"], **named}
    if instruction is None and named:
        return dict(named)
    return {"query": instruction or facts["default_instruction"], **named}
