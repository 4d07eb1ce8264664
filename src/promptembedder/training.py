"""Training: sentence-transformers' trainer and losses; ours are the soft-prompt leaf and the warm start.

Shapes: N instructions, K soft tokens, C cue tokens, P prompter width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.util.distributed import distributed_evaluation
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from promptembedder import widened, workers
from promptembedder.config import EvaluationConfig, RunConfig, TrainingConfig, WarmStartConfig, dump_yaml
from promptembedder.data import TrainingData, load_training_data, read_scored_pairs
from promptembedder.errors import PromptEmbedderError
from promptembedder.model import build, refuse_foreign, save, soft_prompt_module
from promptembedder.module import SoftPromptLeaves, SoftPromptTransformer
from promptembedder.text_cache import TextStateCache, open_text_cache

logger = logging.getLogger(__name__)

# Facts of a run, beside the model it saved: trained_parameters, steps, examples, and seconds of warm start and steps.
TRAINING_FACTS = "training.json"
_DEV_METRIC = "eval_dev_spearman_cosine"


@dataclass(frozen=True)
class TrainingResult:
    """What a run made.

    Attributes:
        model: the trained model; the best on dev where dev is given.
        folder: where it was saved.
        scores: `dev` and `test`, Spearman x 100, where the files are given.
        steps: optimizer steps taken.
        seconds: wall time of the optimizer steps and evaluations between them.
        history: the trainer's log lines.
        text_state_hit_rate: share of the texts whose states were found, with `text_state_cache`.
    """

    model: SentenceTransformer
    folder: Path
    scores: dict[str, float]
    steps: int
    seconds: float
    history: list[dict[str, Any]]
    text_state_hit_rate: float | None = None


class SoftPromptLeafCallback(TrainerCallback):  # type: ignore[misc]
    """Runs prompter and alignment once per instruction and optimizer step (see `SoftPromptLeaves`).

    The trainer clips before its pre-step hook, when prompter and alignment have no gradient yet, so clipping is
    done here. With several workers the gradients of the soft prompts are summed here too, in place of those of the
    trained weights.

    Args:
        module: the model's first module.
        max_grad_norm: gradients of all trained weights together are clipped to this norm.
        instructions: all that training can meet, the same on every worker; needed with several workers only.

    Attributes:
        trainer: to be set before training; its wrapper for several workers is told not to sum gradients itself.
    """

    trainer: SentenceTransformerTrainer | None = None

    def __init__(self, module: SoftPromptTransformer, max_grad_norm: float, instructions: Sequence[str] = ()) -> None:
        self._module = module
        self._max_grad_norm = max_grad_norm
        self._instructions = instructions
        self._trained: list[nn.Parameter] = []
        self._elsewhere: list[nn.Parameter] = []
        # Prompts conditioned on texts are no leaves: their gradients go the wrapper's way.
        self._summed_here = workers.count() > 1 and module.settings.condition_on == "instruction"
        self._exchanged: dict[str, int] = {}
        self.grad_norm = 0.0

    def on_train_begin(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Start sharing soft prompts."""
        self._module.leaves = SoftPromptLeaves()
        ours = {id(parameter) for parameter in self._module.parameters()}
        self._trained = [p for p in (model or self._module).parameters() if p.requires_grad]
        self._elsewhere = [p for p in self._trained if id(p) not in ours]  # such as a linear head's
        if self._summed_here:
            if self.trainer is None or not self._instructions:
                raise PromptEmbedderError("with several workers SoftPromptLeafCallback needs instructions and trainer")
            if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
                self.trainer.model_wrapped.require_backward_grad_sync = False

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One backward through alignment and prompter for everything the step added up."""
        leaves = self._module.leaves
        assert leaves is not None
        if self._summed_here:
            gradients = workers.sum_soft_prompt_gradients(self._module, self._instructions)
            gradients += workers.average_gradients(self._elsewhere)
            self._exchanged = {"soft_prompt_gradient_bytes": gradients, "embedding_bytes": leaves.embedding_bytes}
        leaves.embedding_bytes = 0
        leaves.backward()
        self.grad_norm = float(nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Report the gradient norm in place of the trainer's, which was taken too early, and what is ours to tell."""
        if logs is not None and "grad_norm" in logs:
            more: dict[str, Any] = {"grad_norm": self.grad_norm, **self._exchanged}
            if self._module.backbone.text_cache is not None:
                more["text_state_hit_rate"] = round(self._module.backbone.text_cache.hit_rate, 4)
            logs.update(more)
            state.log_history[-1].update(more)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop sharing."""
        self._module.leaves = None


class TrainingClock(TrainerCallback):  # type: ignore[misc]
    """Adds to every log line the seconds spent in optimizer steps so far, `step_seconds`; evaluations are left out.

    Args:
        spent: seconds of what came before the first step. A run that goes on counts from its last log line instead.
    """

    def __init__(self, spent: float = 0.0) -> None:
        self.spent = spent
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from what an earlier part of the run took."""
        self.spent = max([self.spent, *(line.get("step_seconds", 0.0) for line in state.log_history)])

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.spent += time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the time down."""
        if logs is not None:
            logs["step_seconds"] = state.log_history[-1]["step_seconds"] = round(self.spent, 2)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    model: SentenceTransformer | None = None,
    data: TrainingData | None = None,
    loss: nn.Module | None = None,
) -> TrainingResult:
    """Train a model, save it to `<output>/model` and score it.

    Args:
        config: all settings.
        resume: go on from the last checkpoint in `<output>`.
        model: start from this one instead of building `config.model`.
        data: train on these rows instead of `config.data`'s.
        loss: in place of the one that the settings name.

    Raises:
        PromptEmbedderError: bad data or settings; nothing to resume from; output not writable.
    """
    settings = config.training
    output = Path(settings.output)
    checkpoint = get_last_checkpoint(str(output)) if resume and output.is_dir() else None
    if resume and checkpoint is None:
        raise PromptEmbedderError(f"nothing to resume: {output} holds no checkpoint")
    if not (settings.train_prompter or settings.train_alignment):
        raise PromptEmbedderError("nothing to train: training.train_prompter and training.train_alignment are both off")
    if settings.early_stop_patience is not None and config.evaluation.dev is None:
        raise PromptEmbedderError("training.early_stop_patience needs evaluation.dev")
    layout = config.model.layout if model is None else soft_prompt_module(model).settings.layout
    if settings.text_state_cache is not None and layout != "suffix":
        raise PromptEmbedderError(
            f"training.text_state_cache needs model.layout 'suffix', found {layout!r}: there a text's states depend on "
            "the soft prompt"
        )
    if settings.text_state_folder is not None and settings.text_state_cache is None:
        raise PromptEmbedderError("training.text_state_folder needs training.text_state_cache, its size")
    refuse_foreign(output / "model")
    if data is None:
        data = load_training_data(config.data, config.model.document_instruction, settings.seed)
    evaluation, root = config.evaluation, config.data.root
    dev, test = pair_evaluator(evaluation, root, "dev"), pair_evaluator(evaluation, root, "test")
    workers.check(settings.batch_size, {name: len(rows) for name, rows in data.datasets.items()})
    _make_folder(output)
    if model is None:
        model = build(config.model, device=workers.device(), seed=settings.seed)
    module = soft_prompt_module(model)
    cache = _text_cache(module, settings)
    loss = loss or make_loss(model, settings)
    module.alignment.requires_grad_(settings.train_alignment)
    module.prompter.lm.requires_grad_(settings.train_prompter and config.model.prompter_training == "full")
    if settings.train_prompter and config.model.prompter_training == "lora":
        for name, parameter in module.prompter.lm.named_parameters():
            parameter.requires_grad_("lora_" in name)
    began = time.perf_counter()
    if settings.train_prompter and settings.warm_start.steps and checkpoint is None:
        known = {*data.instructions, config.evaluation.instruction, module.settings.default_instruction}
        warm_start(module, sorted(known), settings.warm_start, settings.seed)
    clock = TrainingClock(time.perf_counter() - began)
    trainer = _trainer(model, module, config, data, loss, dev, output, clock)
    with workers.stopping_together():
        module.backbone.text_cache = cache
        module.training_text_tokens = config.data.max_text_tokens
        try:
            outcome = trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            module.backbone.text_cache = None
            module.leaves = None
            module.training_text_tokens = None
        folder = output / "model"
        if workers.number() == 0:
            save(model, folder)
            (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
            facts = {
                "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
                "steps": trainer.state.global_step,
                "examples": trainer.state.global_step * settings.batch_size * settings.gradient_accumulation,
                "seconds": round(clock.spent, 1),
            }
            (folder / TRAINING_FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        scores: dict[str, float] = {}
        if dev is not None and trainer.state.best_metric is not None:
            scores["dev"] = 100 * trainer.state.best_metric
        with distributed_evaluation(model) as mine:
            if test is not None and mine:
                scores["test"] = 100 * test(model)["test_spearman_cosine"]
    steps, seconds = trainer.state.global_step, outcome.metrics["train_runtime"]
    hit_rate = None if cache is None else cache.hit_rate
    return TrainingResult(model, folder, scores, steps, seconds, trainer.state.log_history, hit_rate)


def warm_start(
    module: SoftPromptTransformer, instructions: Sequence[str], config: WarmStartConfig, seed: int, batch_size: int = 4
) -> float:
    """Teach the prompter to write a known good cue, whatever the instruction; the backbone is not run.

    Generation runs as always, each mixture fed back; the loss is the cross entropy of every soft token's mixture
    with the cue token at its place. A peaked mixture is a token embedding, so the model starts as the hard cue.

    Args:
        module: the model's first module.
        instructions: those to fit on.
        config: see `WarmStartConfig`.
        seed: draws the instructions of a step.
        batch_size: instructions per step.

    Returns:
        The smallest weight that a cue token has in its mixture at the end.

    Raises:
        PromptEmbedderError: the cue has fewer than K tokens.
    """
    K = module.settings.num_soft_tokens
    if config.cue_tokens is not None and config.cue_tokens > K:
        raise PromptEmbedderError(f"warm_start.cue_tokens = {config.cue_tokens} of {K} soft tokens")
    C = config.cue_tokens or K
    ids = module.prompter.tokenizer(" " + config.cue.strip(), add_special_tokens=False)["input_ids"]
    if len(ids) < C:
        raise PromptEmbedderError(f"warm_start.cue has {len(ids)} tokens for {C} soft tokens; give a longer one")
    device = module.alignment.weight.device
    cue_C = torch.tensor(ids[-C:], device=device)
    trained = [p for p in module.prompter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    drawn = random.Random(seed)
    reached = 0.0
    bar = tqdm(range(config.steps), desc="Warm start", disable=workers.number() > 0)
    for _ in bar:
        picked = drawn.sample(list(instructions), min(batch_size, len(instructions)))
        ids_NS, mask_NS = module.prompter.tokenize(picked)
        logits_NKV = module.prompter(ids_NS.to(device), mask_NS.to(device)).logits_NKV
        log_weights_NCV = torch.log_softmax(logits_NKV[:, -C:] / module.prompter.temperature, dim=-1)
        cue_NC = log_weights_NCV.gather(-1, cue_C.expand(len(picked), -1)[..., None])[..., 0]
        reached = float(cue_NC.detach().min().exp())
        bar.set_postfix(cue_weight=f"{reached:.2f}")
        if reached >= config.target_probability:
            bar.close()
            break
        optimizer.zero_grad()
        torch.autograd.backward(-cue_NC.mean())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return reached


def make_loss(model: SentenceTransformer, config: TrainingConfig) -> nn.Module:
    """The library's loss that the settings name: in-batch InfoNCE, cached, masked, Matryoshka."""
    scale = 1.0 / config.temperature
    shared = workers.count() > 1
    loss: nn.Module
    if config.mask_false_negatives and config.loss == "cached_infonce":
        loss = losses.CachedGISTEmbedLoss(
            model,
            guide=model,
            temperature=config.temperature,
            mini_batch_size=config.mini_batch_size,
            contrast_anchors=False,
            contrast_positives=False,
            gather_across_devices=shared,
        )
    elif config.mask_false_negatives:
        loss = losses.GISTEmbedLoss(
            model,
            guide=model,
            temperature=config.temperature,
            contrast_anchors=False,
            contrast_positives=False,
            gather_across_devices=shared,
        )
    elif config.loss == "cached_infonce":
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=config.mini_batch_size, gather_across_devices=shared
        )
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale=scale, gather_across_devices=shared)
    if config.matryoshka_dims:
        width = model.get_embedding_dimension()
        if width is not None and max(config.matryoshka_dims) > width:
            raise PromptEmbedderError(
                f"training.matryoshka_dims holds {max(config.matryoshka_dims)}, the embedding has {width} dimensions"
            )
        loss = losses.MatryoshkaLoss(model, loss, matryoshka_dims=sorted({*config.matryoshka_dims}, reverse=True))
    return loss


def _trainer(
    model: SentenceTransformer,
    module: SoftPromptTransformer,
    config: RunConfig,
    data: TrainingData,
    loss: nn.Module,
    dev: EmbeddingSimilarityEvaluator | None,
    output: Path,
    clock: TrainingClock,
) -> SentenceTransformerTrainer:
    settings = config.training
    every = config.evaluation.every_steps
    several = workers.count() > 1
    known = {*data.instructions, module.settings.default_instruction, module.settings.document_instruction}
    leaf = SoftPromptLeafCallback(module, settings.max_grad_norm, sorted(known))
    callbacks: list[TrainerCallback] = [*([leaf] if settings.soft_prompt_leaf else []), clock]
    if settings.early_stop_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stop_patience))
    # The library would draw examples for a hub page before every training, with a progress bar of their own.
    model.model_card_data.generate_widget_examples = False
    model.model_card_data.widget = [{"text": next(iter(data.datasets.values()))[0]["anchor"]}]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.prompter_learning_rate,
        learning_rate_mapping={r"alignment\.weight$": settings.alignment_learning_rate},
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        max_grad_norm=0.0 if settings.soft_prompt_leaf else settings.max_grad_norm,  # the leaf callback clips itself
        logging_steps=settings.logging_steps,
        eval_strategy="steps" if dev is not None else "no",
        eval_steps=every if dev is not None else None,
        save_strategy="steps",
        save_steps=every if dev is not None else settings.save_every_steps or every,
        save_total_limit=settings.keep_checkpoints,
        load_best_model_at_end=dev is not None,
        metric_for_best_model=_DEV_METRIC if dev is not None else None,
        greater_is_better=True if dev is not None else None,
        prompts=data.prompts,
        batch_sampler="no_duplicates",
        multi_dataset_batch_sampler="proportional",
        # Workers cut every batch among them, so that it keeps to one instruction; a short one cannot be cut.
        dataloader_drop_last=several,
        accelerator_config={"split_batches": several},
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=["tensorboard"],
    )
    # Several accelerators without a launcher: one is used. Replicas in threads cannot share the step's leaves.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data.datasets,
        loss=loss,
        evaluator=dev,
        callbacks=callbacks,
    )
    leaf.trainer = trainer
    if leaf in trainer.callback_handler.callbacks:  # before TensorBoard's, which would log what is not yet right
        trainer.callback_handler.callbacks.remove(leaf)
        trainer.callback_handler.callbacks.insert(0, leaf)
    return trainer


def _text_cache(module: SoftPromptTransformer, settings: TrainingConfig) -> TextStateCache | None:
    if settings.text_state_cache is None:
        return None
    backbone = module.backbone
    shape = hashlib.sha256(backbone.lm.config.to_json_string().encode()).hexdigest()
    return open_text_cache(
        settings.text_state_cache,
        identity=f"{module.base_models.backbone_fingerprint} {shape} {backbone.lm.dtype} {backbone.text_pass} "
        f"widened={widened.helps(backbone.lm)}",
        precision=settings.text_state_precision,
        folder=settings.text_state_folder,
        worker=workers.local_number(),
        workers=workers.local_count(),
    )


def pair_evaluator(
    config: EvaluationConfig, root: str | None, part: Literal["dev", "test"]
) -> EmbeddingSimilarityEvaluator | None:
    """The library's evaluator of the dev or test pairs, told to embed both sentences under the instruction.

    None where the settings name no file for the part. Of dev the first `dev_pairs` pairs count, evenly spread.
    """
    path, at_most = (config.dev, config.dev_pairs) if part == "dev" else (config.test, None)
    if path is None:
        return None
    first, second, scores = read_scored_pairs(path, root)
    if at_most is not None and at_most < len(scores):
        picked = [n * len(scores) // at_most for n in range(at_most)]
        first, second = [first[n] for n in picked], [second[n] for n in picked]
        scores = [scores[n] for n in picked]
    evaluator = EmbeddingSimilarityEvaluator(
        first, second, scores, batch_size=config.batch_size, main_similarity="cosine", name=part, write_csv=False
    )
    embed = evaluator.embed_inputs
    evaluator.embed_inputs = lambda model, sentences, **options: embed(
        model, sentences, prompt=config.instruction, **options
    )
    return evaluator


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another worker may have been faster
    except OSError as error:
        raise PromptEmbedderError(f"output folder {output} cannot be written: {error.strerror or error}") from error
