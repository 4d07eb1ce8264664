"""What a model has during training only: soft prompts of a step as leaves of its graph, a cache, shorter texts.

Shapes: K soft tokens, D backbone width, R rows of a soft prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from promptembedder.llms.state_cache import TextStateCache


class SoftPromptLeaves:
    """Soft prompts of one optimizer step, one per distinct instruction, detached from the graph that made them.

    All forward calls of the step share a leaf; loss gradients add up on its R x D values, and `backward` sends
    them through alignment and prompter once. The gradient is the same as without leaves, by the chain rule.

    Attributes:
        embedding_bytes: size of the embeddings made with gradients since it was last set to 0.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[Tensor, Tensor]] = {}
        self._constant: dict[str, Tensor] = {}
        self.embedding_bytes = 0

    def leaf(self, instruction: str, make: Callable[[], Tensor]) -> Tensor:
        """The leaf (1, R, D) of an instruction; `make` gives the soft prompt with its graph, once a step."""
        if instruction not in self._made:
            made_1KD = make()
            self._made[instruction] = (made_1KD, made_1KD.detach().requires_grad_())
        return self._made[instruction][1]

    def constant(self, instruction: str, make: Callable[[], Tensor]) -> Tensor:
        """Soft tokens of a prompter that is not trained: made once in all the training."""
        if instruction not in self._constant:
            with torch.no_grad():
                self._constant[instruction] = make()
        return self._constant[instruction]

    @property
    def instructions(self) -> set[str]:
        """Those that have a leaf."""
        return set(self._made)

    def has_gradient(self, instruction: str) -> bool:
        """Whether the step's losses have reached the leaf of an instruction."""
        return instruction in self._made and self._made[instruction][1].grad is not None

    def backward(self) -> None:
        """Send the gradients on and forget the leaves: the weights are about to change."""
        made, self._made = self._made, {}
        # One after the other by name: workers must add up in the same order to stay bitwise in step.
        for _, (graph, leaf) in sorted(made.items()):
            if leaf.grad is not None:
                torch.autograd.backward(graph, leaf.grad)


@dataclass(frozen=True)
class TrainingState:
    """What a `SoftPromptTransformer` has while it is trained, handed in by `SoftPromptTransformer.in_training`.

    Attributes:
        leaves: soft prompts of the current step; unset: soft prompts are ordinary nodes of the graph.
        text_cache: states of texts, layout `suffix`; unset: every text is read.
        max_text_tokens: texts are truncated here, if the model reads more; unset: where the model truncates them.
    """

    leaves: SoftPromptLeaves | None = None
    text_cache: TextStateCache | None = None
    max_text_tokens: int | None = None
