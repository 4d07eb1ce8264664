"""What a model makes of instructions, apart from its Prompting LLM: all that another engine needs beside the backbone.

Shapes: P instructions, K soft tokens, J layers of the backbone, D backbone width, E embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import Tensor, nn

from promptembedder.errors import PromptEmbedderError
from promptembedder.llms.open import input_embeddings
from promptembedder.model.backbone import Backbone
from promptembedder.model.instructions import instruction_for
from promptembedder.model.module import soft_prompt_module
from promptembedder.model.settings import Layout, Readout
from promptembedder.text import is_blank

DOCUMENT = "document"


@dataclass(frozen=True)
class CompiledInstruction:
    """One instruction, read by the prompter.

    Attributes:
        name: short name that exports know it by.
        instruction: its words.
        ids: what the backbone reads before the soft tokens in layout `prefix`; empty in layout `suffix`.
        soft_KD: the soft tokens in the backbone's input space.
        deep_JKD: what is added to the input of each layer at the soft tokens; unset: nothing.
    """

    name: str
    instruction: str
    ids: tuple[int, ...]
    soft_KD: Tensor
    deep_JKD: Tensor | None

    @property
    def rows(self) -> Tensor:
        """The soft tokens, and what is added to the layers after them, as a backbone takes them."""
        return self.soft_KD if self.deep_JKD is None else torch.cat([self.soft_KD, self.deep_JKD.flatten(0, 1)])


@dataclass(frozen=True)
class Compiled:
    """A model under some instructions, without its Prompting LLM.

    Attributes:
        prompts: by name; `document` is always there.
        layout: where the soft tokens stand, see `sequence`.
        readout: what is read of the last hidden states: the last token, or the mean (of the soft tokens in layout
            `suffix`, of the text tokens in layout `prefix`, the template's words among them).
        head_ids: tokens of the template before the text, with what opens a sequence.
        tail_ids: tokens of the template after the text.
        max_text_tokens: longer texts are truncated.
        centre_D: subtracted from what is pooled; unset: nothing.
        head_ED: a linear head after that; unset: none. The result has length 1.
        embedding_scale: what the backbone multiplies its word embeddings by (Gemma: the root of D).
        backbone: name of the Embedding LLM.
        backbone_revision: of the backbone.
        backbone_fingerprint: of the backbone's weights.
    """

    prompts: Mapping[str, CompiledInstruction]
    layout: Layout
    readout: Readout
    head_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    max_text_tokens: int
    centre_D: Tensor | None
    head_ED: Tensor | None
    embedding_scale: float
    backbone: str
    backbone_revision: str | None
    backbone_fingerprint: str

    def sequence(self, name: str, text_ids: Sequence[int], soft_ids: Sequence[int]) -> list[int]:
        """Token ids that an engine reads, where soft tokens are words of a grown vocabulary.

        Args:
            name: of the instruction.
            text_ids: of the text alone, truncated.
            soft_ids: of the instruction's soft tokens.
        """
        text = [*self.head_ids, *text_ids, *self.tail_ids]
        return [*text, *soft_ids] if self.layout == "suffix" else [*self.prompts[name].ids, *soft_ids, *text]

    @property
    def is_deep(self) -> bool:
        """Whether soft tokens are more than rows of a vocabulary."""
        return any(prompt.deep_JKD is not None for prompt in self.prompts.values())

    @property
    def num_soft_tokens(self) -> int:
        """K, the same for all instructions; of a fold other than the model's."""
        return len(next(iter(self.prompts.values())).soft_KD)

    def backbone_in(self, model: SentenceTransformer, num_soft_tokens: int | None = None) -> Backbone:
        """What reads soft prompts with a model's LLM: its own backbone, or another one over the same LLM.

        Args:
            model: that was compiled.
            num_soft_tokens: of the soft prompts; unset: K.
        """
        backbone, tokens = soft_prompt_module(model).backbone, num_soft_tokens or self.num_soft_tokens
        if tokens == backbone.num_soft_tokens:
            return backbone
        other = Backbone(backbone.lm, layout=self.layout, readout=self.readout, num_soft_tokens=tokens)
        other.head_ids = backbone.head_ids
        return other

    def vocabulary_rows(self, name: str) -> Tensor:
        """The soft tokens (K, D) of an instruction as rows of the backbone's matrix of word embeddings."""
        return self.prompts[name].soft_KD / self.embedding_scale

    def digest(self, name: str) -> str:
        """Identity of the embeddings under an instruction, 16 hex digits: of backbone, settings and compiled tensors.

        An index can refuse to mix embeddings of different digests.
        """
        prompt = self.prompts[name]
        facts = (self.backbone_fingerprint, self.layout, self.readout, self.head_ids, self.tail_ids)
        found = hashlib.sha256(repr((*facts, self.max_text_tokens, prompt.instruction, prompt.ids)).encode())
        for tensor in (prompt.soft_KD, prompt.deep_JKD, self.centre_D, self.head_ED):
            found.update(b"-" if tensor is None else tensor.float().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def with_prompts(self, prompts: Mapping[str, CompiledInstruction]) -> Compiled:
        """The same model under other instructions."""
        return replace(self, prompts=dict(prompts))


@torch.no_grad()
def compile_model(
    model: SentenceTransformer, instructions: Mapping[str, str], *, with_document: bool = True
) -> Compiled:
    """Let the prompter read instructions, and collect what embeddings depend on beside the backbone.

    Args:
        model: made by `build` or `load`.
        instructions: by short name.
        with_document: add the model's document instruction as `document`.

    Raises:
        PromptEmbedderError: a name or an instruction is blank, the name `document` is given to another instruction,
            or the model has a module that cannot be exported.
    """
    module = soft_prompt_module(model)
    document = instruction_for(model, None, document=True)
    if instructions.get(DOCUMENT, document) != document:
        raise PromptEmbedderError(f"the name {DOCUMENT!r} stands for the model's document instruction, {document!r}")
    named = {**instructions, DOCUMENT: document} if with_document else dict(instructions)
    for name, instruction in named.items():
        if is_blank(name) or is_blank(instruction):
            raise PromptEmbedderError(f"instruction {name!r} is {instruction!r}, expected a short name and a sentence")
    settings, K = module.settings, module.settings.num_soft_tokens
    prompts = {}
    for name, instruction in named.items():
        # One by one: read together, their last bits, and so the digests, would depend on what else is compiled.
        soft_RD = module.soft_prompt(instruction)[0].float().cpu()
        deep_JKD = soft_RD[K:].reshape(-1, K, soft_RD.shape[1]) if len(soft_RD) > K else None
        ids = tuple(module.instruction_ids(instruction).tolist())
        prompts[name] = CompiledInstruction(name, instruction, ids, soft_RD[:K].contiguous(), deep_JKD)
    bases = module.base_models
    return Compiled(
        prompts=prompts,
        layout=settings.layout,
        readout=settings.readout,
        head_ids=tuple(module.reader.head_ids),
        tail_ids=tuple(module.reader.tail_ids),
        max_text_tokens=settings.max_text_tokens,
        centre_D=module.centre_E.float().cpu() if module.centred else None,
        head_ED=_head(model),
        embedding_scale=input_embeddings(module.backbone.lm)[1],
        backbone=bases.backbone,
        backbone_revision=bases.backbone_revision,
        backbone_fingerprint=bases.backbone_fingerprint,
    )


def _head(model: SentenceTransformer) -> Tensor | None:
    *heads, last = list(model)[1:]
    plain = all(isinstance(head, Dense) and isinstance(head.activation_function, nn.Identity) for head in heads)
    if (
        not isinstance(last, Normalize)
        or len(heads) > 1
        or not plain
        or any(head.linear.bias is not None for head in heads)
    ):
        names = ", ".join(type(module).__name__ for module in list(model)[1:])
        raise PromptEmbedderError(
            f"modules {names} cannot be exported, expected a linear head without bias and Normalize"
        )
    return heads[0].linear.weight.detach().float().cpu() if heads else None


def embed_compiled(model: SentenceTransformer, compiled: Compiled, name: str, texts: Sequence[str]) -> Tensor:
    """Embeddings (B, E) of length 1 of texts under a compiled instruction, by the model's own backbone.

    What exports are compared with: for a folded instruction this is the fold, not the model.
    """
    return embed_under_each(model, compiled.with_prompts({name: compiled.prompts[name]}), texts)[name]


def embed_under_each(model: SentenceTransformer, compiled: Compiled, texts: Sequence[str]) -> dict[str, Tensor]:
    """As `embed_compiled`, under all instructions by name; in layout `suffix` every text is read once for many."""
    module, prompts = soft_prompt_module(model), list(compiled.prompts.values())
    backbone = compiled.backbone_in(model)
    soft_prompts = [prompt.rows[None].to(model.device) for prompt in prompts]
    ids = [torch.tensor(prompt.ids, dtype=torch.long, device=model.device) for prompt in prompts]
    found: list[list[Tensor]] = [[] for _ in prompts]
    with torch.inference_mode(), module.truncating(compiled.max_text_tokens):
        for start in range(0, len(texts), 32):
            # Which instruction goes along does not matter: the features of a text are the same under all.
            features = module.preprocess(texts[start : start + 32], prompt=prompts[0].instruction)
            ids_BT, mask_BT = (features[key].to(model.device) for key in ("input_ids", "attention_mask"))
            for parts, read_BD in zip(found, backbone.embed(ids_BT, mask_BT, soft_prompts, ids), strict=True):
                embedding_BD = read_BD.float().cpu()
                if compiled.centre_D is not None:
                    embedding_BD = embedding_BD - compiled.centre_D
                parts.append(embedding_BD if compiled.head_ED is None else embedding_BD @ compiled.head_ED.T)
    embeddings = (nn.functional.normalize(torch.cat(parts), dim=-1) for parts in found)
    return dict(zip(compiled.prompts, embeddings, strict=True))
