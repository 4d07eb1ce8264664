"""What mteb sees of a model: our models under a task's instruction, any sentence-transformers model, bare LLMs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from promptembedder import atomic
from promptembedder.errors import PromptEmbedderError
from promptembedder.evaluation.tasks import LOCAL
from promptembedder.llms.device import check_device
from promptembedder.llms.locate import CARRIED_MODELS, locate
from promptembedder.llms.quiet import quiet_transformers
from promptembedder.model import folder as shipped
from promptembedder.model.baselines import PROMPT_EOL
from promptembedder.model.folder import CONFIG_FILE, may_be_hub_id, saved_model
from promptembedder.model.instructions import instruction_for
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.model.store import load
from promptembedder.paths import expanded
from promptembedder.text import checked_texts, fill_blanks
from promptembedder.training.curves import read_facts

_BLOCK = 2**24
# An LLM without training: pooling, and what its text is wrapped in; `{instruction}` makes it read the task's.
BASELINES: dict[str, tuple[str, str]] = {
    "mean": ("mean", "{text}"),
    "last": ("lasttoken", "{text}"),
    "prompt_eol": ("lasttoken", PROMPT_EOL),
    "hard_instruction": ("lasttoken", "Instruct: {instruction}\n" + PROMPT_EOL),
}
# Kinds of tasks whose documents are not queries.
_WITH_DOCUMENTS = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")


class InstructedEncoder(AbsEncoder):  # type: ignore[misc]
    """A `SentenceTransformer` for mteb; instructions go where the model takes them.

    Args:
        model: any model.
        name: for the results folder, `owner/name`.
        revision: of its weights.
        wrap: makes the text that is embedded of text and instruction; unset: models of ours read the instruction as a
            prompt, others read the bare text.
        document_instruction: what `wrap` gets for documents.
        instructed: whether `wrap` uses the instruction.
        training: facts of the training to keep with the results, see `promptembedder.training_facts`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        name: str,
        revision: str,
        wrap: Callable[[str, str], str] | None = None,
        document_instruction: str = "",
        instructed: bool = True,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.training = training
        self._wrap = wrap
        self._instructed = instructed
        self._document_instruction = document_instruction
        self._ours = isinstance(model[0], SoftPromptTransformer)
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name,
                "revision": revision,
                "embed_dim": model.get_embedding_dimension(),
                "max_tokens": model.max_seq_length,
                "framework": ["Sentence Transformers", "PyTorch"],
                "use_instructions": self.reads_instructions,
            }
        )

    @property
    def reads_instructions(self) -> bool:
        """Whether instructions reach the model."""
        return self._ours or (self._wrap is not None and self._instructed)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: PromptType | None = None, **kwargs: Any) -> Any:
        """Embed the texts of a task: its instruction for queries and symmetric tasks, the document's for documents."""
        texts = [text for batch in inputs for text in batch["text"]]
        texts = fill_blanks(texts, task_metadata.name)
        if prompt_type == PromptType.document and task_metadata.type in _WITH_DOCUMENTS:
            return self._embed(texts, None, document=True, **kwargs)
        return self._embed(texts, self._instruction(task_metadata), document=False, **kwargs)

    def encode_under(self, texts: Iterable[str], instruction: str, **kwargs: Any) -> Any:
        """Embed texts, any iterable of them, under an instruction."""
        return self._embed(fill_blanks(checked_texts(texts)), instruction, document=False, **kwargs)

    def made_with(self, metadata: Any) -> dict[str, Any]:
        """What else than model and rows decides the scores of a task."""
        read = self._instruction_read
        reads = self.reads_instructions
        return {
            "instruction": read(self._instruction(metadata), document=False) if reads else None,
            "document_instruction": read(None, document=True) if reads else None,
            "max_tokens": self.model.max_seq_length,
        }

    def _instruction(self, metadata: Any) -> str | None:
        """The task's, for queries and symmetric tasks; tasks of mteb without one have their type's."""
        prompt = metadata.prompt
        given: str | None = prompt.get("query") if isinstance(prompt, dict) else prompt
        if given or metadata.dataset["path"].startswith(LOCAL):
            return given
        return str(self.get_instruction(metadata, PromptType.query))

    def _instruction_read(self, instruction: str | None, *, document: bool) -> str:
        """The instruction, or what the model reads without one."""
        if self._ours:
            return instruction_for(self.model, instruction, document=document)
        return instruction or (self._document_instruction if document else "")

    def _embed(self, texts: list[str], instruction: str | None, *, document: bool, **kwargs: Any) -> Any:
        options: dict[str, Any] = {"batch_size": kwargs.get("batch_size", 32), "show_progress_bar": False}
        instruction_read = self._instruction_read(instruction, document=document)
        if self._ours:
            options["prompt"] = instruction_read
        elif self._wrap is not None:
            texts = [self._wrap(text, instruction_read) for text in texts]
        embeddings = self.model.encode(texts, **options)
        if not np.isfinite(embeddings).all():
            raise PromptEmbedderError(f"{self.mteb_model_meta.name} gives embeddings that are not finite numbers")
        return embeddings


def plain_reader(folder: str, dtype: torch.dtype) -> Transformer:
    """An LLM as a module that reads texts as they are; by itself the library puts them into a chat turn."""
    lm = Transformer(
        folder,
        model_kwargs={"dtype": dtype},
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    if lm.tokenizer.pad_token is None:
        lm.tokenizer.pad_token = lm.tokenizer.eos_token
    return lm


def open_model(model: str, *, baseline: str | None = None, device: str | None = None) -> InstructedEncoder:
    """Open what is to be evaluated.

    Args:
        model: folder of a model of ours; a sentence-transformers folder or hub id; with `baseline` an LLM.
        baseline: one of `BASELINES`.
        device: unset: the accelerator, if there is one.

    Raises:
        PromptEmbedderError: the model cannot be opened, the baseline is unknown.
    """
    check_device(device)
    model = str(expanded(model)) if model.startswith("~") else model
    if baseline is not None:
        if baseline not in BASELINES:
            raise PromptEmbedderError(f"unknown baseline {baseline!r}; valid: {', '.join(BASELINES)}")
        pooling, template = BASELINES[baseline]
        located = locate(model)
        with quiet_transformers():
            lm = plain_reader(str(located.folder), torch.float32)
        lm.tokenizer.padding_side = "right"
        width = lm.get_embedding_dimension()
        built = SentenceTransformer(modules=[lm, Pooling(width, pooling_mode=pooling), Normalize()], device=device)
        return InstructedEncoder(
            built,
            f"baseline/{Path(model).name}-{baseline}",
            _content(located.folder, template),
            _filled(template),
            instructed="{instruction}" in template,
        )
    folder = shipped.shipped_folder(model)
    fetched = saved_model(model) if may_be_hub_id(model) else None
    if fetched is not None:
        return InstructedEncoder(load(fetched, device=device), model, _content(fetched), training=read_facts(fetched))
    if (folder / CONFIG_FILE).is_file():
        opened = load(folder, device=device)
        # `train` saves every model as `<run>/model`: the run's name tells more.
        place = folder.resolve()
        name = f"promptembedder/{place.parent.name if place.name == 'model' and place.parent.name else place.name}"
        revision = _content(folder)
        return InstructedEncoder(opened, name, revision, training=read_facts(folder))
    if model in CARRIED_MODELS:
        raise PromptEmbedderError(f"{model} is an untrained LLM; add --baseline, one of {', '.join(BASELINES)}")
    if not folder.exists() and not may_be_hub_id(model):
        raise PromptEmbedderError(
            f"no model at {model}: give a folder or a hub id such as owner/name{shipped.shipped_hint()}"
        )
    # An LLM, and a model of another library, have one of these.
    others = any((folder / name).is_file() for name in ("modules.json", "config.json"))
    if folder.exists() and not others and (wrong := shipped.not_a_model(folder)) is not None:
        raise PromptEmbedderError(wrong)
    try:
        with quiet_transformers():
            opened = SentenceTransformer(model, device=device)
    except (OSError, ValueError) as error:
        raise PromptEmbedderError(f"cannot open {model}: {' '.join(str(error).split())[:300]}") from error
    name = f"local/{folder.resolve().name}" if folder.is_dir() else model
    return InstructedEncoder(opened, name, _content(folder) if folder.is_dir() else _commit(opened))


def _filled(template: str) -> Callable[[str, str], str]:
    return lambda text, instruction: template.replace("{instruction}", instruction).replace("{text}", text)


def _content(folder: Path, more: str = "") -> str:
    """Digest of the weights and settings in a folder."""
    digest = hashlib.sha256(more.encode())
    weights = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".bin"))
    for file in sorted(path for path in weights if not atomic.is_unfinished(path)):
        digest.update(file.name.encode())
        with file.open("rb") as source:
            while block := source.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:40]


def _commit(model: SentenceTransformer) -> str:
    """The hub commit that a model came from."""
    configs = [getattr(getattr(module, "auto_model", None), "config", None) for module in model]
    commits = [getattr(config, "_commit_hash", None) for config in configs]
    return next((str(commit) for commit in commits if commit), "hub")
