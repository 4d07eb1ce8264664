"""Warm start: teach the prompter to write a cue that is known to work, before any contrastive training.

Shapes: N instructions, S request tokens, K soft tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from promptembedder import progress
from promptembedder.data import aspects as made_up
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.states import CACHE_ARGUMENT
from promptembedder.llms.tokens import continuing_ids
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.model.prompter import Prompter
from promptembedder.training import workers
from promptembedder.training.settings import WarmStartConfig

logger = logging.getLogger(__name__)


_BATCH = 8
# So many steps in a row must reach the target, because each sees a few of endlessly many instructions.
_AGREEING = 8
# Among endless made-up instructions some are misread to the end; up to this share of the tokens needs no warning.
_FEW = 0.05


def warm_start(
    module: SoftPromptTransformer,
    instructions: Mapping[str, str | None],
    config: WarmStartConfig,
    seed: int,
) -> float:
    """Teach the prompter to write a known good cue; the backbone is not run.

    Supervised as a language model is: the request is followed by the cue, and each cue token's cross entropy counts
    until it is half way from `target_probability` to 1. A peaked mixture is a token embedding, so the model starts
    as the hard cue.

    Args:
        module: the model's first module.
        instructions: those of the run, each with its aspect where that is known. A cue with `{aspect}` is also
            fitted on made-up instructions (`aspects`), half of each step, so that it carries over to unseen ones.
        config: see `WarmStartConfig`; at least one step.
        seed: draws the instructions of a step.

    Returns:
        The smallest weight that a cue token had in the last steps.

    Raises:
        PromptEmbedderError: the cue has fewer than K tokens, or its aspect is not among the last K; an aspect is
            not one token.
    """
    prompter = module.prompter
    device = module.alignment.weight.device
    trained = [p for p in prompter.lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=config.steps)
    examples = _examples(prompter, instructions, config, seed)
    lately: deque[Tensor] = deque(maxlen=_AGREEING)
    bar = progress.bar(range(config.steps), "Warm start", show=workers.number() == 0)
    for _ in bar:
        batch = [next(examples) for _ in range(_BATCH)]
        cue_NK = torch.stack([_cue_ids(prompter, config.cue, aspect) for _, aspect in batch]).to(device)
        log_weights_NK = _log_weights(prompter, [instruction for instruction, _ in batch], cue_NK)
        lately.append(log_weights_NK.detach().exp())
        least = float(torch.stack(list(lately)).min())
        bar.set_postfix(cue_weight=f"{least:.2f}")
        if len(lately) == _AGREEING and least >= config.target_probability:
            bar.close()
            break
        optimizer.zero_grad()
        # What is well past the target is left alone: a saturated softmax passes no gradient on to later training.
        short_NK = log_weights_NK.detach().exp() < (1 + config.target_probability) / 2
        torch.autograd.backward(-(log_weights_NK * short_NK).mean())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        falling.step()
    optimizer.zero_grad()
    short = float((torch.stack(list(lately)) < config.target_probability).float().mean())
    if short > _FEW and workers.number() == 0:
        logger.warning(
            "warm start: after %d steps %.0f %% of the cue's tokens have a weight below target_probability, %.2f",
            *(config.steps, 100 * short, config.target_probability),
        )
    return least


def _examples(
    prompter: Prompter, instructions: Mapping[str, str | None], config: WarmStartConfig, seed: int
) -> Iterator[tuple[str, str]]:
    """Endless (instruction, aspect) pairs to fit on; wrong settings raise at once."""
    drawn = random.Random(seed)
    _cue_ids(prompter, config.cue, made_up.MEANING)
    usable = [aspect for aspect in made_up.ASPECTS if _is_token(prompter, aspect)]
    if "{aspect}" in config.cue and len(usable) < 2:
        logger.warning("the prompter's vocabulary splits common nouns: warm start with one cue for all instructions")
    if "{aspect}" not in config.cue or len(usable) < 2:
        every = sorted(instructions)
        return ((drawn.choice(every), made_up.MEANING) for _ in itertools.count())
    known = sorted((name, aspect) for name, aspect in instructions.items() if aspect)
    split = {aspect for _, aspect in known if not _is_token(prompter, aspect)}
    if wrong := sorted(split - set(made_up.ASPECTS)):
        raise PromptEmbedderError(f"aspect {wrong[0]!r} is not one token of the prompter; name another word")
    if split:
        logger.warning("the prompter's vocabulary splits %s: no warm start for these", ", ".join(sorted(split)))
    known = [(name, aspect) for name, aspect in known if aspect not in split]
    if torch.equal(_cue_ids(prompter, config.cue, usable[0]), _cue_ids(prompter, config.cue, usable[1])):
        raise PromptEmbedderError(
            f"the aspect is not among the last {prompter.num_soft_tokens} tokens of warm_start.cue; "
            f"give a shorter one, such as '{{aspect}}{':' if prompter.num_soft_tokens > 1 else ''}'"
        )
    invented = made_up.made_up_instructions(usable, seed)
    return (drawn.choice(known) if known and drawn.random() < 0.5 else next(invented) for _ in itertools.count())


def _is_token(prompter: Prompter, word: str) -> bool:
    return len(continuing_ids(prompter.tokenizer, " " + word)) == 1


def _cue_ids(prompter: Prompter, cue: str, aspect: str) -> Tensor:
    """The cue's last K tokens, (K,)."""
    K = prompter.num_soft_tokens
    words = " " + cue.replace("{aspect}", aspect).strip()
    ids = continuing_ids(prompter.tokenizer, words)
    if len(ids) < K:
        raise PromptEmbedderError(f"warm_start.cue has {len(ids)} tokens for {K} soft tokens; give a longer one")
    return torch.tensor(ids[-K:])


def _log_weights(prompter: Prompter, instructions: Sequence[str], cue_NK: Tensor) -> Tensor:
    """Log weight (N, K) of every cue token in the mixture at its place, after the cue's tokens before it."""
    ids_NS, mask_NS = (tensor.to(cue_NK.device) for tensor in prompter.tokenize(instructions))
    ids = torch.cat([ids_NS, cue_NK[:, :-1]], dim=1)
    mask = torch.cat([mask_NS, torch.ones_like(cue_NK[:, :-1])], dim=1)
    cache, shared = prompter.begin(ids_NS, mask_NS)
    logits_NKV = prompter.lm(
        input_ids=ids[:, shared:],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, shared:],
        **{CACHE_ARGUMENT: cache},
        use_cache=True,
        logits_to_keep=cue_NK.shape[1],
    ).logits
    log_weights_NKV = torch.log_softmax(logits_NKV.float() / prompter.temperature, dim=-1)
    return log_weights_NKV.gather(-1, cue_NK[..., None])[..., 0]
