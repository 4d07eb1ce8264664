"""Learning rates of what is not the prompter's.

Shapes: P prompter width, D backbone width, V vocabulary, S some words.
"""

from __future__ import annotations

import logging
import math

from torch import Tensor
from transformers import PreTrainedModel

from promptembedder.llms.open import input_embeddings
from promptembedder.model.fits import some_words
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.training import workers
from promptembedder.training.settings import TrainingConfig

logger = logging.getLogger(__name__)


# Of SmolLM2-135M before itself, for which the default rates were found: what `rate_factor` compares with.
_REACH_OF_REFERENCE = 429.0


def rate_factor(prompter_VP: Tensor, backbone_VD: Tensor) -> float:
    """What W's learning rate is multiplied by, a power of two, so that a step is as long before any pair of LLMs.

    Adam moves every number of W by about the rate, whatever the gradient, so that one of a soft prompt s W moves by up
    to the rate times |s|_1. How much that is depends on the size of the backbone's words: a step that is right
    for SmolLM2 is seven times too long before Qwen2.5-0.5B and eight times too short before Gemma 3.

    Args:
        prompter_VP: token embeddings as the prompter reads them, all or some (a factor such as gemma's included).
        backbone_VD: the backbone's likewise.
    """
    reach = float(prompter_VP.abs().sum(-1).median()) / float(backbone_VD.square().mean(-1).sqrt().median())
    return 2.0 ** round(math.log2(_REACH_OF_REFERENCE / reach))


# Names as the trainer sees them, in the loss: `model.0.alignment.weight`, a linear head's `model.1.linear.weight`.
_ALIGNMENT, _HEAD = r"\.alignment\.", r"\.\d+\.linear\."


def learning_rates(module: SoftPromptTransformer, settings: TrainingConfig) -> dict[str, float]:
    """Of what is not the prompter's, by name pattern."""
    rate = settings.alignment_learning_rate
    factor = rate_factor(_words(module.prompter.lm), _words(module.backbone.lm))
    if factor != 1 and workers.number() == 0:
        logger.info("learning rate of W: %g x %g, by the size of the two LLMs' words", rate, factor)
    return {_ALIGNMENT: rate * factor} | ({_HEAD: rate} if module.settings.linear_head else {})


def _words(lm: PreTrainedModel) -> Tensor:
    """Some thousand token embeddings (S, width), as the LLM reads them."""
    matrix_VX, scale = input_embeddings(lm)
    return some_words(matrix_VX) * scale
