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

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.open import input_embeddings
from promptembedder.llms.states import CACHE_ARGUMENT, States, shallow_copy
from promptembedder.llms.tokens import check_ids, opening_ids, plain_ids
from promptembedder.model.folder import PROMPTER_WEIGHTS
from promptembedder.text import composed

logger = logging.getLogger(__name__)


# Some chat templates print today's date (Llama 3.2); soft prompts of one instruction must not change overnight. The day
# is the one that Llama's template falls back to.
_SAME_EVERY_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


# Share of a number's last bit: all words that weigh less do not change a mixture together.
_NO_WEIGHT = 1e-6
# Share of the largest input by which soft tokens may move and still count as at rest; an eighth of the last bit of
# coarser numbers. What they move by decides the tokens after them, whose words it hardly changes.
_AT_REST = 1e-5


class SoftTokens(NamedTuple):
    """What the prompter wrote.

    Attributes:
        tokens_NKP: soft tokens in the prompter's input-embedding space.
        weights_NKV: of every token of the vocabulary in each mixture; they sum to 1.
    """

    tokens_NKP: Tensor
    weights_NKV: Tensor


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
        # Tokens near the first K - 1 soft tokens of most requests, to begin with; unset: none are known.
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
        lm: Any = self.lm
        rows = [self._request_ids(request) for request in requests]
        length = max(len(row) for row in rows)
        alike = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))
        shared = min(sum(1 for _ in alike), min(len(row) for row in rows) - 1)
        window = getattr(lm.config.get_text_config(decoder=True), "sliding_window", None)
        if length + self.num_soft_tokens > (window or sys.maxsize):
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
        lm(input_ids=ids_P[None], **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=_last_of(len(ids_P), ids_P))
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
        read, kept = ids_NS[:1, :shared], _last_of(shared, ids_NS)
        lm(input_ids=read, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=kept)
        cache.batch_repeat_interleave(len(ids_NS))
        return cache, shared

    def forward(self, ids_NS: Tensor, mask_NS: Tensor, opening: Opening | None = None) -> SoftTokens:
        """Generate K soft tokens per request, keeping gradients through all K steps.

        No sampling and no argmax: soft token k = softmax(logits_k / temperature) @ embeddings, fed back as the
        next input (PromptEmbedder, arXiv 2605.28066; the relaxation as in GIRCSE). Without gradients and with a draft,
        all K are generated at once.

        Args:
            ids_NS: request token ids, as `tokenize` pads them.
            mask_NS: 1 for tokens, 0 for padding.
            opening: of `read_opening`; unset: all of the requests is read.
        """
        config = self.lm.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        window = getattr(config, "sliding_window", None) or sys.maxsize
        drafted = self.draft_ids is not None and len(self.draft_ids) == self.num_soft_tokens - 1 > 0
        if drafted and not torch.is_grad_enabled() and ids_NS.shape[1] + self.num_soft_tokens <= window:
            return self._at_once(ids_NS, mask_NS, opening)
        return self._in_turn(ids_NS, mask_NS, opening)

    def _at_once(self, ids_NS: Tensor, mask_NS: Tensor, opening: Opening | None) -> SoftTokens:
        """Soft tokens as a fixed point: all from a draft, and again from those found, until they are at rest.

        Soft token k depends on those before it alone, so every pass gets one more of them right whatever the draft, and
        K passes are the most (Jacobi iteration: Song et al. 2021, arXiv 2002.03629; in decoding Santilli et al. 2023,
        arXiv 2305.10427). A prompter that writes the same cue after one word of its own takes two.
        """
        lm: Any = self.lm
        embeddings_VP, scale = input_embeddings(lm)
        cache, shared = self.begin(ids_NS, mask_NS, opening)
        rest_NSP = lm.get_input_embeddings()(ids_NS[:, shared:])
        draft_1JP = lm.get_input_embeddings()(ids_NS.new_tensor([self.draft_ids]))
        N, S, J = *ids_NS.shape, draft_1JP.shape[1]
        tokens_NKP = torch.cat([draft_1JP, draft_1JP[:, -1:]], dim=1).repeat(N, 1, 1)
        limit = max(_AT_REST, torch.finfo(tokens_NKP.dtype).eps / 8) * float(draft_1JP.abs().max())
        mask_NS = torch.cat([mask_NS, mask_NS.new_ones(N, J)], dim=1)
        positions_NS = (mask_NS.cumsum(-1) - 1).clamp(min=0)
        weights_NKV: Tensor | None = None
        found = 0  # soft tokens at rest, whose states are in the cache
        while True:
            inputs_NSP = (
                tokens_NKP[:, found:J] if weights_NKV is not None else torch.cat([rest_NSP, tokens_NKP[:, :J]], 1)
            )
            first = found + 1 if weights_NKV is not None else 0  # soft token that this pass finds first
            read = inputs_NSP.shape[1]
            output = lm(
                inputs_embeds=inputs_NSP,
                attention_mask=mask_NS,
                position_ids=positions_NS[:, S + J - read :],
                **{CACHE_ARGUMENT: cache},
                use_cache=True,
                logits_to_keep=torch.arange(read - (J + 1 - first), read, device=ids_NS.device),
            )
            logits_NKV = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
            new_NKV = torch.softmax(logits_NKV / self.temperature, dim=-1)
            new_NKP = mixture(new_NKV.flatten(0, 1), embeddings_VP).view(N, J + 1 - first, -1) * scale
            moved_J = (new_NKP - tokens_NKP[:, first:])[:, : J - first].abs().amax((0, 2))
            tokens_NKP = torch.cat([tokens_NKP[:, :first], new_NKP], dim=1)
            weights_NKV = new_NKV if weights_NKV is None else torch.cat([weights_NKV[:, :first], new_NKV], dim=1)
            moving = (moved_J > limit).nonzero()[:, 0].tolist()
            if not moving:
                return SoftTokens(tokens_NKP, weights_NKV)
            found = first + moving[0]
            cache.crop(found - J)

    def _in_turn(self, ids_NS: Tensor, mask_NS: Tensor, opening: Opening | None) -> SoftTokens:
        """Soft tokens one after the other, each with a pass of its own."""
        lm: Any = self.lm
        embeddings_VP, scale = input_embeddings(lm)
        cache, shared = self.begin(ids_NS, mask_NS, opening)
        inputs_NSP = lm.get_input_embeddings()(ids_NS[:, shared:])
        positions_NS = (mask_NS.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        tokens, weights = [], []
        for step in range(self.num_soft_tokens):
            output = lm(
                inputs_embeds=inputs_NSP,
                attention_mask=mask_NS,
                position_ids=positions_NS,
                **{CACHE_ARGUMENT: cache},
                use_cache=True,
                logits_to_keep=_last_of(inputs_NSP.shape[1], ids_NS),
            )
            logits_NV = output.logits[:, -1]
            logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
            weights_NV = torch.softmax(logits_NV / self.temperature, dim=-1)
            token_NP = mixture(weights_NV, embeddings_VP) * scale
            tokens.append(token_NP)
            weights.append(weights_NV)
            if step + 1 < self.num_soft_tokens:
                inputs_NSP = token_NP[:, None]
                mask_NS = torch.cat([mask_NS, mask_NS.new_ones(len(mask_NS), 1)], dim=1)
                positions_NS = positions_NS[:, -1:] + 1
        return SoftTokens(torch.stack(tokens, 1), torch.stack(weights, 1))

    def take_draft(self, ids: list[int] | None) -> None:
        """Begin with these tokens from now on; None: with none.

        Raises:
            PromptEmbedderError: one of them is not in the vocabulary.
        """
        if ids is not None:
            check_ids(self.tokenizer, ids, len(input_embeddings(self.lm)[0]), "the draft of a prompter")  # type: ignore[arg-type]
        self.draft_ids = ids

    @torch.no_grad()
    def draft_from(self, request: str) -> None:
        """Take the words that weigh most in a request's soft tokens as the draft for other requests."""
        device = self.lm.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
        ids_1S, mask_1S = (tensor.to(device) for tensor in self.tokenize([request]))
        self.draft_ids = self._in_turn(ids_1S, mask_1S, None).weights_NKV[0, :-1].argmax(-1).tolist()

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


def _last_of(tokens: int, like: Tensor) -> Tensor:
    """Place of the last token, for `logits_to_keep`.

    By place, not by number: of a number the LLM makes a slice, and torch multiplies a slice of a longer row by a copy
    of the output embeddings, which takes longer than the rest of the pass.
    """
    return torch.tensor([tokens - 1], device=like.device)


@cache
def _say_cut(tokens: int, limit: int) -> None:
    logger.warning("an instruction of %d tokens is read up to %d", tokens, limit)


def mixture(weights_NV: Tensor, embeddings_VP: Tensor) -> Tensor:
    """Means (N, P) of embeddings, weighted.

    Without gradients, words of no weight to speak of are not read: a mixture of few words costs less than a pass over
    the whole matrix of embeddings.
    """
    if not torch.is_grad_enabled() and embeddings_VP.device.type == "cpu":
        least = _NO_WEIGHT * torch.finfo(embeddings_VP.dtype).eps
        ids = (weights_NV > least).any(0).nonzero()[:, 0]
        if len(ids) < len(embeddings_VP) // 8:
            return weights_NV[:, ids].to(embeddings_VP.dtype) @ embeddings_VP[ids]
    return weights_NV.to(embeddings_VP.dtype) @ embeddings_VP


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
