"""What clients send and get: OpenAI's embeddings, and an instruction."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from promptembedder.serving.settings import MOST_INPUTS, MOST_INSTRUCTION_CHARACTERS, MOST_INSTRUCTIONS

Text = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
# Pydantic's own message for a blank one would be of patterns; see `errors`.
Instruction = Annotated[str, StringConstraints(pattern=r"\S", max_length=MOST_INSTRUCTION_CHARACTERS)]


def _kind_of_input(value: Any) -> str | None:
    """Which kind an input is to be checked as, so that an error speaks of that kind alone."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "ids" if isinstance(first, int) else "id_lists" if isinstance(first, list) else "texts"


def _kind_of_instruction(value: Any) -> str | None:
    return "one" if isinstance(value, str) else "several" if isinstance(value, list) else None


Input = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_INPUTS), Tag("id_lists")],
    Discriminator(
        _kind_of_input,
        custom_error_type="input_type",
        custom_error_message="Input should be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]
Instructions = Annotated[
    Annotated[Instruction, Tag("one")]
    | Annotated[list[Instruction], Field(min_length=1, max_length=MOST_INSTRUCTIONS), Tag("several")],
    Discriminator(
        _kind_of_instruction,
        custom_error_type="instruction_type",
        custom_error_message="Input should be a string or a list of strings",
    ),
]


class EmbeddingsRequest(BaseModel):
    """Texts to embed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="A name of /v1/models.")
    input: Input = Field(description="A text, texts, token ids of a text, or of texts.")
    instruction: Instructions | None = Field(
        None, description="What to embed the texts under. A list gives several embeddings for every text."
    )
    input_type: Literal["query", "document"] | None = Field(
        None, description="Which of the model's own instructions to use."
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian float32.")
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Keep the first dimensions, at length 1 again."
    )
    truncate: bool | None = Field(None, description="false: refuse texts longer than the model reads.")
    user: Annotated[str, StringConstraints(max_length=512)] | None = Field(None, description="Ignored.")


class Embedding(BaseModel):
    """An embedding of a text."""

    object: Literal["embedding"]
    index: int = Field(description="Which text, from 0.")
    embedding: list[float] | str
    instruction: str | None = Field(None, description="Only where the request gives instructions.")


class Usage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int = Field(description="Of the texts, without instruction and soft tokens.")
    total_tokens: int
    truncated: list[int] = Field(description="Texts that were longer than the model reads.")


class EmbeddingsResponse(BaseModel):
    """Embeddings, all texts under the first instruction first."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class Model(BaseModel):
    """A model under an instruction of its own."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    instruction: str
    digest: str | None = Field(description="Embeddings of the same digest can be compared.")
    dimensions: int
    max_text_tokens: int


class ModelList(BaseModel):
    """All models of a server."""

    object: Literal["list"]
    data: list[Model]


class ExplainRequest(BaseModel):
    """An instruction to read the soft tokens of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="A name of /v1/models.")
    instruction: Instruction | None = Field(None, description="Unset: the one that the name stands for.")
    top: Annotated[int, Field(ge=1, le=50)] = Field(5, description="Words of each soft token.")


class Word(BaseModel):
    """A token of the prompter's vocabulary in a mixture."""

    text: str
    weight: float


class SoftToken(BaseModel):
    """What one soft token mixes."""

    words: list[Word] = Field(description="Heaviest first.")
    entropy: float = Field(description="Of the whole mixture, in nats.")


class Explanation(BaseModel):
    """The soft tokens of an instruction."""

    model: str
    instruction: str
    soft_tokens: list[SoftToken]


class Status(BaseModel):
    """Of a server."""

    status: Literal["ok", "ready", "warming", "stopping"]


class Problem(BaseModel):
    """Why a request is refused."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """A refusal."""

    error: Problem
