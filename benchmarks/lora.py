"""The peer: what a user would do instead. sentence-transformers with peft LoRA on the same LLM, hard instruction.

Rank 16 on all linear layers, last-token pooling, the instruction glued before the text. The same rows, batches and
loss as `promptembedder train` takes from a run's settings, and as many tokens of each text: it is cut before the
instruction is glued to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from promptembedder import atomic, evaluation
from promptembedder.data.rows import TrainingData, load_training_data
from promptembedder.data.scored_pairs import read_scored_pairs
from promptembedder.llms.device import resolve_dtype
from promptembedder.llms.locate import locate
from promptembedder.training.arguments import shared_arguments
from promptembedder.training.callbacks import TrainingClock
from promptembedder.training.curves import Curve, dev_curve, read_facts, seconds_of, write_facts
from promptembedder.training.evaluators import spread
from promptembedder.training.losses import make_losses
from promptembedder.training.settings import RunConfig
from promptembedder.training.teacher import teach
from promptembedder.training.trainer import OwnNegativesTrainer

# To choose from, by dev after a few steps. 4e-3 is ahead after 15 of them and three points behind after 200
# (docs/research-log.md), so it is left out, in LoRA's favour.
RATES = (5e-4, 1e-3, 2e-3)
ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"
# Room beside the text: of every instruction's tokens none is cut.
INSTRUCTION_TOKENS = 128
TEMPLATE = "Instruct: {instruction}\nQuery: {text}"


class Float32Normalize(Normalize):
    """Embeddings and loss in float32, as ours are: InfoNCE of bfloat16 cosines loses much of a small gradient."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features["sentence_embedding"] = features["sentence_embedding"].float()
        return dict(super().forward(features))


def build(llm: str, dtype: torch.dtype, device: str, *, checkpointing: bool = False) -> SentenceTransformer:
    """A frozen LLM with LoRA on all its linear layers."""
    folder = str(locate(llm).folder)
    transformer = evaluation.plain_reader(folder, dtype)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    # peft's own way in, which keeps the adapter in float32; `SentenceTransformer.add_adapter` goes through
    # transformers, whose version 5.24 asks for a peft that is not out yet.
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    transformer.model = get_peft_model(transformer.model, lora, adapter_name=ADAPTER)
    model = SentenceTransformer(modules=[transformer, pooling, Float32Normalize()], device=device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def cut(tokenizer: Any, texts: list[str], limit: int) -> list[str]:
    """The texts' first `limit` tokens, as text."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        text if len(of_text) <= limit else tokenizer.decode(of_text[:limit])
        for text, of_text in zip(texts, ids, strict=True)
    ]


def cut_rows(tokenizer: Any, data: TrainingData, limit: int) -> DatasetDict:
    """The rows with every text's first `limit` tokens."""
    return data.datasets.map(
        lambda rows: {name: cut(tokenizer, texts, limit) for name, texts in rows.items() if name != "label"},
        batched=True,
        load_from_cache_file=False,
    )


def prompt(instruction: str) -> str:
    return TEMPLATE.format(instruction=instruction, text="")


def evaluator(model: SentenceTransformer, config: RunConfig) -> EmbeddingSimilarityEvaluator:
    """The run's dev pairs under its instruction, picked as `promptembedder train` picks them."""
    assert config.evaluation.dev is not None
    first, second, scores = read_scored_pairs(config.evaluation.dev, config.data.root)
    picked = spread(len(scores), config.evaluation.dev_pairs)
    head = prompt(config.evaluation.instruction)
    one, other = (
        [head + text for text in cut(model.tokenizer, [texts[n] for n in picked], config.model.max_text_tokens)]
        for texts in (first, second)
    )
    return EmbeddingSimilarityEvaluator(
        one,
        other,
        [scores[n] for n in picked],
        batch_size=config.evaluation.batch_size,
        main_similarity="cosine",
        write_csv=False,
    )


def dev_score(model: SentenceTransformer, config: RunConfig) -> float:
    return 100 * float(evaluator(model, config)(model)["spearman_cosine"])


class BestOnDev(TrainerCallback):
    """Keeps the weights with the best dev score, as `promptembedder train` does; without dev scores the last ones.

    Args:
        model: what is trained.
        place: file of the best weights, so that a run that was stopped finds them again.
    """

    def __init__(self, model: SentenceTransformer, place: Path) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.place = place

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        scores = [entry["eval_spearman_cosine"] for entry in state.log_history if "eval_spearman_cosine" in entry]
        if metrics["eval_spearman_cosine"] >= max(scores):
            with atomic.replacing(self.place) as scratch:
                save_file({name: p.detach().cpu().contiguous() for name, p in self.trained.items()}, scratch)

    def restore(self) -> None:
        if not self.place.is_file():
            return
        kept = load_file(self.place)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(kept[name])


class Trainer(OwnNegativesTrainer):
    """Resumes with LoRA's weights in float32; the library opens them in the LLM's dtype on the way."""

    def _load_from_checkpoint(self, checkpoint_path: str, model: torch.nn.Module | None = None) -> None:
        state = load_file(Path(checkpoint_path) / WEIGHTS)
        set_peft_model_state_dict(adapted(self.model), state, adapter_name=ADAPTER)


@dataclass(frozen=True)
class Trained:
    """A LoRA model (the best on dev where that was followed), seconds of its steps, and (examples, seconds, dev)."""

    model: SentenceTransformer
    seconds: float
    curve: Curve


def train(config: RunConfig, *, learning_rate: float, output: Path | None = None, follow: bool = False) -> Trained:
    """Train on the run's rows.

    Args:
        config: rows, batches, loss and schedule.
        learning_rate: of LoRA's weights, AdamW.
        output: where the adapter is saved; checkpoints go beside it, and a run that was stopped goes on from there.
        follow: score dev every `evaluation.every_steps` steps.
    """
    settings = config.training
    set_seed(settings.seed)
    data = load_training_data(config.data, config.model.document_instruction, settings.seed)
    if settings.teacher is not None:
        place = (output or Path(settings.output)).with_name("teacher")
        data, _ = teach(config.data, settings, data, config.model.default_instruction, place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(config.model.backbone, resolve_dtype(config.model.dtype, device), device)
    limit = config.data.max_text_tokens or config.model.max_text_tokens
    model.max_seq_length = config.model.max_text_tokens + INSTRUCTION_TOKENS
    checkpoints = (output or Path(settings.output)).with_name("checkpoints")
    best = BestOnDev(model, checkpoints / "best.safetensors")
    model.model_card_data.generate_widget_examples = False
    trainer = Trainer(
        model=model,
        args=_arguments(config, data, learning_rate, checkpoints, save=output is not None, follow=follow),
        train_dataset=cut_rows(model.tokenizer, data, limit),
        loss=make_losses(model, settings, data),
        evaluator=evaluator(model, config) if follow else None,
        callbacks=[TrainingClock(), best],
    )
    trainer.own_negatives, trainer.neighbourhoods = data.own_negatives, data.neighbourhoods
    if follow:
        start = dev_score(model, config)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    done = None if last is None else TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))
    if last is not None and done is not None and done.global_step >= settings.max_steps:
        trainer.state = done
        trainer._load_from_checkpoint(last)
    else:
        trainer.train(resume_from_checkpoint=last)
    best.restore()
    history = trainer.state.log_history
    seconds = seconds_of(history)
    if output is not None:
        save(model, output, config, seconds, learning_rate)
    curve = dev_curve(history, settings.batch_size * settings.gradient_accumulation, "eval_spearman_cosine")
    return Trained(model, seconds, [(0, 0.0, start), *curve] if follow else [])


def save(model: SentenceTransformer, output: Path, config: RunConfig, seconds: float, learning_rate: float) -> None:
    """Write the adapter and the facts of its training."""
    output.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(adapted(model), adapter_name=ADAPTER)
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, output / WEIGHTS)
    write_facts(
        output,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=config.training.max_steps,
        examples=config.training.max_steps * config.training.batch_size * config.training.gradient_accumulation,
        seconds=seconds,
        learning_rate=learning_rate,
        max_text_tokens=config.model.max_text_tokens,
    )


def _arguments(
    config: RunConfig, data: TrainingData, learning_rate: float, checkpoints: Path, *, save: bool, follow: bool
) -> SentenceTransformerTrainingArguments:
    settings = config.training
    prompts = {name: {column: prompt(i) for column, i in columns.items()} for name, columns in data.prompts.items()}
    own = {
        "output_dir": str(checkpoints),
        "learning_rate": learning_rate,
        "max_grad_norm": settings.arguments.get("max_grad_norm", 1.0),
        "eval_strategy": "steps" if follow else "no",
        "eval_steps": config.evaluation.every_steps if follow else None,
        "save_strategy": "steps" if save else "no",
        "save_steps": config.evaluation.every_steps if follow else 25,
        "save_total_limit": 1,
        "prompts": prompts,
        "use_cpu": not torch.cuda.is_available(),
    }
    arguments = SentenceTransformerTrainingArguments(**{**shared_arguments(settings), **own})
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def load(llm: str, adapter: Path, dtype: torch.dtype, device: str) -> SentenceTransformer:
    """Open a saved adapter on its LLM."""
    model = build(llm, dtype, device)
    set_peft_model_state_dict(adapted(model), load_file(adapter / WEIGHTS), adapter_name=ADAPTER)
    model.max_seq_length = (read_facts(adapter) or {})["max_text_tokens"] + INSTRUCTION_TOKENS
    return model


def encoder(config: RunConfig, adapter: Path, name: str, revision: str) -> evaluation.InstructedEncoder:
    """A saved adapter for mteb, instructions glued before the texts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(config.model.backbone, adapter, resolve_dtype(config.model.dtype, device), device)
    limit = config.model.max_text_tokens

    def wrap(text: str, instruction: str) -> str:
        return TEMPLATE.format(instruction=instruction, text=cut(model.tokenizer, [text], limit)[0])

    return evaluation.InstructedEncoder(
        model,
        name,
        revision,
        wrap=wrap,
        document_instruction=config.model.document_instruction,
        training=read_facts(adapter),
    )


def adapted(model: SentenceTransformer) -> Any:
    return model[0].model
