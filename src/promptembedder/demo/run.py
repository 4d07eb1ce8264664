"""The demo on real text: train on BBC news with SmolLM2-135M, compare with the untrained LLM, report.

Shapes: N texts, E embedding width.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from promptembedder import atomic
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.demo import household
from promptembedder.demo.corpus import ARTICLE, HEADLINE, SEED, TOPIC, Article, read_articles, split, write_rows
from promptembedder.demo.picture import draw
from promptembedder.demo.report import next_steps, report, table
from promptembedder.demo.scores import embed_articles, score, v_measure
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.locate import locate
from promptembedder.model.encode import encode
from promptembedder.model.folder import describe, shipped_names
from promptembedder.model.settings import ModelConfig
from promptembedder.model.store import load
from promptembedder.progress import say
from promptembedder.training.settings import EvaluationConfig, RunConfig, TrainingConfig
from promptembedder.training.train import train

_SHIPPED = "smollm2-135m"
# A file that marks a demo's folder; another folder may hold files of the same names.
_MARK = ".promptembedder-demo"


def run_demo(
    output: Path,
    *,
    steps: int = 20,
    llm: str = "smollm2-135m-instruct",
    articles: tuple[list[Article], list[Article]] | None = None,
    shipped: str | Path | None = _SHIPPED,
) -> str:
    """Train, compare, and write `report.md`, `results.json`, `picture.png` and `model/` into a folder.

    Args:
        output: the folder; files of an earlier demo are replaced.
        steps: optimizer steps.
        llm: prompter and backbone.
        articles: training and test articles; unset: BBC news.
        shipped: a trained model to compare with; ignored if it is missing or has another backbone.

    Returns:
        The report's table and the two commands to try next, as text.

    Raises:
        PromptEmbedderError: the corpus or the LLM is not installed, the folder cannot be written.
    """
    started = time.monotonic()
    train_articles, test_articles = articles or split(read_articles())
    locate(llm)  # before anything is removed
    _clear(output)
    write_rows(output / "data", train_articles)
    say(f"{len(train_articles)} articles to train on, {len(test_articles)} to test on")
    result = train(_config(output, steps, llm))
    result.folder.rename(output / "model")
    say("comparing with the untrained LLM and the shipped model on the test articles")
    model, other = result.model, _comparable(shipped, output / "model", result.model.max_seq_length)
    embedded = embed_articles(model, other, test_articles)
    results = score(embedded, test_articles)
    regrouped = None
    if other is not None:
        regrouped = encode(other, household.TEXTS, [household.BY_ACTION, household.BY_ROOM])
        results["regrouped"] = _regrouped_scores(regrouped)
    topics = [a.topic for a in test_articles]
    draw(output / "picture.png", embedded["trained"], topics, _losses(result.history), regrouped)
    results["seconds"] = round(time.monotonic() - started, 1)
    results["peak_memory_gib"] = round(_peak_memory_gib(), 2)
    atomic.write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    atomic.write_text(output / "sample.txt", "".join(f"{a.headline}\n" for a in test_articles[:20]))
    written = report(results, model, result.steps, len(train_articles), len(test_articles))
    atomic.write_text(output / "report.md", written)
    return f"{table(results)}\n\n{next_steps(output)}"


def _losses(history: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Optimizer steps and their loss, by the instruction of the step's queries."""
    losses: dict[str, list[tuple[int, float]]] = {HEADLINE: [], TOPIC: []}
    for line in history:
        if "loss" in line:
            (instruction,) = losses.keys() & line["instructions"]
            losses[instruction].append((line["step"], line["loss"]))
    return {instruction: points for instruction, points in losses.items() if points}


def _comparable(shipped: str | Path | None, trained: Path, max_text_tokens: int) -> SentenceTransformer | None:
    """The shipped model with the trained one's text limit; None if it is missing or has another backbone."""
    if shipped is None or (isinstance(shipped, str) and shipped not in shipped_names()):
        return None
    if describe(shipped)["backbone"] != describe(trained)["backbone"]:
        return None
    model = load(shipped)
    model.max_seq_length = max_text_tokens
    return model


def _regrouped_scores(regrouped_2NE: NDArray[np.float32]) -> dict[str, dict[str, float]]:
    """V-measure against actions and against rooms, by instruction."""
    return {
        instruction: {
            "action": round(v_measure(embeddings_NE, household.ACTION_OF), 4),
            "room": round(v_measure(embeddings_NE, household.ROOM_OF), 4),
        }
        for instruction, embeddings_NE in zip((household.BY_ACTION, household.BY_ROOM), regrouped_2NE, strict=True)
    }


def _config(output: Path, steps: int, llm: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            prompter=llm,
            backbone=llm,
            max_text_tokens=48,
            default_instruction=HEADLINE,
            document_instruction=ARTICLE,
        ),
        data=DataConfig(
            root=str(output / "data"),
            files=(
                DataFile(path="headlines.jsonl", asymmetric=True, aspect="meaning"),
                DataFile(path="topics.jsonl", aspect="topic"),
            ),
        ),
        training=TrainingConfig(
            output=str(output / "training"),
            max_steps=steps,
            batch_size=24,
            seed=SEED,
            arguments={"logging_steps": 1},
        ),
        evaluation=EvaluationConfig(instruction=TOPIC, every_steps=max(1, steps)),
    )


def _clear(output: Path) -> None:
    """Make the folder and remove an earlier demo's files; refuse a folder with other files."""
    ours = {_MARK, "data", "training", "model", "results.json", "report.md", "picture.png", "sample.txt"}
    try:
        output.mkdir(parents=True, exist_ok=True)
        atomic.clear_abandoned(output)
        found = sorted(p.name for p in output.iterdir())
        foreign = [name for name in found if name not in ours] or (found if _MARK not in found else [])
        if foreign:
            raise PromptEmbedderError(f"{output} holds {foreign[0]!r}, which no demo wrote; choose another folder")
        for left in output.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (output / _MARK).touch()
    except OSError as error:
        raise PromptEmbedderError(f"output folder {output} cannot be written: {error.strerror or error}") from error


def _peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)
