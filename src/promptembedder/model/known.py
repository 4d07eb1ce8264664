"""Instructions with their soft prompts: what stands in the places of prompter and alignment in an exported model.

Such a model embeds under the instructions that it holds, and opens no Prompting LLM.

Shapes: N instructions, R rows of a soft prompt, D backbone width, B requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from promptembedder.errors import PromptEmbedderError
from promptembedder.model.generation import SoftTokens
from promptembedder.model.prompter import Opening

# Characters of an instruction that an error shows.
_SHOWN = 60


class KnownInstructions(nn.Module):
    """Stands in a prompter's place: the "tokens" of an instruction are its number.

    Args:
        named: instructions by name; either is understood.
    """

    temperature = 1.0

    def __init__(self, named: Mapping[str, str]) -> None:
        super().__init__()
        self.named = dict(named)
        self._numbers = {words: n for n, words in reversed(list(enumerate(self.named.values())))}

    def words_of(self, request: str) -> str:
        """The instruction that a request names, or is.

        Raises:
            PromptEmbedderError: it is not held.
        """
        words = request if request in self._numbers else self.named.get(request)
        if words is None:
            held = ", ".join(f"{name} ({_cut(text)!r})" for name, text in self.named.items())
            raise PromptEmbedderError(
                f"instruction {_cut(request)!r} is not held by this export, which has no Prompting LLM; held: {held}"
            )
        return words

    def tokenize(self, requests: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The numbers (B, 1) of instructions, and a mask of ones.

        Raises:
            PromptEmbedderError: one is not held.
        """
        ids_B1 = torch.tensor([[self._numbers[self.words_of(request)]] for request in requests], dtype=torch.long)
        return ids_B1, torch.ones_like(ids_B1)

    def forward(
        self, ids_B1: Tensor, mask_B1: Tensor, opening: Opening | None = None, *, at_once: bool = False
    ) -> SoftTokens:
        """Hand the numbers on to `SoftPromptTable`."""
        return SoftTokens(ids_B1, ids_B1.new_zeros(*ids_B1.shape, 0))

    def read_opening(self) -> None:
        """Nothing is read."""
        return None

    def trained_parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    # What trains, moves or explains a prompter asks for one of these first.

    @property
    def lm(self) -> Any:
        """Refused: there is no LLM."""
        self._refuse()

    @property
    def tokenizer(self) -> Any:
        """Refused, as `lm`."""
        self._refuse()

    @property
    def embeddings_dtype(self) -> torch.dtype:
        """Refused, as `lm`."""
        self._refuse()

    def is_trained(self, name: str) -> bool:
        """Refused, as `lm`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PromptEmbedderError(
            "this is an export: it holds soft prompts and no Prompting LLM, so it can be neither trained, transferred "
            "nor explained; use the model that it was made from"
        )


class SoftPromptTable(nn.Module):
    """Stands in an alignment's place: soft prompts by the number of their instruction.

    Args:
        weight_NRD: soft prompts, in the order of `KnownInstructions`.
    """

    def __init__(self, weight_NRD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_NRD.detach().to(torch.float32).clone(), requires_grad=False)

    def forward(self, ids_B1: Tensor) -> Tensor:
        """Soft prompts (B, R, D), float32."""
        return self.weight[ids_B1[:, 0]]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
