"""Warm start: teach the prompter to write a cue that is known to work, before any contrastive training.

Shapes: N instructions, K soft tokens, C cue tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from promptembedder import workers
from promptembedder.config import WarmStartConfig
from promptembedder.errors import PromptEmbedderError
from promptembedder.module import SoftPromptTransformer


def warm_start(
    module: SoftPromptTransformer, instructions: Sequence[str], config: WarmStartConfig, seed: int, batch_size: int = 4
) -> float:
    """Teach the prompter to write a known good cue, whatever the instruction; the backbone is not run.

    Generation runs as always, each mixture fed back; the loss is the cross entropy of every soft token's mixture
    with the cue token at its place. A peaked mixture is a token embedding, so the model starts as the hard cue.

    Args:
        module: the model's first module.
        instructions: those to fit on.
        config: see `WarmStartConfig`.
        seed: draws the instructions of a step.
        batch_size: instructions per step.

    Returns:
        The smallest weight that a cue token has in its mixture at the end.

    Raises:
        PromptEmbedderError: the cue has fewer than K tokens.
    """
    K = module.settings.num_soft_tokens
    if config.cue_tokens is not None and config.cue_tokens > K:
        raise PromptEmbedderError(f"warm_start.cue_tokens = {config.cue_tokens} of {K} soft tokens")
    C = config.cue_tokens or K
    ids = module.prompter.tokenizer(" " + config.cue.strip(), add_special_tokens=False)["input_ids"]
    if len(ids) < C:
        raise PromptEmbedderError(f"warm_start.cue has {len(ids)} tokens for {C} soft tokens; give a longer one")
    device = module.alignment.weight.device
    cue_C = torch.tensor(ids[-C:], device=device)
    trained = [p for p in module.prompter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    drawn = random.Random(seed)
    reached = 0.0
    bar = tqdm(range(config.steps), desc="Warm start", disable=workers.number() > 0)
    for _ in bar:
        picked = drawn.sample(list(instructions), min(batch_size, len(instructions)))
        ids_NS, mask_NS = module.prompter.tokenize(picked)
        logits_NKV = module.prompter(ids_NS.to(device), mask_NS.to(device)).logits_NKV
        log_weights_NCV = torch.log_softmax(logits_NKV[:, -C:] / module.prompter.temperature, dim=-1)
        cue_NC = log_weights_NCV.gather(-1, cue_C.expand(len(picked), -1)[..., None])[..., 0]
        reached = float(cue_NC.detach().min().exp())
        bar.set_postfix(cue_weight=f"{reached:.2f}")
        if reached >= config.target_probability:
            bar.close()
            break
        optimizer.zero_grad()
        torch.autograd.backward(-cue_NC.mean())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return reached
