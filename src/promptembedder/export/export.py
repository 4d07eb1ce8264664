"""Export a model under some instructions: compile, write, compare with the model, all or nothing."""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError
from promptembedder.export.compiled import DOCUMENT, Compiled, compile_model
from promptembedder.export.fold import Fold, ScoredPairs, fold
from promptembedder.export.parity import Parity, compare, running_precision
from promptembedder.model.folder import read_json
from promptembedder.model.known import KnownInstructions
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.named import check_named, check_words
from promptembedder.model.prompter import trained_state
from promptembedder.progress import say
from promptembedder.text import is_unicode

FACTS_FILE = "promptembedder_export.json"
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
    _refuse_foreign(target)
    before = _facts_of(target)
    options = _options(form, to, precision)
    compiled = compile_model(model, instructions)
    check_words({name: prompt.instruction for name, prompt in compiled.prompts.items()})  # the document's, too
    headless = folding is not None and _lacks_head(form, compiled)
    form.refuse(_as_folded(compiled, headless))  # now: a fold takes minutes, and changes nothing about the rest
    if hasattr(form, "check_backbone"):
        form.check_backbone(compiled, model)
    _check_foldable(compiled, form, to, folding)
    folded = None
    if folding is not None:
        folded = fold(model, compiled, folding.texts, rows=folding.rows, dev=folding.dev, headless=headless)
        compiled = folded.compiled
    form.refuse(compiled)
    say(f"writing {to} of {len(compiled.prompts)} instructions: {', '.join(compiled.prompts)}")
    with _one_line(target), atomic.replacing_folder(target, _ours(target)) as scratch:
        form.write(compiled, model, scratch, **options)
        _copy_licence(model, compiled, scratch)
        runs_in = str(precision or getattr(form, "PRECISION", running_precision(model)))
        parity = _compared(form, compiled, model, list(compiled.prompts), scratch, runs_in)
        facts = _facts(compiled, model, to, name, runs_in, parity, folded) | {"files": _files(scratch)}
        atomic.write_json(scratch / FACTS_FILE, facts)
        _refuse_changed(target, before)
        _refuse_overwriting(scratch, target)
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
    before, facts = _facts_of(target), read_facts(target)
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
        folded = fold(
            model,
            new,
            folding.texts,
            rows=facts["fold"]["rows"],
            dev=folding.dev,
            headless=facts["fold"].get("headless", False),
        )
        facts["fold"]["kept"] |= folded.facts["kept"]
        compiled = folded.compiled
    elif folding is not None:
        raise PromptEmbedderError(f"{target} holds no fold: leave --texts out")
    form.refuse(compiled)
    with _one_line(target), atomic.replacing_folder(target, _ours(target)) as scratch:
        _link(target, scratch, facts["files"])
        with _damaged(target):
            form.add(compiled, model, scratch)
        parity = _compared(form, compiled, model, list(instructions), scratch, facts["precision"])
        facts["instructions"] += [e for e in _instructions(compiled) if e["name"] != DOCUMENT]
        facts["parity"] = _parity_facts(parity)
        facts["files"] = _files(scratch)
        atomic.write_json(scratch / FACTS_FILE, facts)
        _refuse_changed(target, before)
        _refuse_overwriting(scratch, target)
    return Exported(target, _digests(facts), parity, facts, compiled)


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What an export says of itself.

    Raises:
        PromptEmbedderError: there is no export, or its file is damaged.
    """
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        raise PromptEmbedderError(f"no export at {folder}: it has no {FACTS_FILE}")
    facts = read_json(path)
    needed = {"format", "model", "instructions", "source", "backbone", "precision", "fold", "files"}
    if not isinstance(facts, dict) or not needed <= facts.keys() or not _readable(facts):
        raise PromptEmbedderError(f"{path} is not what an export writes: expected {', '.join(sorted(needed))}")
    return facts


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
            f"format {to} cannot hold a deep soft prompt: give --texts FILE to fold it into soft tokens alone, or "
            "export to soft-prompt"
        )


def _lacks_head(form: Any, compiled: Compiled) -> bool:
    """Whether a model has a linear head or a centre that a format cannot hold."""
    return not getattr(form, "HOLDS_HEAD", True) and (compiled.head_ED is not None or compiled.centre_D is not None)


def _as_folded(compiled: Compiled, headless: bool) -> Compiled:
    prompts = {name: replace(prompt, deep_JKD=None) for name, prompt in compiled.prompts.items()}
    folded = compiled.with_prompts(prompts)
    return replace(folded, centre_D=None, head_ED=None) if headless else folded


def _refuse_foreign(target: Path) -> None:
    if not is_unicode(str(target)) or "\0" in str(target):
        raise PromptEmbedderError(f"output {str(target)!r} is not valid UTF-8 text; choose another folder")
    above = next((place for place in target.absolute().parents if place.exists()), None)
    if above is not None and not above.is_dir():
        raise PromptEmbedderError(f"output {target} lies below {above}, which is a file; choose another folder")
    with _one_line(target):  # now: a fold takes minutes
        if target.is_symlink() and os.path.realpath(target) == str(target.absolute()):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
        if target.exists() and target.samefile(os.curdir):
            raise OSError(errno.EBUSY, "it is the current folder; call this from another one", str(target))
        with tempfile.TemporaryFile(dir=above):
            pass
    if (target / FACTS_FILE).is_file():
        read_facts(target)
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PromptEmbedderError(f"{target} exists and is no export; choose another folder")


def _facts_of(target: Path) -> bytes | None:
    """What an export there says of itself, as it is on the disk; None where there is none."""
    with suppress(OSError):
        return (target / FACTS_FILE).read_bytes()
    return None


def _refuse_changed(target: Path, before: bytes | None) -> None:
    """Refuse to replace what another process has written there since this one began."""
    if _facts_of(target) != before:
        raise PromptEmbedderError(f"{target} has changed meanwhile; run the command again")


def _refuse_overwriting(scratch: Path, target: Path) -> None:
    """Refuse to replace files that no export has written."""
    ours = _ours(target)
    for new in sorted(scratch.rglob("*")):
        path = new.relative_to(scratch)
        there = target / path
        if os.path.lexists(there) and not ours(path) and not (new.is_dir() and there.is_dir()):
            raise PromptEmbedderError(
                f"{there} is no file of an export and would be replaced; move it, or choose another folder"
            )


@contextmanager
def _damaged(target: Path) -> Iterator[None]:
    """What files of an export that are not as it wrote them lead to, as one line."""
    try:
        yield
    except (PromptEmbedderError, OSError):
        raise
    except Exception as error:  # each format's library has its own
        reason = (str(error).splitlines() or [""])[0][:200]
        raise PromptEmbedderError(
            f"the export at {target} is damaged ({type(error).__name__}: {reason}); export all instructions again"
        ) from error


def _ours(target: Path) -> Callable[[Path], bool]:
    """What an earlier export wrote there, and may be replaced: whatever else is in the folder stays."""
    if not (target / FACTS_FILE).is_file():
        return lambda path: False
    written = {Path(file) for file in [*read_facts(target)["files"], FACTS_FILE]}
    folders = {above for file in written for above in file.parents}
    return lambda path: path in written or path in folders


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _readable(facts: dict[str, Any]) -> bool:
    """Whether facts have the types that are read here."""
    entries, backbone = facts["instructions"], facts["backbone"]
    return (
        all(isinstance(facts[name], str) for name in ("format", "model", "source", "precision"))
        and isinstance(backbone, dict)
        and isinstance(backbone.get("name"), str)
        and isinstance(facts["files"], list)
        and all(isinstance(file, str) and _is_inside(file) for file in facts["files"])
        and isinstance(entries, list)
        and all(isinstance(e, dict) for e in entries)
        and all(isinstance(e.get(key), str) for e in entries for key in ("name", "instruction", "digest"))
    )


def _is_inside(file: str) -> bool:
    """Whether a path leads nowhere but into the folder that it is relative to."""
    return not Path(file).is_absolute() and ".." not in Path(file).parts


@contextmanager
def _one_line(target: Path) -> Iterator[None]:
    """What a full disk or a closed folder says, as one line that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the second where weights do not fit on the disk
        reason = getattr(error, "strerror", None) or error
        raise PromptEmbedderError(f"cannot write an export to {target}: {reason}") from error


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


def _link(source: Path, scratch: Path, files: Sequence[str]) -> None:
    """Files of a folder in another one, by links where the disk has them: weights are not written again."""
    for file in files:
        if not (source / file).is_file():
            raise PromptEmbedderError(f"{source} lacks its file {file}; export all instructions again")
        (scratch / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / file, scratch / file)
        except OSError:
            shutil.copyfile(source / file, scratch / file)
