"""The demo's picture: the same texts under two instructions, twice, and the training loss per instruction.

Shapes: N texts, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from promptembedder.demo import household
from promptembedder.demo.corpus import ARTICLE, SEED, TOPIC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP"


def draw(
    path: Path,
    articles: Mapping[str, NDArray[np.float32]],
    topics: Sequence[str],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    regrouped: NDArray[np.float32] | None,
) -> None:
    """Write the picture.

    Args:
        path: PNG file.
        articles: (N, E) of test articles, "articles" under the search instruction, "topics" under the topic one.
        topics: of the N articles.
        losses: instruction: optimizer steps and their loss.
        regrouped: (2, N, E) of the made-up requests, by action and by room; None: not drawn.
    """
    from matplotlib.figure import Figure

    rows = 1 if regrouped is None else 2
    figure = Figure(figsize=(15, 5 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False)
    colours = {topic: f"C{n}" for n, topic in enumerate(sorted(set(topics)))}
    for axes, name, title in ((panels[0, 0], "articles", ARTICLE), (panels[0, 1], "topics", _first_words(TOPIC))):
        _scatter(axes, articles[name], title, [colours[topic] for topic in topics], ["o"] * len(topics))
    _legend(panels[0, 1], {topic: (colour, "o") for topic, colour in colours.items()})
    _losses(panels[0, 2], losses)
    if regrouped is not None:
        colours = {action: f"C{n}" for n, action in enumerate(household.REQUESTS)}
        markers = dict(zip(household.ROOMS, _MARKERS, strict=True))
        shown = [colours[a] for a in household.ACTION_OF], [markers[r] for r in household.ROOM_OF]
        for axes, points_NE, title in zip(panels[1], regrouped, (household.BY_ACTION, household.BY_ROOM), strict=False):
            _scatter(axes, points_NE, title, *shown, size=60)
        panels[1, 2].axis("off")
        actions = {action: (colour, "o") for action, colour in colours.items()}
        _legend(panels[1, 2], actions | {room: ("0.4", marker) for room, marker in markers.items()}, loc="center left")
        panels[1, 2].set_title(
            "The same 24 requests, by the shipped model.\nColour: what is to be done. Shape: room.", fontsize=9
        )
    figure.savefig(path, dpi=120)


def _scatter(
    axes: Axes,
    embeddings_NE: NDArray[np.float32],
    title: str,
    colours: Sequence[str],
    markers: Sequence[str],
    size: float = 14,
) -> None:
    from sklearn.manifold import TSNE

    perplexity = min(30, len(embeddings_NE) / 4)
    points_N2 = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=SEED).fit_transform(embeddings_NE)
    for marker in sorted(set(markers)):
        picked = [n for n, other in enumerate(markers) if other == marker]
        x, y = points_N2[picked].T
        axes.scatter(x, y, s=size, c=[colours[n] for n in picked], marker=marker)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"“{title}”", fontsize=9)


def _legend(axes: Axes, entries: Mapping[str, tuple[str, str]], loc: str = "best") -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, (colour, marker) in entries.items()
    ]
    axes.legend(handles=handles, loc=loc, fontsize=8)


def _losses(axes: Axes, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for instruction, line in losses.items():
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=_first_words(instruction))
    axes.set(title="Training", xlabel="optimizer step", ylabel="contrastive loss")
    axes.legend(fontsize=8)


def _first_words(instruction: str) -> str:
    return instruction.partition(":")[0].rstrip(".") + "."
