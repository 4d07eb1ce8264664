"""Fold: a deep soft prompt made into soft tokens and a linear head, fitted on plain texts so that embeddings agree.

For engines that have no linear head, and subtract nothing, similarities are made to agree in place of embeddings.

Engines that know rows of a vocabulary cannot add anything to their layers. A fold loses some of the quality, which is
measured, and its embeddings do not match an index made by the deep model.

Shapes: N texts, B texts of a step, K soft tokens of the model, R of the fold, D backbone width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from promptembedder import progress
from promptembedder.errors import PromptEmbedderError, needs_extra
from promptembedder.export.compiled import Compiled, embed_compiled, embed_under_each
from promptembedder.llms.state_cache import open_text_cache
from promptembedder.model.backbone import Backbone
from promptembedder.model.module import soft_prompt_module

FEWEST_TEXTS = 100
# More are not read: the steps see each of these some two times.
MOST_TEXTS = 1000
ROWS = 10
STEPS = 300
# Small batches of many steps came closer to the deep model, in the same time, than large ones of few.
_BATCH = 8
# Similarities are those of the texts of a batch, so without a head few texts teach little: more of them, fewer steps.
_HEADLESS_BATCH = 32
_READ_BATCH = 32
# Of the soft tokens' standard deviation, a step.
_RATE = 0.1
# Of the head's, a step.
_HEAD_RATE = 0.025
# Of the softmaxes over similarities, as in training with a teacher.
_TEMPERATURE = 0.05
# Longer texts are truncated while fitting.
_TEXT_TOKENS = 128
_CACHE_BYTES = 2 * 2**30
_NEIGHBOURS = 10
# Mean cosine of the deep model's embeddings from which two instructions are folded as one; a fold loses far more.
_SAME = 0.999

ScoredPairs = tuple[Sequence[str], Sequence[str], Sequence[float]]


@dataclass(frozen=True)
class Fold:
    """A fold and what it kept.

    Attributes:
        compiled: the folded instructions.
        facts: `rows`, `texts`, `headless`, and in `kept`, by instruction: `cosine` to the deep model (headless: the
            correlation of similarities, `similarity`) and `neighbours_kept`, the
            share of its ten nearest texts, both on texts held back; with dev pairs the `spearman` of the fold, and
            `spearman_deep` of the deep model.
    """

    compiled: Compiled
    facts: dict[str, Any]


def fold(
    model: SentenceTransformer,
    compiled: Compiled,
    texts: Sequence[str],
    *,
    rows: int | None = None,
    dev: ScoredPairs | None = None,
    headless: bool = False,
    head_ED: Tensor | None = None,
    steps: int | None = None,
    seed: int = 13,
) -> Fold:
    """Make soft tokens of deep soft prompts; a linear head, where the model has one, is fitted with them, one for all.

    Args:
        model: that the instructions were compiled with.
        compiled: deep, or with a head or centre that is to go.
        texts: plain texts of the kind to be embedded.
        rows: R; unset: 10.
        dev: scored pairs, to report by.
        headless: leave out centre and linear head; similarities agree in place of embeddings.
        head_ED: the head of a fold that these instructions join, which stays as it is; unset: it is fitted.
        steps: for the first instruction; unset: 300, headless 150 larger ones. Every further one adds half of them.
        seed: draws the texts held back, and the batches.

    Raises:
        PromptEmbedderError: fewer than 100 different texts; no such number of rows.
    """
    rows = ROWS if rows is None else rows
    steps = steps if steps is not None else STEPS // 2 if headless else STEPS
    if not 1 <= rows <= 512:
        raise PromptEmbedderError(f"a fold has 1 to 512 rows, found {rows}")
    fitting = _Fitting(model, compiled, texts, seed, headless)
    if head_ED is not None:
        fitting.target = replace(fitting.target, head_ED=head_ED)
    stands_for: dict[str, str] = {}
    for name in compiled.prompts:
        # The prompter often reads the same in two instructions, such as those of queries and documents.
        fitted = dict.fromkeys(stands_for.values())
        stands_for[name] = next((other for other in fitted if fitting.agreement(name, other) > _SAME), name)
    names = list(dict.fromkeys(stands_for.values()))
    alike = [f"{name} is read like {other}" for name, other in stands_for.items() if name != other]
    what = f"folding {', '.join(names)} on {len(fitting.texts)} texts, which takes minutes on a CPU"
    progress.say("; ".join([what, *alike]))
    total = steps + (len(names) - 1) * -(-steps // 2)
    soft_prompts, fitted_ED = fitting.fit(names, rows, total, fit_head=head_ED is None)
    fitting.target = replace(fitting.target, head_ED=fitted_ED)
    prompts = {
        name: replace(prompt, soft_KD=soft_prompts[stands_for[name]], deep_JKD=None)
        for name, prompt in compiled.prompts.items()
    }
    kept = {name: fitting.kept(name, prompt.soft_KD) for name, prompt in prompts.items()}
    made = fitting.target.with_prompts(prompts)
    if dev is not None:
        for name in prompts:
            kept[name] |= {
                "spearman": _spearman(model, made, name, dev),
                "spearman_deep": _spearman(model, compiled, name, dev),
            }
    return Fold(made, {"rows": rows, "texts": len(fitting.texts), "headless": headless, "kept": kept})


class _Fitting:
    """Texts, what the deep model makes of them, and their states, read once."""

    def __init__(
        self, model: SentenceTransformer, compiled: Compiled, texts: Sequence[str], seed: int, headless: bool
    ) -> None:
        different = list(dict.fromkeys(texts))
        if len(different) < FEWEST_TEXTS:
            raise PromptEmbedderError(f"a fold needs at least {FEWEST_TEXTS} different texts, found {len(different)}")
        self.model, self.compiled, self.seed, self._headless = model, compiled, seed, headless
        self.target = replace(compiled, centre_D=None, head_ED=None) if headless else compiled
        order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
        self.texts = [different[n] for n in order[:MOST_TEXTS]]
        self.held = len(self.texts) // 10
        self._short = replace(compiled, max_text_tokens=min(compiled.max_text_tokens, _TEXT_TOKENS))
        self._deep: dict[str, Tensor] = {}
        self._backbones: dict[int, Backbone] = {}
        with needs_extra("train", "a fold"):
            self._cache = open_text_cache(_CACHE_BYTES, identity=compiled.backbone_fingerprint)

    def deep(self, name: str) -> Tensor:
        """Embeddings (N, E) of the texts by the deep model."""
        if not self._deep:
            self._deep = embed_under_each(self.model, self._short, self.texts)
        return self._deep[name]

    def agreement(self, name: str, other: str) -> float:
        """Mean cosine of the deep model's embeddings under two instructions."""
        return float((self.deep(name) * self.deep(other)).sum(-1).mean())

    def start(self, name: str, rows: int) -> Tensor:
        """The model's own soft tokens, repeated or cut to (R, D): the last one is read, so others go before."""
        soft_KD = self.compiled.prompts[name].soft_KD
        return soft_KD[torch.arange(-rows, 0) % len(soft_KD)]

    def fit(
        self, names: Sequence[str], rows: int, steps: int, *, fit_head: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Soft tokens (R, D) by instruction that embed the texts not held back as the deep model does, and the head.

        Instructions take turns. What a fold adds to the soft tokens is much the same under all of them, so a part is
        shared. So is the head; None where the model has none.
        """
        start = {name: self.start(name, rows).to(self.model.device) for name in names}
        shared_RD = nn.Parameter(torch.zeros_like(start[names[0]]))
        own = {name: nn.Parameter(torch.zeros_like(start_RD)) for name, start_RD in start.items() if len(names) > 1}
        head_ED = (
            None if self.target.head_ED is None else nn.Parameter(self.target.head_ED.to(self.model.device, copy=True))
        )
        rate = _RATE * float(torch.stack([*start.values()]).std())
        # With several instructions a soft prompt moves by both of its parts.
        groups: list[dict[str, Any]] = [{"params": [shared_RD, *own.values()], "lr": rate}]
        if head_ED is not None and fit_head:
            groups.append({"params": [head_ED], "lr": _HEAD_RATE * float(head_ED.detach().std())})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(self.seed)
        what = f"{names[0]!r}" if len(names) == 1 else f"{len(names)} instructions"
        bar = progress.bar(range(steps), f"Folding {what} into {rows} soft tokens", unit="step")
        for step in bar:
            name = names[step % len(names)]
            batch = _HEADLESS_BATCH if self._headless else _BATCH
            drawn = self.held + torch.randperm(len(self.texts) - self.held, generator=generator)[:batch]
            with torch.enable_grad():
                soft_RD = start[name] + shared_RD + own.get(name, 0)
                found_BE = self._embed(name, soft_RD, drawn.tolist(), head_ED)
                loss = self._loss(found_BE, self.deep(name)[drawn].to(found_BE))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        fitted = {
            name: (start_RD + shared_RD + own.get(name, 0)).detach().float().cpu() for name, start_RD in start.items()
        }
        return fitted, None if head_ED is None else head_ED.detach().float().cpu()

    def _loss(self, found_BE: Tensor, deep_BF: Tensor) -> Tensor:
        """How far embeddings, or similarities of the texts of a step, are from the deep model's."""
        if not self._headless:
            return 1 - (found_BE * deep_BF).sum(-1).mean()
        itself_BB = torch.eye(len(found_BE), dtype=torch.bool, device=found_BE.device)
        found_BB, deep_BB = (
            torch.log_softmax((X @ X.T / _TEMPERATURE).masked_fill(itself_BB, -1e4), dim=-1)
            for X in (found_BE, deep_BF)
        )
        return nn.functional.kl_div(found_BB, deep_BB, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def kept(self, name: str, soft_RD: Tensor) -> dict[str, float]:
        """How close soft tokens are to the deep model, on the texts held back among all."""
        soft_RD, head_ED = soft_RD.to(self.model.device), self.target.head_ED
        places = range(0, len(self.texts), _READ_BATCH)
        chunks = [range(n, min(n + _READ_BATCH, len(self.texts))) for n in places]
        found_NE = torch.cat([self._embed(name, soft_RD, list(chunk), head_ED).cpu() for chunk in chunks])
        deep_NE = self.deep(name)
        near = [self._nearest(embeddings_NE) for embeddings_NE in (found_NE, deep_NE)]
        shares = [len(set(a) & set(b)) / len(b) for a, b in zip(*near, strict=True)]
        if self._headless:
            agreed = {"similarity": self._correlation(found_NE, deep_NE)}
        else:
            agreed = {"cosine": float((found_NE * deep_NE).sum(-1)[: self.held].mean())}
        return agreed | {"neighbours_kept": sum(shares) / len(shares)}

    def _correlation(self, found_NE: Tensor, deep_NE: Tensor) -> float:
        """Of the similarities between texts held back and all later ones."""
        places = torch.ones(self.held, len(self.texts), dtype=torch.bool).triu(1)
        found, deep = ((X[: self.held] @ X.T)[places] for X in (found_NE, deep_NE))
        return float(torch.corrcoef(torch.stack([found, deep]))[0, 1])

    def _nearest(self, embeddings_NE: Tensor) -> list[list[int]]:
        """The ten nearest of all texts, itself left out, to each one held back."""
        similarity_HN = embeddings_NE[: self.held] @ embeddings_NE.T
        similarity_HN.fill_diagonal_(-2.0)
        nearest: list[list[int]] = similarity_HN.topk(_NEIGHBOURS, dim=-1).indices.tolist()
        return nearest

    def _embed(self, name: str, soft_RD: Tensor, numbers: list[int], head_ED: Tensor | None) -> Tensor:
        """Embeddings (B, E) of length 1 of texts by their numbers, with gradients to soft tokens and head."""
        module, compiled = soft_prompt_module(self.model), self.target
        instruction = compiled.prompts[name].instruction
        with module.truncating(self._short.max_text_tokens):
            features = module.preprocess([self.texts[n] for n in numbers], prompt=instruction)
        if len(soft_RD) not in self._backbones:
            self._backbones[len(soft_RD)] = compiled.backbone_in(self.model, len(soft_RD))
        backbone = self._backbones[len(soft_RD)]
        ids_BT, mask_BT = (features[key].to(self.model.device) for key in ("input_ids", "attention_mask"))
        states = backbone.read_text(ids_BT, mask_BT, self._cache)
        embedding_BE = backbone.read_soft_prompt(states, soft_RD[None])
        if compiled.centre_D is not None:
            embedding_BE = embedding_BE - compiled.centre_D.to(embedding_BE)
        if head_ED is not None:
            embedding_BE = embedding_BE @ head_ED.T.to(embedding_BE)
        return nn.functional.normalize(embedding_BE, dim=-1)


def _spearman(model: SentenceTransformer, compiled: Compiled, name: str, dev: ScoredPairs) -> float:
    one, other = (embed_compiled(model, compiled, name, list(sentences)) for sentences in dev[:2])
    return 100 * float(spearmanr((one * other).sum(-1).numpy(), dev[2]).statistic)
