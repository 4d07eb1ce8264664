"""What goes through the modules of a model, with an answer to who asks for what it does not have."""

from __future__ import annotations

from typing import Any, NoReturn

from promptembedder.errors import PromptEmbedderError


class Features(dict[str, Any]):
    """A dict of named outputs; `model.encode(output_value=...)` of sentence-transformers looks up what it returns.

    Example:
        >>> Features(sentence_embedding=1)["token_embeddings"]
        Traceback (most recent call last):
        ...
        promptembedder.errors.PromptEmbedderError: a model gives no 'token_embeddings', only sentence_embedding
    """

    def __missing__(self, name: str) -> NoReturn:
        """Refuse a name that is not there.

        Raises:
            PromptEmbedderError: always.
        """
        raise PromptEmbedderError(f"a model gives no {name!r}, only {', '.join(self)}")
