"""Prompting LLM: instruction -> soft tokens, by differentiable generation with continuous relaxation.

Shapes: N requests, S request tokens, K soft tokens, P prompter width, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from promptembedder.errors import PromptEmbedderError, shown
from promptembedder.llms.open import input_embeddings
from promptembedder.llms.states import CACHE_ARGUMENT, States, shallow_copy
from promptembedder.llms.tokens import check_ids, opening_ids, plain_ids
from promptembedder.model.folder import PROMPTER_WEIGHTS
from promptembedder.model.generation import (
    Request,
    SoftTokens,
    last_places,
    soft_tokens_at_once,
    soft_tokens_in_turn,
)
from promptembedder.text import composed

logger = logging.getLogger(__name__)


# Some chat templates print today's date (Llama 3.2); soft prompts of one instruction must not change overnight. The day
# is the one that Llama's template falls back to.
_SAME_EVERY_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


# Soft tokens of a batch: more at once would need gigabytes for the weights of all words in each.
_MOST_AT_ONCE = 128


class Opening(NamedTuple):
    """What every request begins with, read by the LLM.

    Attributes:
        ids_P: its tokens.
        states: of one row.
    """

    ids_P: Tensor
    states: States

    def begins(self, ids_NS: Tensor, mask_NS: Tensor) -> bool:
        """Whether all requests begin with it, and go on."""
        P = len(self.ids_P)
        return ids_NS.shape[1] > P and bool((mask_NS[:, :P] != 0).all() and (ids_NS[:, :P] == self.ids_P).all())


class Prompter(nn.Module):
    """Generates K soft tokens for a request; each is the softmax-weighted mixture of the LLM's own embeddings.

    Args:
        lm: a causal LM, plain or wrapped by peft.
        tokenizer: its tokenizer; the chat template is used when there is one.
        num_soft_tokens: K.
        temperature: divides the logits before the softmax.
        max_request_tokens: longer requests are cut at the end, before the template closes.
    """

    def __init__(
        self,
        lm: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_soft_tokens: int,
        temperature: float,
        max_request_tokens: int,
    ) -> None:
        super().__init__()
        self.lm = lm.eval()
        self.tokenizer = tokenizer
        self.num_soft_tokens = num_soft_tokens
        self.temperature = temperature
        self.max_request_tokens = max_request_tokens
        self.draft_ids: list[int] | None = None
        self._holders: list[tuple[nn.Module, str]] | None = None

    def train(self, mode: bool = True) -> Prompter:
        """Keep the LLM in eval mode: dropout would make the soft prompt of a step depend on chance.

        It is there already, so its thousands of modules are not visited: `encode` calls this every time.
        """
        self.training = mode
        if self.lm.training:
            self.lm.eval()
        return self

    def tokenize(self, requests: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (N, S) int64 each, of the requests in the LLM's chat template.

        Padding stands after what all of them begin with, the template's opening, so that `begin` reads that once.

        Raises:
            PromptEmbedderError: the chat template does not take a request, or a token has no embedding.
        """
        rows = [self._request_ids(request) for request in requests]
        length = max(len(row) for row in rows)
        alike = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))
        shared = min(sum(1 for _ in alike), min(len(row) for row in rows) - 1)
        if length + self.num_soft_tokens > self._window:
            shared = 0  # padding in the middle would push the opening out of the window
        # Padding is masked, so 0 does: some pad tokens have no embedding.
        ids_NS = torch.zeros((len(rows), length), dtype=torch.long)
        mask_NS = torch.zeros_like(ids_NS)
        for n, row in enumerate(rows):
            ids = torch.tensor(row)
            ids_NS[n, :shared], ids_NS[n, length - len(row) + shared :] = ids[:shared], ids[shared:]
            mask_NS[n, :shared] = mask_NS[n, length - len(row) + shared :] = 1
        return ids_NS, mask_NS

    def words_of(self, request: str) -> str:
        """The instruction that a request names: itself. An export knows instructions by name, too."""
        return request

    @torch.no_grad()
    def read_opening(self) -> Opening | None:
        """What the chat template puts before every request, read; None where that is nothing.

        It holds as long as the weights do.
        """
        lm: Any = self.lm
        rows = [self._request_ids(request) for request in ("a", "Two words")]
        alike = [ids[0] for ids in itertools.takewhile(lambda ids: ids[0] == ids[1], zip(*rows, strict=False))]
        if not alike:
            return None
        ids_P = torch.tensor(alike, device=lm.get_input_embeddings().weight.device)
        cache = DynamicCache(config=lm.config)
        lm(
            input_ids=ids_P[None],
            **{CACHE_ARGUMENT: cache},
            use_cache=True,
            logits_to_keep=last_places(1, len(ids_P), ids_P),
        )
        return Opening(ids_P, States(cache, torch.ones_like(ids_P)[None]))

    def begin(self, ids_NS: Tensor, mask_NS: Tensor, opening: Opening | None = None) -> tuple[DynamicCache, int]:
        """Read what all requests begin with once, in place of N times; gradients pass.

        Args:
            ids_NS: request token ids, as `tokenize` pads them.
            mask_NS: 1 for tokens, 0 for padding.
            opening: of `read_opening`, where that is not to be read again.

        Returns:
            The cache to read the rest with, and how many tokens are in it; at least one is left to read.
        """
        lm: Any = self.lm
        if opening is not None and opening.begins(ids_NS, mask_NS):
            return shallow_copy(opening.states.expanded(len(ids_NS)).cache), len(opening.ids_P)
        cache = DynamicCache(config=lm.config)
        alike_S = (mask_NS != 0).all(0) & (ids_NS == ids_NS[:1]).all(0)
        shared = min(int(alike_S.cumprod(0).sum()), ids_NS.shape[1] - 1)
        if len(ids_NS) == 1 or shared == 0:
            return cache, 0
        read, kept = ids_NS[:1, :shared], last_places(1, shared, ids_NS)
        lm(input_ids=read, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=kept)
        cache.batch_repeat_interleave(len(ids_NS))
        return cache, shared

    def forward(
        self, ids_NS: Tensor, mask_NS: Tensor, opening: Opening | None = None, *, at_once: bool = False
    ) -> SoftTokens:
        """Generate K soft tokens per request, keeping gradients through all K steps.

        Args:
            ids_NS: request token ids, as `tokenize` pads them.
            mask_NS: 1 for tokens, 0 for padding.
            opening: of `read_opening`; unset: all of the requests is read.
            at_once: begin with the draft, if there is one; without gradients.
        """
        cache, shared = self.begin(ids_NS, mask_NS, opening)
        request = Request(ids_NS, mask_NS, cache, shared)
        if at_once and self.draft_ids is not None and self._has_room(ids_NS):
            return soft_tokens_at_once(self.lm, request, self.draft_ids, self.temperature)[0]
        return soft_tokens_in_turn(self.lm, request, self.num_soft_tokens, self.temperature)

    def _has_room(self, ids_NS: Tensor) -> bool:
        """Whether all soft tokens of these requests can be generated at once: in memory, and in the cache."""
        N, S = ids_NS.shape
        # A cache with a window that is full cannot go back.
        return N * self.num_soft_tokens <= _MOST_AT_ONCE and S + self.num_soft_tokens <= self._window

    @property
    def _window(self) -> int:
        """Tokens that every layer attends to."""
        config: Any = self.lm.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        return getattr(config, "sliding_window", None) or sys.maxsize

    def take_draft(self, ids: list[int] | None) -> None:
        """Set the draft of the soft tokens: K - 1 token ids; None generates them in turn.

        Raises:
            PromptEmbedderError: an id is not in the vocabulary, or there are more or fewer of them.
        """
        rows = len(input_embeddings(self.lm)[0])  # type: ignore[arg-type]
        if ids is not None and not (0 < len(ids) == self.num_soft_tokens - 1 and max(ids) < rows):
            wanted = f"{self.num_soft_tokens - 1} token ids below {rows}" if self.num_soft_tokens > 1 else "null"
            raise PromptEmbedderError(
                f"'draft' in the model's promptembedder.json must be {wanted}, found {shown(ids)}"
            )
        self.draft_ids = ids

    @torch.no_grad()
    def draft_of(self, request: str, other: str) -> list[int] | None:
        """The words that weigh most in a request's soft tokens, as a draft of other requests' soft tokens.

        Returns:
            K - 1 token ids; None where a draft is of no use: it takes most of K passes for the other request, too.
        """
        if self.num_soft_tokens == 1:
            return None
        device = self.lm.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
        first, second = (
            Request(ids_1S, mask_1S, *self.begin(ids_1S, mask_1S))
            for ids_1S, mask_1S in ((t.to(device) for t in self.tokenize([words])) for words in (request, other))
        )
        if not (self._has_room(first.ids_NS) and self._has_room(second.ids_NS)):
            return None
        found = soft_tokens_in_turn(self.lm, first, self.num_soft_tokens, self.temperature)
        ids: list[int] = found.weights_NKV[0, :-1].argmax(-1).tolist()
        passes = soft_tokens_at_once(self.lm, second, ids, self.temperature)[1]
        return ids if passes <= (self.num_soft_tokens + 1) // 2 else None

    @property
    def embeddings_dtype(self) -> torch.dtype:
        """What its frozen weights are kept in."""
        return input_embeddings(self.lm)[0].dtype  # type: ignore[arg-type]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of which `is_trained`; where they are is looked up once, what is there now every time."""
        if self._holders is None:
            self._holders = [
                (module, name)
                for place, module in self.named_modules()
                for name, _ in module.named_parameters(recurse=False)
                if self.is_trained(f"{place}.{name}")
            ]
        return [getattr(module, name) for module, name in self._holders]

    def is_trained(self, name: str) -> bool:
        """Whether a parameter of this module is one of those that training changes and `save` stores."""
        return name.startswith("lm.") and (not hasattr(self.lm, "peft_config") or "lora_" in name)

    def _request_ids(self, request: str) -> list[int]:
        request = composed(request)  # the chat template is not read by `plain_ids`
        cut = plain_ids(self.tokenizer, request)
        if len(cut) > self.max_request_tokens:
            _say_cut(len(cut), self.max_request_tokens)
            request = self.tokenizer.decode(cut[: self.max_request_tokens])
        if self.tokenizer.chat_template:
            ids = self._in_chat_template(request)
        else:
            ids = opening_ids(self.tokenizer) + plain_ids(self.tokenizer, request + "\n")
        if not ids:
            raise PromptEmbedderError("an instruction has no tokens in the prompter's vocabulary")
        check_ids(self.tokenizer, ids, len(input_embeddings(self.lm)[0]), "an instruction for the prompter")  # type: ignore[arg-type]
        return ids

    def _in_chat_template(self, request: str) -> list[int]:
        try:
            template = self.tokenizer.get_chat_template()
            encoded = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": request}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                chat_template=_SAME_EVERY_DAY + template if "strftime_now" in template else template,
            )
        except Exception as error:  # a template is a program of the LLM's maker, so it may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise PromptEmbedderError(f"the chat template of the prompter takes no instruction: {reason}") from error
        return list(encoded["input_ids"])


@cache
def _say_cut(tokens: int, limit: int) -> None:
    logger.warning("an instruction of %d tokens is read up to %d", tokens, limit)


def draft_for(prompter: Prompter, first: str, second: str) -> list[int] | None:
    """As `Prompter.draft_of`; None, too, where one of the instructions cannot be read: a draft only saves time."""
    try:
        return prompter.draft_of(first, second)
    except PromptEmbedderError as error:
        logger.warning("the model is saved without a draft of its soft tokens: %s", error)
        return None


def trained_state(prompter: Prompter) -> dict[str, Tensor]:
    """The prompter's trained weights on the CPU: LoRA in peft's naming, or every weight when fully trained."""
    lm: Any = prompter.lm
    if hasattr(lm, "peft_config"):
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(lm, save_embedding_layers=False)
    else:
        state = dict(lm.named_parameters())
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def save_prompter(prompter: Prompter, folder: Path) -> None:
    """Write the prompter's trained weights, and the settings of its LoRA."""
    folder.mkdir(exist_ok=True)
    save_file(trained_state(prompter), folder / PROMPTER_WEIGHTS)
    lm: Any = prompter.lm
    peft_config = getattr(lm, "peft_config", None)
    if peft_config is not None:
        peft_config["default"].save_pretrained(str(folder))


def load_trained_state(prompter: Prompter, path: Path) -> None:
    """Put weights written by `trained_state` back.

    Raises:
        PromptEmbedderError: names or shapes do not fit the prompter.
    """
    state = load_file(path)
    expected = {name: tuple(value.shape) for name, value in trained_state(prompter).items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))[0]
        raise PromptEmbedderError(f"{path}: weights do not fit the prompter, first difference {differing}")
    lm: Any = prompter.lm
    if hasattr(lm, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(lm, state)
    else:
        lm.load_state_dict(state, strict=False)
