"""The demo's report, table and next steps, as text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from promptembedder.demo import household
from promptembedder.demo.corpus import ARTICLE, HEADLINE, TOPIC
from promptembedder.demo.scores import FIGURES, METHODS
from promptembedder.model.explain import explain
from promptembedder.model.module import soft_prompt_module


def report(results: dict[str, Any], model: SentenceTransformer, steps: int, n_train: int, n_test: int) -> str:
    """The whole report, as Markdown.

    Args:
        results: what `results.json` holds.
        model: the demo's trained model.
        steps: optimizer steps taken.
        n_train: training articles.
        n_test: test articles.
    """
    module = soft_prompt_module(model)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    lines = [
        "# Demo: BBC news under two instructions",
        "",
        table(results),
        "",
        f"{n_train} articles to train on, {n_test} others to test on. "
        f"Texts are truncated to {module.settings.max_text_tokens} tokens.",
        f"{steps} optimizer steps, {trainable:,} trained parameters; the LLM's own weights are unchanged.",
        f"{results['seconds']} s in total, {results['peak_memory_gib']} GiB of memory at most.",
        "",
        "![The same texts under two instructions, and the training loss](picture.png)",
        "",
        *_regrouped(results.get("regrouped")),
        "## What the Prompting LLM wrote",
        "",
        "| instruction | soft tokens, each by its heaviest word |",
        "| --- | --- |",
    ]
    for instruction in (HEADLINE, ARTICLE, TOPIC):
        words = " ".join(f"`{r.words[0][0].strip() or ' '}` ({r.words[0][1]:.2f})" for r in explain(model, instruction))
        lines.append(f"| {instruction} | {words} |")
    return "\n".join(lines) + "\n"


def table(results: dict[str, Any]) -> str:
    """The figures of every method, as a Markdown table."""
    methods = [method for method in METHODS if method in results["ndcg_at_10"]]
    lines = ["| | " + " | ".join(METHODS[m] for m in methods) + " |", "| --- |" + " ---: |" * len(methods)]
    for key, title in FIGURES.items():
        lines.append(f"| {title} | " + " | ".join(f"{results[key][m]:.3f}" for m in methods) + " |")
    return "\n".join(lines)


def next_steps(output: Path) -> str:
    """Two commands to try on the demo's model."""
    command = Path(sys.argv[0]).absolute()
    program = str(command.relative_to(Path.cwd())) if command.is_relative_to(Path.cwd()) else command.name
    return (
        f"Report, picture and model are in {output}. Two commands to try next:\n\n"
        f'  {program} encode {output}/model {output}/sample.txt -o vectors.npy -i "{HEADLINE}"\n'
        f'  {program} explain {output}/model "Given a news article, find articles about the same person."'
    )


def _regrouped(regrouped: dict[str, dict[str, float]] | None) -> list[str]:
    if regrouped is None:
        return []
    return [
        "## What an instruction changes",
        "",
        f"The shipped model embeds {len(household.TEXTS)} made-up requests to a house, such as "
        f"“{household.TEXTS[0]}”, under two instructions.",
        "The table shows the V-measure of k-means clusters against what is to be done and against the room.",
        "",
        "| instruction | what is to be done | room |",
        "| --- | ---: | ---: |",
        *(f"| {instruction} | {by['action']:.2f} | {by['room']:.2f} |" for instruction, by in regrouped.items()),
        "",
    ]
