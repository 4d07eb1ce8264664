"""The result of a transfer, and its report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sentence_transformers import SentenceTransformer

from promptembedder import atomic
from promptembedder.model.module import soft_prompt_module
from promptembedder.training.curves import Curve, draw_curves
from promptembedder.transfer.closed_forms import Start


@dataclass(frozen=True)
class Stage:
    """One stage of a transfer.

    No figure includes the time to score closed forms or dev pairs.

    Attributes:
        name: `closed_form` (`random` where there is none), `alignment_unlabelled` or `alignment_labelled`.
        dev: Spearman x 100 on dev pairs after the stage; None without dev pairs.
        seconds: wall time of the fit or of the optimizer steps; on plain texts also of the old model's encoding.
        examples: rows or texts that it was trained on, repetitions counted.
        steps: optimizer steps.
        curve: (examples, seconds, dev) during the stage; both counts start with the transfer.
        kept: False if the dev score fell, so that the weights before the stage were kept.
    """

    name: str
    dev: float | None
    seconds: float
    examples: int
    steps: int = 0
    curve: Curve = field(default_factory=list)
    kept: bool = True


@dataclass(frozen=True)
class TransferResult:
    """The result of a transfer.

    Attributes:
        model: the model on the new backbone.
        folder: folder of the saved model.
        stages: in the order in which they ran.
        starts: the closed-form alignments tried, best first; the random one if there are none.
        scores: `dev` and `test` at the end, Spearman x 100, if the files are given.
    """

    model: SentenceTransformer
    folder: Path
    stages: tuple[Stage, ...]
    starts: tuple[Start, ...]
    scores: dict[str, float]

    @property
    def centred(self) -> bool:
        """Whether the new model subtracts a mean from its embeddings."""
        return soft_prompt_module(self.model).centred


def write_report(result: TransferResult, folder: Path, backbone: str) -> None:
    """Write `results.json`, `report.md` and, if there is a curve, `picture.png`."""
    start = result.stages[0]
    before: Curve = [] if start.dev is None else [(0, start.seconds, start.dev)]
    curves: dict[str, Curve] = {}
    for stage in result.stages:
        if stage.curve:
            curves[stage.name] = [*before, *stage.curve]
            before = stage.curve[-1:]
    starts = [
        {
            "name": s.name,
            "reconstruction": _rounded(s.reconstruction),
            "dev": _rounded(s.dev),
        }
        for s in result.starts
    ]
    stages = [
        {**asdict(stage), "dev": _rounded(stage.dev), "seconds": round(stage.seconds, 1)} for stage in result.stages
    ]
    figures = {
        "backbone": backbone,
        "starts": starts,
        "stages": stages,
        "centred": result.centred,
        "scores": {k: _rounded(v) for k, v in result.scores.items()},
    }
    lines = [
        f"# Transfer to {backbone}",
        "",
        *(["Embeddings are centred on some of the texts or rows.", ""] if result.centred else []),
        "| closed-form start | mean cosine on held-back tokens | dev |",
        "| --- | ---: | ---: |",
        *(f"| {start.name} | {_shown(start.reconstruction)} | {_shown(start.dev)} |" for start in result.starts),
        "",
        "| stage | dev | seconds | examples |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {s.name}{'' if s.kept else ', not kept'} | {_shown(_rounded(s.dev))} | {s.seconds:.1f} | {s.examples} |"
            for s in result.stages
        ),
        "",
        *(f"{name}: {score:.2f}  " for name, score in result.scores.items()),
    ]
    with atomic.filling(folder) as scratch:
        if curves:
            draw_curves(curves, scratch / "picture.png")
        if (scratch / "picture.png").is_file():
            lines += ["", "![dev against examples and time](picture.png)"]
        (scratch / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (scratch / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
