"""How many unseen instructions the prompter reads right after the warm start of `general.yaml`, before any training.

    PROMPTEMBEDDER_DATA=... python benchmarks/warm_start.py --seed 14

Made-up instructions in phrasings that no warm start has, 40 each; all but the last name an aspect to ignore, too.
Right: the aspect is the first soft token's likeliest word. The last line is one JSON object: phrasing to share x 100.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import torch

from kept_results import parsed, parser_of
from promptembedder.data.aspects import ASPECTS, THINGS
from promptembedder.data.rows import load_training_data
from promptembedder.model.build import build
from promptembedder.model.module import SoftPromptTransformer, soft_prompt_module
from promptembedder.training.settings import load_run
from promptembedder.training.train import aspects_of
from promptembedder.training.warm_start import warm_start
from quality import RECIPES

PHRASINGS = (
    "Retrieve {thing}s that ask for the same {aspect}, whatever {other} they belong to.",
    "Retrieve {thing}s that belong to the same {aspect}, whatever {other} they ask for.",
    "Put together {thing}s with one {aspect}, although their {other} differs.",
    "Sort the {thing}s by the {aspect} that they show.",
)
EACH = 40


def read_right(module: SoftPromptTransformer, phrasing: str, drawn: random.Random) -> float:
    """Share x 100 of a phrasing's instructions whose aspect is the first word written."""
    right = 0
    for _ in range(EACH):
        aspect, other = drawn.sample(ASPECTS, 2)
        with torch.no_grad():
            written = module.soft_tokens(phrasing.format(thing=drawn.choice(THINGS), aspect=aspect, other=other))
        (word,) = module.prompter.tokenizer.encode(f" {aspect}", add_special_tokens=False)
        right += int(written.weights_NKV[0, 0].argmax()) == word
    return 100 * right / EACH


def main() -> None:
    parser = parser_of(__doc__, "runs/warm-start")
    parser.add_argument("--seed", type=int, default=14)
    parser.add_argument("--steps", type=int, help="at most; unset: the recipe's")
    arguments = parsed(parser)
    config = load_run(RECIPES / "general.yaml", [], root=str(arguments.data))
    settings = config.training.warm_start
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    module = soft_prompt_module(build(config.model, seed=arguments.seed))
    data = load_training_data(config.data, config.model.document_instruction, arguments.seed)
    warm_start(module, aspects_of(config, module, data), settings, arguments.seed)
    drawn = random.Random(5)
    print(json.dumps({phrasing: round(read_right(module, phrasing, drawn), 1) for phrasing in PHRASINGS}))


if __name__ == "__main__":
    main()
