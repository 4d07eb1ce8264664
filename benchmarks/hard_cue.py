"""What a frozen LLM gives without training: read-outs and hard cues, Spearman x 100 on STSBenchmark dev.

PROMPTEMBEDDER_DATA=... python benchmarks/hard_cue.py --pairs 375
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
from scipy.stats import spearmanr

from promptembedder import ModelConfig, PromptEmbedderError, build
from promptembedder.data.scored_pairs import read_scored_pairs
from promptembedder.model import baselines
from promptembedder.training.evaluators import spread

TEMPLATES = (
    '{text} means in one word:"',
    '"{text}" means in one word:"',
    'This text: "{text}" means in one word:"',
    'This sentence : "{text}" means in one word:"',
    'This sentence : "{text}"\nThe meaning in one word:"',
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="smollm2-135m-instruct")
    parser.add_argument("--data", help="folder of the data files; default: $PROMPTEMBEDDER_DATA")
    parser.add_argument("--pairs", type=int, default=375, help="evenly spread over the dev file")
    arguments = parser.parse_args()
    try:
        first, second, scores = read_scored_pairs("sts/STSBenchmark.dev.jsonl.gz", arguments.data)
    except PromptEmbedderError as error:
        sys.exit(f"hard_cue: {error}")
    picked = spread(len(scores), arguments.pairs)
    texts = [side[n] for side in (first, second) for n in picked]
    gold = [scores[n] for n in picked]

    def figure(embeddings_NE: np.ndarray) -> float:
        similarity = (embeddings_NE[: len(picked)] * embeddings_NE[len(picked) :]).sum(-1)
        return round(100 * float(spearmanr(similarity, gold)[0]), 1)

    results = {}
    module = build(ModelConfig(prompter=arguments.llm, backbone=arguments.llm))[0]
    results["mean of last hidden states"] = figure(baselines.mean_pooling(module, texts))
    for template in TEMPLATES:
        results[template] = figure(baselines.hard_cue(module, texts, template))
        print(results, file=sys.stderr)
    print(json.dumps({"llm": arguments.llm, "pairs": arguments.pairs, "spearman": results}))


if __name__ == "__main__":
    main()
