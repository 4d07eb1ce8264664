"""What a linear bridge keeps of retrieval: the index made by the old model, the queries by the new one.

    PROMPTEMBEDDER_DATA=... python benchmarks/bridge.py --old runs/mine/model --new runs/moved/model --tasks Cranfield

nDCG@10 x 100 by mteb: `old` and `new` (one model for queries and index), `bridged` (new queries through a bridge fitted
on the task's documents, read by both models under the query instruction, into the old index), `bridged_as_documents`
(the same, fitted under the document instruction, so that the old index itself is the target) and, where the widths are
equal, `unmapped` (no bridge). `kept` is `bridged` over `old`. The last line is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

import pictures
import promptembedder
from kept_results import command, parsed, parser_of, say
from promptembedder import atomic, evaluation
from promptembedder.bulk import bridge
from promptembedder.model.module import soft_prompt_module

Embed = Callable[[list[str]], NDArray[Any]]


class Reader:
    """A model's embeddings under a query and a document instruction; every text is read once."""

    def __init__(self, model: SentenceTransformer, instruction: str) -> None:
        self.model = model
        self.instructions = [instruction, soft_prompt_module(model).settings.document_instruction]
        self.known: dict[str, NDArray[Any]] = {}

    def queries(self, texts: list[str]) -> NDArray[Any]:
        return self._under(0, texts)

    def documents(self, texts: list[str]) -> NDArray[Any]:
        return self._under(1, texts)

    def _under(self, which: int, texts: list[str]) -> NDArray[Any]:
        if missing := [text for text in dict.fromkeys(texts) if text not in self.known]:
            embedded_INE = promptembedder.encode(self.model, missing, self.instructions, show_progress_bar=True)
            self.known |= dict(zip(missing, embedded_INE.swapaxes(0, 1), strict=True))
        return np.stack([self.known[text][which] for text in texts])


class Sides(AbsEncoder):  # type: ignore[misc]
    """Queries embedded one way, documents another; `seen` are the documents it was asked for."""

    def __init__(self, queries: Embed, documents: Embed) -> None:
        self.embed_queries, self.embed_documents = queries, documents
        self.seen: list[str] = []
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "bridge/sides", "revision": "1"})

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: PromptType | None = None, **kwargs: Any) -> Any:
        texts = [text if text.strip() else "." for batch in inputs for text in batch["text"]]  # as `evaluate` does
        if prompt_type == PromptType.document:
            self.seen += texts
            return self.embed_documents(texts)
        return self.embed_queries(texts)


def ndcg(encoder: Sides, task: Any) -> float:
    done = mteb.evaluate(encoder, [task], cache=None, co2_tracker=False)
    return round(100 * float(done.task_results[0].get_score()), 2)


def measure(
    task: Any, instruction: str, old_model: SentenceTransformer, new_model: SentenceTransformer
) -> dict[str, Any]:
    """The figures of one task."""
    old, new = Reader(old_model, instruction), Reader(new_model, instruction)
    plain = Sides(old.queries, old.documents)
    found: dict[str, Any] = {"old": ndcg(plain, task), "new": ndcg(Sides(new.queries, new.documents), task)}
    texts = list(dict.fromkeys(plain.seen))
    over = bridge.fit(new.queries(texts), old.queries(texts))
    as_documents = bridge.fit(new.documents(texts), old.documents(texts))
    found["bridged"] = ndcg(Sides(lambda queries: over(new.queries(queries)), old.documents), task)
    found["bridged_as_documents"] = ndcg(Sides(lambda queries: as_documents(new.queries(queries)), old.documents), task)
    if old_model.get_embedding_dimension() == new_model.get_embedding_dimension():
        found["unmapped"] = ndcg(Sides(new.queries, old.documents), task)
    found["kept"] = round(found["bridged"] / found["old"], 4)
    return found | {"bridge": over.facts}


def write_report(folder: Path, made_by: str, figures: dict[str, Any]) -> None:
    """Write `bridge.md`, `bridge.json` and `bridge.png`."""
    shown = ("old", "new", "bridged", "bridged_as_documents", "unmapped")
    present = [name for name in shown if any(name in found for found in figures.values())]
    lines = [f"| task | {' | '.join((*present, 'kept'))} |", "| --- |" + " ---: |" * (len(present) + 1)]
    lines += [
        f"| {task} | {' | '.join(str(found.get(name, '-')) for name in (*present, 'kept'))} |"
        for task, found in figures.items()
    ]
    series = {name: [found.get(name) for found in figures.values()] for name in present}
    pictures.bars(folder / "bridge.png", list(figures), series, "nDCG@10 x 100")
    table = "\n".join(lines)
    atomic.write_text(folder / "bridge.md", f"`{made_by}`\n\n{table}\n\n![nDCG@10 by task](bridge.png)\n")
    record = {"command": made_by, "figures": figures}
    atomic.write_text(folder / "bridge.json", json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = parser_of(__doc__, None)
    parser.add_argument("--old", required=True, help="the model that made the index")
    parser.add_argument("--new", required=True, help="the model that reads the queries")
    parser.add_argument("--tasks", nargs="+", default=["Cranfield"], help="retrieval tasks of the data folder")
    arguments = parsed(parser)
    given = evaluation.read_instructions(arguments.data / "instructions.json")
    old, new = promptembedder.load(arguments.old), promptembedder.load(arguments.new)
    figures: dict[str, Any] = {}
    for task in evaluation.local_tasks(arguments.data, arguments.tasks, instructions=given):
        name = task.metadata.name
        if task.metadata.type != "Retrieval":
            parser.error(f"{name} is no retrieval task")
        say(name)
        figures[name] = measure(task, given[name], old, new)
    if arguments.report:
        write_report(Path(arguments.report), command(), figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
