"""Settings and limits of a server."""

from __future__ import annotations

from dataclasses import dataclass

from promptembedder.errors import PromptEmbedderError

# As OpenAI's.
MOST_INPUTS = 2048
MOST_INSTRUCTIONS = 16
MOST_INSTRUCTION_CHARACTERS = 8192
MOST_BODY_BYTES = 16 * 2**20
# Of the bodies of all requests.
MOST_HELD_BYTES = 256 * 2**20
# A request that has not come in whole by then is refused.
BODY_SECONDS = 30.0
# Requests that are answered at once.
MOST_REQUESTS = 512
# A text counts as this many tokens at least, so that one batch does not hold thousands of short ones.
LEAST_TEXT_TOKENS = 8


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        host: address to listen on.
        port: likewise; 0: any that is free.
        api_key: clients must send it as `Authorization: Bearer KEY`; unset: none is needed.
        batch_tokens: of one forward; unset: 2,048 on a CPU, 16,384 on an accelerator.
        queue_tokens: of all texts that wait; beyond, requests get 429.
        request_tokens: of one request; beyond, it gets 413.
        new_instructions: that wait for the prompter at once; beyond, requests get 429. One client may have a quarter.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    batch_tokens: int | None = None
    queue_tokens: int = 1_000_000
    request_tokens: int = 300_000
    new_instructions: int = 64

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "queue_tokens", "request_tokens", "new_instructions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PromptEmbedderError(f"{name} is {value}, expected 1 or more")
        if not 0 <= self.port < 65_536:
            raise PromptEmbedderError(f"port is {self.port}, expected 0 to 65535")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise PromptEmbedderError("the API key must be printable ASCII")
        if self.request_tokens > self.queue_tokens:
            raise PromptEmbedderError(
                f"request_tokens is {self.request_tokens}, more than queue_tokens, {self.queue_tokens}"
            )

    @property
    def new_per_client(self) -> int:
        """New instructions of one client that wait for the prompter at once."""
        return max(1, self.new_instructions // 4)

    def batch_tokens_on(self, device: str) -> int:
        """Tokens of one forward on a kind of device."""
        return self.batch_tokens or (2048 if device == "cpu" else 16_384)
