"""Export a model under some instructions: compile, write, compare with the model, all or nothing."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import DOCUMENT, Compiled, compile_model
from promptembedder.export.export_folder import (
    FACTS_FILE,
    damaged_is_one_line,
    errors_as_one_line,
    facts_on_disk,
    files_of,
    held_head,
    link_files,
    note_fold,
    of_an_export,
    read_facts,
    refuse_changed,
    refuse_foreign,
    refuse_overwriting,
    write_head,
)
from promptembedder.export.fold import Fold, ScoredPairs, fold
from promptembedder.export.parity import Parity, compare, running_precision
from promptembedder.model.known import KnownInstructions
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.named import check_named, check_words
from promptembedder.model.prompter import trained_state
from promptembedder.progress import say

NOTICE_FILE = "NOTICE-promptembedder.txt"
# Modules by name of their format, opened when needed: some need an extra.
FORMATS = {
    "soft-prompt": "soft_prompt",
    "sentence-transformers": "plain_folder",
    "gguf": "gguf_file",
    "onnx": "onnx_graph",
}
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")


@dataclass(frozen=True)
class FoldData:
    """What a deep model is folded on.

    Attributes:
        texts: plain texts of the kind to be embedded, 100 at least.
        rows: soft tokens of the fold; unset: the count that measures best.
        dev: first sentences, second sentences and scores of pairs, to report by.
    """

    texts: Sequence[str]
    rows: int | None = None
    dev: ScoredPairs | None = None


@dataclass(frozen=True)
class Exported:
    """What an export holds.

    Attributes:
        folder: where it is.
        digests: of each instruction's embeddings, by its name.
        parity: how it compares with the model.
        facts: content of `promptembedder_export.json`.
        compiled: what was written, after a fold.
    """

    folder: Path
    digests: dict[str, str]
    parity: Parity
    facts: dict[str, Any] = field(repr=False)
    compiled: Compiled = field(repr=False)


def format_module(name: str) -> Any:
    """The module of a format: `write`, `reader`, `refuse`, and where it needs them `add` and `check_backbone`.

    Raises:
        PromptEmbedderError: there is no such format.
    """
    if name not in FORMATS:
        raise PromptEmbedderError(f"format {name!r} is unknown, expected one of: {', '.join(FORMATS)}")
    return import_module(f"promptembedder.export.{FORMATS[name]}")


def export(
    model: SentenceTransformer,
    instructions: Mapping[str, str],
    folder: str | Path,
    *,
    to: str,
    name: str = "",
    precision: str | None = None,
    folding: FoldData | None = None,
) -> Exported:
    """Write a model, under some instructions, in the format of another engine; nothing is left where that fails.

    Args:
        model: made by `build` or `load`.
        instructions: by name; the model's document instruction is added as `document`.
        folder: where to write; an older export there is replaced.
        to: format, of `FORMATS`.
        name: of the model, noted in the export.
        precision: of the weights; unset: the format's own.
        folding: makes soft tokens of a deep soft prompt, for formats that cannot hold it.

    Raises:
        PromptEmbedderError: an unknown format, names or instructions that cannot be used, a model that the format
            cannot hold, a folder that holds something else, embeddings that differ from the model's.
    """
    form, target = format_module(to), Path(folder)
    check_named(instructions)
    refuse_foreign(target)
    before = facts_on_disk(target)
    options = _options(form, to, precision)
    compiled = compile_model(model, instructions)
    check_words({name: prompt.instruction for name, prompt in compiled.prompts.items()})  # the document's, too
    headless = folding is not None and _lacks_head(form, compiled)
    _check_foldable(compiled, form, to, folding)
    form.refuse(_as_folded(compiled, headless))  # now: a fold takes minutes, and changes nothing about the rest
    if hasattr(form, "check_backbone"):
        form.check_backbone(compiled, model)
    folded = None
    if folding is not None:
        folded = fold(model, compiled, folding.texts, rows=folding.rows, dev=folding.dev, headless=headless)
        compiled = folded.compiled
    form.refuse(compiled)
    say(f"writing {to} of {len(compiled.prompts)} instructions: {', '.join(compiled.prompts)}")
    with errors_as_one_line(target), atomic.replacing_folder(target, of_an_export(target)) as scratch:
        form.write(compiled, model, scratch, **options)
        if folded is not None:
            note_fold(scratch, folded.facts)
        if folded is not None and hasattr(form, "add"):
            write_head(scratch, compiled.head_ED)
        _copy_licence(model, compiled, scratch)
        runs_in = str(precision or getattr(form, "PRECISION", running_precision(model)))
        parity = _compared(form, compiled, model, list(compiled.prompts), scratch, runs_in)
        facts = _facts(compiled, model, to, name, runs_in, parity, folded) | {"files": files_of(scratch)}
        atomic.write_json(scratch / FACTS_FILE, facts)
        refuse_changed(target, before)
        refuse_overwriting(scratch, target)
    return Exported(target, _digests(facts), parity, facts, compiled)


def add(
    model: SentenceTransformer,
    instructions: Mapping[str, str],
    folder: str | Path,
    *,
    folding: FoldData | None = None,
) -> Exported:
    """Put further instructions into an export; it is left as it was where that fails.

    Args:
        model: that the export was made from.
        instructions: by name.
        folder: of the export.
        folding: texts, for an export that was folded.

    Raises:
        PromptEmbedderError: as in `export`; no export, of another model, that has the instruction already, or in a
            format that takes no more.
    """
    target = Path(folder)
    before, facts = facts_on_disk(target), read_facts(target)
    form = format_module(str(facts["format"]))
    if not hasattr(form, "add"):
        raise PromptEmbedderError(f"format {facts['format']} takes no further instructions; export all of them again")
    check_named(instructions)
    held = {entry["name"]: entry["instruction"] for entry in facts["instructions"]}
    for name, text in instructions.items():
        if name in held or text in held.values():
            raise PromptEmbedderError(f"{target} holds instruction {name!r} already; it holds {', '.join(held)}")
    check_words({**held, **instructions})
    if facts["source"] != source_digest(model):
        raise PromptEmbedderError(f"{target} was made from another model than this; export all instructions again")
    compiled = compile_model(model, instructions)
    if facts["fold"] is not None:
        if folding is None:
            raise PromptEmbedderError(f"{target} holds a fold: adding to it needs --texts FILE")
        if folding.rows not in (None, facts["fold"]["rows"]):
            raise PromptEmbedderError(f"{target} holds a fold of {facts['fold']['rows']} rows, found {folding.rows}")
        new = compiled.with_prompts({name: compiled.prompts[name] for name in instructions})
        with errors_as_one_line(target), damaged_is_one_line(target):
            head_ED = held_head(target)
        folded = fold(
            model,
            new,
            folding.texts,
            rows=facts["fold"]["rows"],
            dev=folding.dev,
            headless=facts["fold"].get("headless", False),
            head_ED=compiled.head_ED if head_ED is None else head_ED,
        )
        facts["fold"]["kept"] |= folded.facts["kept"]
        compiled = folded.compiled
    elif folding is not None:
        raise PromptEmbedderError(f"{target} holds no fold: leave --texts out")
    form.refuse(compiled)
    with errors_as_one_line(target), atomic.replacing_folder(target, of_an_export(target)) as scratch:
        link_files(target, scratch, facts["files"])
        with damaged_is_one_line(target):
            form.add(compiled, model, scratch)
        if facts["fold"] is not None:
            note_fold(scratch, {"headless": False} | facts["fold"])
        parity = _compared(form, compiled, model, list(instructions), scratch, facts["precision"])
        facts["instructions"] += [e for e in _instructions(compiled) if e["name"] != DOCUMENT]
        facts["parity"] = _parity_facts(parity)
        facts["files"] = files_of(scratch)
        atomic.write_json(scratch / FACTS_FILE, facts)
        refuse_changed(target, before)
        refuse_overwriting(scratch, target)
    return Exported(target, _digests(facts), parity, facts, compiled)


def source_digest(model: SentenceTransformer) -> str:
    """Identity of a model's weights and settings, 16 hex digits: exports of one model can be added to each other."""
    module = soft_prompt_module(model)
    known = isinstance(module.prompter, KnownInstructions)
    found = hashlib.sha256(f"{module.base_models.backbone_fingerprint} {module.settings}".encode())
    tensors = {} if known else trained_state(module.prompter)  # type: ignore[arg-type]
    tensors |= dict(module.alignment.state_dict()) | {"centre": module.centre_E}
    tensors |= {name: value for name, value in model.state_dict().items() if not name.startswith("0.")}
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _options(form: Any, to: str, precision: str | None) -> dict[str, Any]:
    if precision is None:
        return {}
    valid = getattr(form, "PRECISIONS", ())
    if precision not in valid or "precision" not in inspect.signature(form.write).parameters:
        expected = f"expected one of: {', '.join(valid)}" if valid else "it has none to choose from"
        raise PromptEmbedderError(f"precision {precision!r} of format {to}: {expected}")
    return {"precision": precision}


def _check_foldable(compiled: Compiled, form: Any, to: str, folding: FoldData | None) -> None:
    if folding is not None and compiled.layout == "prefix":
        raise PromptEmbedderError(
            "a fold is of layout suffix, and the model's is prefix: leave --texts out, and export to "
            "sentence-transformers, onnx or soft-prompt"
        )
    if folding is not None and not compiled.is_deep and not _lacks_head(form, compiled):
        raise PromptEmbedderError("the model has no deep soft prompt, so there is nothing to fold: leave --texts out")
    if folding is None and compiled.is_deep and not getattr(form, "HOLDS_DEEP", False):
        raise PromptEmbedderError(
            f"format {to} cannot hold a deep soft prompt: give --texts FILE to fold it, or export to "
            "soft-prompt or onnx"
        )


def _lacks_head(form: Any, compiled: Compiled) -> bool:
    """Whether a model has a linear head or a centre that a format cannot hold."""
    return not getattr(form, "HOLDS_HEAD", True) and (compiled.head_ED is not None or compiled.centre_D is not None)


def _as_folded(compiled: Compiled, headless: bool) -> Compiled:
    prompts = {name: replace(prompt, deep_JKD=None) for name, prompt in compiled.prompts.items()}
    folded = compiled.with_prompts(prompts)
    return replace(folded, centre_D=None, head_ED=None) if headless else folded


def _compared(
    form: Any, compiled: Compiled, model: SentenceTransformer, names: list[str], folder: Path, precision: str
) -> Parity:
    options = {"device": str(model.device)} if "device" in inspect.signature(form.reader).parameters else {}

    def open_reader(name: str) -> Callable[[Sequence[str]], Any]:
        reading: Callable[[Sequence[str]], Any] = form.reader(folder, name, **options)
        return reading

    say("comparing the export with the model")
    return compare(compiled, model, names, open_reader, precision)


def _copy_licence(model: SentenceTransformer, compiled: Compiled, folder: Path) -> None:
    lm: Any = soft_prompt_module(model).backbone.lm
    place = Path(str(getattr(lm.config, "_name_or_path", "")))
    copied = []
    if place.is_dir():
        for file in sorted({found for pattern in _LICENCES for found in place.glob(pattern) if found.is_file()}):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
                copied.append(file.name)
    licence = f"Its licence is in {', '.join(copied)}." if copied else "No licence file came with it: see its makers."
    revision = f", revision {compiled.backbone_revision}" if compiled.backbone_revision else ""
    (folder / NOTICE_FILE).write_text(
        f"Made by promptembedder {version('promptembedder')} from the Embedding LLM {compiled.backbone}{revision}.\n"
        f"{licence}\n"
        f"Changed: rows of soft tokens were added, {compiled.num_soft_tokens} for each of {len(compiled.prompts)} "
        "instructions or more.\nWeights of the LLM that are copied here keep their values, up to precision.\n",
        encoding="utf-8",
    )


def _facts(
    compiled: Compiled,
    model: SentenceTransformer,
    to: str,
    name: str,
    precision: str,
    parity: Parity,
    folded: Fold | None,
) -> dict[str, Any]:
    return {
        "format": to,
        "promptembedder": version("promptembedder"),
        "model": name,
        "source": source_digest(model),
        "instructions": _instructions(compiled),
        "soft_tokens": compiled.num_soft_tokens,
        "max_text_tokens": compiled.max_text_tokens,
        "backbone": {
            "name": compiled.backbone,
            "revision": compiled.backbone_revision,
            "fingerprint": compiled.backbone_fingerprint,
        },
        "precision": precision,
        "parity": _parity_facts(parity),
        "fold": None if folded is None else folded.facts,
    }


def _instructions(compiled: Compiled) -> list[dict[str, str]]:
    return [
        {"name": name, "instruction": prompt.instruction, "digest": compiled.digest(name)}
        for name, prompt in compiled.prompts.items()
    ]


def _digests(facts: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["digest"] for entry in facts["instructions"]}


def _parity_facts(parity: Parity) -> dict[str, Any]:
    if parity.smallest_cosine is None:
        return {"checked": False, "missing": parity.missing}
    return {
        "checked": True,
        "smallest_cosine": parity.smallest_cosine,
        "bound": parity.bound,
        "texts": parity.texts,
    }
