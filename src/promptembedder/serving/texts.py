"""First stage of a request: its texts to token ids, and whether its instructions can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from promptembedder.errors import PromptEmbedderError
from promptembedder.serving.errors import RequestError
from promptembedder.serving.models import Served


@dataclass(frozen=True)
class Tokenised:
    """The texts of a request.

    Attributes:
        rows: token ids of each, as the backbone reads them.
        tokens: of all texts, as far as they are read, without the template.
        truncated: texts that are longer than the model reads.
    """

    rows: list[list[int]]
    tokens: int
    truncated: list[int]


def tokenise(
    model: Served, given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], *, truncate: bool, most: int
) -> Tokenised:
    """Token ids of the texts of a request.

    Args:
        model: that reads them.
        given: the request's `input`, checked by its schema.
        truncate: off: refuse texts longer than the model reads.
        most: tokens of a request.

    Raises:
        RequestError: a token that the model has no embedding for, a text too long, too many tokens.
    """
    reader, limit = model.module.reader, model.module.settings.max_text_tokens
    rows, truncated, total = [], [], 0
    for n, text in enumerate(_listed(given)):
        ids = _ids(model, text, n)
        if len(ids) > limit:
            if not truncate:
                raise RequestError(
                    400,
                    f"input[{n}] has {len(ids)} tokens, the model reads {limit}; leave 'truncate' out to cut it",
                    "text_too_long",
                    f"input[{n}]",
                )
            truncated.append(n)
        total += min(len(ids), limit)
        if total > most:
            raise RequestError(
                413,
                f"a request may have {most} tokens, input[{n}] is beyond that; send less",
                "too_many_tokens",
                "input",
            )
        rows.append(reader.framed(ids, limit))
    return Tokenised(rows, total, truncated)


def _listed(given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> Sequence[str | Sequence[int]]:
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]  # type: ignore[list-item]
    return given  # type: ignore[return-value]


def _ids(model: Served, text: str | Sequence[int], n: int) -> list[int]:
    reader = model.module.reader
    if isinstance(text, str):
        try:
            return reader.text_ids(text)
        except PromptEmbedderError as error:
            raise RequestError(400, f"input[{n}]: {error}", "unreadable_text", f"input[{n}]") from error
    if max(text) >= reader.rows:
        raise RequestError(
            400,
            f"input[{n}] holds token id {max(text)}, {model.name} has ids 0 to {reader.rows - 1}; "
            "token ids must be those of the model's own tokenizer",
            "unknown_token_id",
            f"input[{n}]",
        )
    return list(text)


def check_instructions(model: Served, instructions: Sequence[str]) -> None:
    """Refuse instructions that the model cannot read.

    Raises:
        RequestError: one cannot be read, or is not held by an export.
    """
    for n, instruction in enumerate(instructions):
        try:
            model.module.check_instruction(instruction)
        except PromptEmbedderError as error:
            raise RequestError(400, f"instruction {n}: {error}", "unreadable_instruction", "instruction") from error
