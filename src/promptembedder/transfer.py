"""Move a trained model to another backbone: the prompter stays, only the alignment `W` is new.

First in closed form from what the vocabularies share; then, if there is something to train on, by training `W` alone:
on labelled rows, or on plain texts by making the new model's similarities agree with the old one's.

Shapes: B texts, M soft tokens of several instructions, K soft tokens, P prompter width, D and F widths of the new and
the old backbone, S shared vocabulary, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from promptembedder import alignment, base_models
from promptembedder.base_models import LocatedModel
from promptembedder.config import ModelConfig, Precision, RunConfig, TransferConfig
from promptembedder.data import TrainingData, data_path
from promptembedder.errors import PromptEmbedderError
from promptembedder.files import read_texts
from promptembedder.model import (
    assemble,
    encode,
    pair,
    prompter_owner,
    refuse_foreign,
    save,
    soft_prompt_module,
)
from promptembedder.module import SoftPromptTransformer
from promptembedder.prompter import Prompter
from promptembedder.text_cache import open_text_cache
from promptembedder.training import TRAINING_FACTS, pair_evaluator, train

logger = logging.getLogger(__name__)

# Below so many shared tokens a fit says nothing about the rest of the vocabulary.
_FEWEST_SHARED = 64
_HELD_BACK = 0.1
_TEXT_STATES = 2 * 2**30


@dataclass(frozen=True)
class Start:
    """A closed-form alignment.

    Attributes:
        name: of the way it was made.
        weight_PD: W.
        reconstruction: mean cosine of mapped and true embeddings over tokens held back from the fit; unset where
            W is not fitted to tokens.
        dev: Spearman x 100 with it, where dev pairs are given.
    """

    name: str
    weight_PD: Tensor
    reconstruction: float | None
    dev: float | None = None


@dataclass(frozen=True)
class Stage:
    """One step of a transfer.

    The time that scoring the closed forms and following dev takes is in none of these figures.

    Attributes:
        name: `closed_form`, `alignment_labelled`, `alignment_unlabelled` or `unfrozen`.
        dev: Spearman x 100 after it, where dev pairs are given.
        seconds: wall time of its fit or optimizer steps.
        examples: rows or texts it was trained on, repetitions counted.
        curve: (examples, seconds since the transfer began, dev) during it.
    """

    name: str
    dev: float | None
    seconds: float
    examples: int
    curve: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True)
class TransferResult:
    """What a transfer made.

    Attributes:
        model: on the new backbone.
        folder: where it was saved.
        stages: in their order.
        starts: the closed-form alignments tried, best first.
        scores: `dev` and `test` at the end, Spearman x 100, where the files are given.
    """

    model: SentenceTransformer
    folder: Path
    stages: tuple[Stage, ...]
    starts: tuple[Start, ...]
    scores: dict[str, float]


class SimilarityDistillation(nn.Module):
    """Loss: the model's in-batch similarities follow those of given teacher embeddings.

    `KL(softmax(T T^t / tau) || softmax(S S^t / tau))` over the rows of a batch, the diagonal left out; teacher
    and student may have different widths, because only similarities are compared.

    Args:
        model: the student; its embeddings have unit length.
        temperature: tau of both softmaxes.
    """

    def __init__(self, model: SentenceTransformer, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss of a batch; `labels` (B, F) are the teacher's embeddings of the texts."""
        (features,) = sentence_features
        student_BD = self.model(features)["sentence_embedding"]
        teacher_BF = nn.functional.normalize(labels.to(student_BD.dtype), dim=-1)
        return nn.functional.kl_div(
            self._log_weights(student_BD), self._log_weights(teacher_BF), log_target=True, reduction="batchmean"
        )

    def _log_weights(self, embeddings_BX: Tensor) -> Tensor:
        similarity_BB = embeddings_BX @ embeddings_BX.T / self.temperature
        itself_BB = torch.eye(len(similarity_BB), dtype=torch.bool, device=similarity_BB.device)
        # Finite, because a product of a zero weight with an infinite logarithm is not a number.
        return torch.log_softmax(similarity_BB.masked_fill(itself_BB, -1e4), dim=-1)


def transfer(
    model: SentenceTransformer, config: TransferConfig, *, share_prompter: str | Path | None = None
) -> TransferResult:
    """Move a trained model to another backbone, save it to `<output>/model` and report on it.

    The prompter's weights are not touched, unless `unfrozen_steps` asks for it.

    Args:
        model: the trained model.
        config: all settings; the output folder is `config.training.output`.
        share_prompter: see `promptembedder.save`.

    Raises:
        PromptEmbedderError: the same backbone again, one that does not fit into memory or shares no vocabulary;
            bad data or settings.
    """
    old = soft_prompt_module(model)
    output = Path(config.training.output)
    if share_prompter is not None:
        if config.unfrozen_steps:
            raise PromptEmbedderError("unfrozen_steps changes the prompter, which then cannot be shared")
        prompter_owner(share_prompter)
    if config.unfrozen_steps and not config.data.files:
        raise PromptEmbedderError("unfrozen_steps needs labelled rows (data.files)")
    if config.data.files and config.texts:
        raise PromptEmbedderError("give labelled rows (data.files) or plain texts (texts), not both")
    dev = pair_evaluator(config.evaluation, config.data.root, "dev")
    test = pair_evaluator(config.evaluation, config.data.root, "test")
    texts = _read_texts(config)
    refuse_foreign(output / "model")
    located = base_models.locate(config.backbone, config.backbone_revision)
    # No device is asked for: the new model goes where the old one is.
    moved = on_backbone(model, located, dtype=config.dtype)
    new = soft_prompt_module(moved)
    if config.unfrozen_steps:
        new.prompter = _own_copy(old)
    trained = {parameter: parameter.requires_grad for parameter in new.prompter.parameters()}
    try:
        starts, fitting = _starts(old, new, config, bool(texts))
        starts = _ranked(moved, starts, dev)
        _set_weight(new, starts[0].weight_PD)
        stages = [Stage("closed_form", starts[0].dev, fitting, 0)]
        stages += _train_stages(model, moved, config, texts, fitting)
    finally:
        # The two models share the prompter: what is open to training stays as the caller had it.
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
    scores: dict[str, float] = {}
    if stages[-1].dev is not None:
        scores["dev"] = stages[-1].dev
    if test is not None:
        scores["test"] = 100 * test(moved)["test_spearman_cosine"]
    save(moved, output / "model", share_prompter=share_prompter)
    opened = config.unfrozen_steps > 0
    facts = {
        "trained_parameters": sum(
            p.numel() for n, p in moved.named_parameters() if p.requires_grad and (opened or ".prompter." not in n)
        ),
        "steps": sum(stage.examples for stage in stages) // config.training.batch_size,
        "examples": sum(stage.examples for stage in stages),
        "seconds": round(sum(stage.seconds for stage in stages), 1),
    }
    (output / "model" / TRAINING_FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    result = TransferResult(moved, output / "model", tuple(stages), tuple(starts), scores)
    write_report(result, output, located.name)
    return result


def _starts(
    old: SoftPromptTransformer, new: SoftPromptTransformer, config: TransferConfig, texts: bool
) -> tuple[list[Start], float]:
    """Closed forms, or a random start where there are none and something to train on; seconds it took."""
    begin = time.perf_counter()
    starts = closed_forms(old, new, _instructions(old, config), only=config.starts)
    if not starts:
        if not (config.data.files or texts):
            raise PromptEmbedderError(
                f"{config.backbone} shares too few tokens with the prompter for a closed-form start; give rows or "
                "texts to train the alignment on"
            )
        logger.warning("the vocabularies share too little for a closed-form start; W starts at random")
        P, D = new.alignment.weight.shape
        generator = torch.Generator().manual_seed(config.training.seed)
        starts = [Start("random", alignment.random(P, D, generator), None)]
    return starts, time.perf_counter() - begin


def _train_stages(
    model: SentenceTransformer, moved: SentenceTransformer, config: TransferConfig, texts: list[str], before: float
) -> list[Stage]:
    """The steps with training that the settings ask for."""
    settings, output = config.training, Path(config.training.output)
    module = soft_prompt_module(moved)
    run = RunConfig(
        model=module.settings,
        data=config.data,
        training=replace(
            settings, train_prompter=False, train_alignment=True, warm_start=replace(settings.warm_start, steps=0)
        ),
        evaluation=replace(config.evaluation, test=None),
    )
    stages: list[Stage] = []
    if config.data.files:
        stages.append(_trained("alignment_labelled", moved, run, output, before))
    elif texts:
        begin = time.perf_counter()
        instructions = config.text_instructions or (module.settings.default_instruction,)
        rows = _distillation_rows(model, texts, instructions)
        before += time.perf_counter() - begin
        loss = SimilarityDistillation(moved, config.distillation_temperature)
        stages.append(_trained("alignment_unlabelled", moved, run, output, before, rows, loss))
    if config.unfrozen_steps:
        before += sum(stage.seconds for stage in stages)
        opened = replace(run.training, train_prompter=True, max_steps=config.unfrozen_steps)
        stages.append(_trained("unfrozen", moved, replace(run, training=opened), output, before))
    return stages


def on_backbone(
    model: SentenceTransformer, located: LocatedModel, *, dtype: Precision | None = None
) -> SentenceTransformer:
    """The same prompter before another backbone, with an alignment of zeros; the two models share the prompter.

    A deep soft prompt starts at zero again, a linear head at the identity: both belong to a backbone.

    Raises:
        PromptEmbedderError: the backbone is the same, or does not fit into memory.
    """
    old = soft_prompt_module(model)
    settings: ModelConfig = replace(
        old.settings,
        backbone=located.name,
        backbone_revision=located.revision,
        dtype=dtype or old.settings.dtype,
    )
    device = old.alignment.weight.device
    precision = base_models.resolve_dtype(settings.dtype, device)
    _check_memory(located, precision, device)
    lm = base_models.load_causal_lm(located, precision).to(device)
    fingerprint = base_models.fingerprint(lm)
    if fingerprint == old.base_models.backbone_fingerprint:
        raise PromptEmbedderError(f"{located.name} is the backbone that the model has already; name another one")
    P = old.alignment.weight.shape[0]
    width = lm.get_input_embeddings().weight.shape[1]
    matrix, backbone = pair(settings, lm, torch.zeros(P, width), located.name)
    identity = replace(
        old.base_models,
        backbone=located.name,
        backbone_revision=located.revision,
        backbone_fingerprint=fingerprint,
    )
    module = SoftPromptTransformer(
        old.prompter,
        matrix.to(device),
        backbone,
        base_models.load_tokenizer(located),
        settings,
        identity,
    )
    return assemble(module, str(device))


def closed_forms(
    old: SoftPromptTransformer, new: SoftPromptTransformer, instructions: Sequence[str], only: Sequence[str] = ()
) -> list[Start]:
    """Alignments to a new backbone without training; empty where the vocabularies share next to nothing.

    | name | W |
    | --- | --- |
    | `least_squares`, `ridge`, `procrustes` | from the prompter's to the new backbone's embeddings of shared tokens |
    | `weighted` | ridge, tokens weighted by their share in the mixtures of the soft tokens |
    | `through_old` | the trained W, then least squares from the old backbone's embeddings to the new one's |
    | `mixture` | ridge, corrected so that each soft token of the instructions becomes the same mixture of words |
    | `mixture_and_drift` | `through_old`, corrected likewise, plus what training moved the soft prompt by |

    All but the last two are scaled to the norm of the new backbone's embeddings.

    Args:
        old: the trained module.
        new: the module on the new backbone.
        instructions: those whose soft tokens count most.
        only: names wanted; empty: all.

    Raises:
        PromptEmbedderError: an unknown name.
    """
    names = ("least_squares", "ridge", "procrustes", "weighted", "through_old", "mixture", "mixture_and_drift")
    if wrong := [name for name in only if name not in names]:
        raise PromptEmbedderError(f"unknown start {wrong[0]!r}; valid: {', '.join(names)}")
    ids_prompter, ids_new = alignment.shared_vocabulary(old.prompter.tokenizer, new.tokenizer)
    ids_old, ids_new_too = alignment.shared_vocabulary(old.tokenizer, new.tokenizer)
    if min(len(ids_prompter), len(ids_old)) < _FEWEST_SHARED:
        return []
    embeddings_VP, embeddings_new_VD = _embeddings(old.prompter.lm), _embeddings(new.backbone.lm)
    embeddings_old_VF = _embeddings(old.backbone.lm)
    prompter_SP, backbone_SD = embeddings_VP[ids_prompter], embeddings_new_VD[ids_new]
    tokens_MP, mixtures_MV = _soft_tokens(old, instructions)
    shared_MS = mixtures_MV[:, ids_prompter]
    # A soft token is a mixture of words, and the words exist in both; what is not shared is spread over the rest.
    words_MD = (shared_MS / shared_MS.sum(-1, keepdim=True).clamp(min=1e-9)) @ backbone_SD
    used_S = shared_MS.sum(0) + 1e-2 / len(ids_prompter) * float(shared_MS.sum())
    to_new_FD = alignment.ridge(embeddings_old_VF[ids_old], embeddings_new_VD[ids_new_too])
    trained_PF = old.alignment.weight.detach().float().cpu()
    through_PD = trained_PF @ to_new_FD
    # What the trained W does to the soft tokens beyond mixing the old backbone's own words.
    old_ids_of_prompter = alignment.shared_vocabulary(old.prompter.tokenizer, old.tokenizer)
    mixed_MF = _mixed(mixtures_MV, *old_ids_of_prompter, embeddings_old_VF)
    drift_MD = (tokens_MP @ trained_PF - mixed_MF) @ to_new_FD

    held = torch.zeros(len(ids_prompter), dtype=torch.bool)
    held[random.Random(0).sample(range(len(held)), max(1, int(_HELD_BACK * len(held))))] = True
    held_old = torch.isin(ids_new_too, ids_new[held])

    def closeness(weight_PD: Tensor) -> float:
        cosines = nn.functional.cosine_similarity(prompter_SP[held] @ weight_PD, backbone_SD[held], dim=-1)
        return float(cosines.mean())

    def fitted(fit: Callable[[Tensor, Tensor, Tensor | None], Tensor], weights_S: Tensor | None = None) -> Start:
        part = fit(prompter_SP[~held], backbone_SD[~held], None if weights_S is None else weights_S[~held])
        weight_PD = fit(prompter_SP, backbone_SD, weights_S)
        return Start("", alignment.matched_norm(weight_PD, prompter_SP, backbone_SD), closeness(part))

    def through_old() -> Start:
        part_FD = alignment.ridge(embeddings_old_VF[ids_old[~held_old]], embeddings_new_VD[ids_new_too[~held_old]])
        return Start("", alignment.matched_norm(through_PD, prompter_SP, backbone_SD), closeness(trained_PF @ part_FD))

    makers: dict[str, Callable[[], Start]] = {
        "least_squares": lambda: fitted(lambda a, b, _: alignment.ridge(a, b, penalty=1e-6)),
        "ridge": lambda: fitted(lambda a, b, _: alignment.ridge(a, b)),
        "procrustes": lambda: fitted(lambda a, b, _: alignment.procrustes(a, b)),
        "weighted": lambda: fitted(lambda a, b, w: alignment.ridge(a, b, weights_S=w), used_S),
        "through_old": through_old,
        "mixture": lambda: Start(
            "", alignment.folded(alignment.ridge(prompter_SP, backbone_SD), tokens_MP, words_MD), None
        ),
        "mixture_and_drift": lambda: Start("", alignment.folded(through_PD, tokens_MP, words_MD + drift_MD), None),
    }
    return [replace(make(), name=name) for name, make in makers.items() if not only or name in only]


def write_report(result: TransferResult, folder: Path, backbone: str) -> None:
    """Write `results.json`, `report.md` and, where there is a curve, `picture.png`."""
    curves = {stage.name: stage.curve for stage in result.stages if stage.curve}
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
        "scores": {k: _rounded(v) for k, v in result.scores.items()},
    }
    lines = [
        f"# Transfer to {backbone}",
        "",
        "| closed-form start | mean cosine on held-back tokens | dev |",
        "| --- | ---: | ---: |",
        *(f"| {start.name} | {_shown(start.reconstruction)} | {_shown(start.dev)} |" for start in result.starts),
        "",
        "| stage | dev | seconds | examples |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {s.name} | {_shown(_rounded(s.dev))} | {s.seconds:.1f} | {s.examples} |" for s in result.stages),
        "",
        *(f"{name}: {score:.2f}  " for name, score in result.scores.items()),
    ]
    if curves:
        lines += ["", "![dev against examples and time](picture.png)"]
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as place:
        scratch = Path(place)
        (scratch / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (scratch / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if curves:
            _draw(curves, result.stages[0], scratch / "picture.png")
        for file in scratch.iterdir():
            file.replace(folder / file.name)


def _draw(curves: dict[str, Any], start: Stage, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture: it needs matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, at, title in zip(figure.subplots(1, 2), (0, 1), ("examples", "seconds of training"), strict=True):
        for name, curve in curves.items():
            first = [] if start.dev is None else [(0, start.seconds, start.dev)]
            points = [*first, *curve]
            axes.plot([p[at] for p in points], [p[2] for p in points], marker="o", label=name)
        axes.set(xlabel=title, ylabel="dev, Spearman x 100")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _trained(
    name: str,
    model: SentenceTransformer,
    run: RunConfig,
    output: Path,
    before: float,
    data: TrainingData | None = None,
    loss: nn.Module | None = None,
) -> Stage:
    """Train; the times of the curve count from the beginning of the transfer, `before` seconds ago."""
    run = replace(run, training=replace(run.training, output=str(output / name)))
    result = train(run, model=model, data=data, loss=loss)
    each = run.training.batch_size * run.training.gradient_accumulation
    curve = tuple(
        (line["step"] * each, round(before + line["step_seconds"], 2), 100 * line["eval_dev_spearman_cosine"])
        for line in result.history
        if "eval_dev_spearman_cosine" in line
    )
    seconds = max((line["step_seconds"] for line in result.history if "step_seconds" in line), default=result.seconds)
    return Stage(name, result.scores.get("dev"), seconds, result.steps * each, curve)


def _own_copy(module: SoftPromptTransformer) -> Prompter:
    """The prompter with trained weights of its own; frozen ones are shared."""
    lora = module.settings.prompter_training == "lora"
    shared: dict[int, Any] = {id(p): p for n, p in module.prompter.named_parameters() if lora and "lora_" not in n}
    return copy.deepcopy(module.prompter, shared)


def _ranked(model: SentenceTransformer, starts: list[Start], dev: Any) -> list[Start]:
    """Starts, best first: by dev score, or by reconstruction with the mixtures of words before all that are fitted."""
    if dev is None:
        # Nothing to measure mixtures of words by; first, because they beat the fits (docs/research-log.md).
        return sorted(starts, key=lambda s: 2.0 if s.reconstruction is None else s.reconstruction, reverse=True)
    module = soft_prompt_module(model)
    scored = []
    if module.settings.layout == "suffix":  # every text is read once for all starts
        budget = min(_TEXT_STATES, psutil.virtual_memory().available // 4)
        module.backbone.text_cache = open_text_cache(budget, identity="transfer")
    try:
        for start in tqdm(starts, desc="Closed forms"):
            _set_weight(module, start.weight_PD)
            scored.append(replace(start, dev=100 * dev(model)["dev_spearman_cosine"]))
    finally:
        module.backbone.text_cache = None
    return sorted(scored, key=lambda s: s.dev if s.dev is not None and s.dev == s.dev else -1e9, reverse=True)


def _set_weight(module: SoftPromptTransformer, weight_PD: Tensor) -> None:
    with torch.no_grad():
        module.alignment.weight.copy_(weight_PD)


@torch.no_grad()
def _soft_tokens(module: SoftPromptTransformer, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Soft tokens (M, P) and mixture weights (M, V) that the prompter writes for the instructions, on the CPU."""
    tokens, mixtures = [], []
    for instruction in instructions:
        written = module.soft_tokens(instruction)
        tokens.append(written.tokens_NKP[0].float().cpu())
        mixtures.append(torch.softmax(written.logits_NKV[0].float().cpu() / module.prompter.temperature, dim=-1))
    return torch.cat(tokens), torch.cat(mixtures)


def _mixed(mixtures_MV: Tensor, ids_from: Tensor, ids_to: Tensor, embeddings_VX: Tensor) -> Tensor:
    """Soft tokens (M, X) that mix another LLM's embeddings of the same words."""
    shared_MS = mixtures_MV[:, ids_from]
    return (shared_MS / shared_MS.sum(-1, keepdim=True).clamp(min=1e-9)) @ embeddings_VX[ids_to]


def _embeddings(lm: Any) -> Tensor:
    matrix_VX, scale = base_models.input_embeddings(lm)
    return matrix_VX.detach().float().cpu() * scale


def _instructions(old: SoftPromptTransformer, config: TransferConfig) -> list[str]:
    """Those that matter in this transfer: of the texts, the evaluation and the model."""
    named = [*config.text_instructions, config.evaluation.instruction if config.evaluation.dev else None]
    defaults = [old.settings.default_instruction, old.settings.document_instruction]
    return list(dict.fromkeys(text for text in [*named, *defaults] if text))


def _read_texts(config: TransferConfig) -> list[str]:
    texts: list[str] = []
    for source in config.texts:
        texts += [text for _, text in read_texts(str(data_path(source, config.data.root)), None)]
    texts = list(dict.fromkeys(texts))
    if config.texts and len(texts) < config.training.batch_size:
        raise PromptEmbedderError(
            f"{len(texts)} different texts for batches of {config.training.batch_size}; give more or smaller batches"
        )
    drawn = random.Random(config.training.seed)
    return texts if len(texts) <= config.max_texts else drawn.sample(texts, config.max_texts)


def _distillation_rows(teacher: SentenceTransformer, texts: list[str], instructions: Sequence[str]) -> TrainingData:
    """Texts with the old model's embeddings of them, one dataset per instruction."""
    embedded_INE = encode(teacher, texts, list(instructions), show_progress_bar=True)
    datasets = {
        f"task_{n + 1}": Dataset.from_dict({"anchor": texts, "label": embedded_NE.tolist()})
        for n, embedded_NE in enumerate(embedded_INE)
    }
    prompts = {f"task_{n + 1}": {"anchor": instruction} for n, instruction in enumerate(instructions)}
    return TrainingData(DatasetDict(datasets), prompts)


def _check_memory(located: LocatedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a backbone that cannot fit, from its config alone."""
    config = base_models.load_config(located)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    needed = sum(p.numel() for p in empty.parameters()) * torch.empty(0, dtype=dtype).element_size()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise PromptEmbedderError(
            f"{located.name} needs {needed / 2**30:.1f} GiB of weights in {str(dtype).removeprefix('torch.')}, "
            f"{free / 2**30:.1f} GiB are free on {device}"
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
