"""What hangs on the library's trainer: the soft prompts of a step as leaves, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from promptembedder import progress
from promptembedder.errors import PromptEmbedderError
from promptembedder.model.leaves import SoftPromptLeaves
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.training import workers


class AtFirstStep(TrainerCallback):  # type: ignore[misc]
    """Does something once everything is opened, before the first step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Do it."""
        self._act()


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
        trainer: to be set before training; its wrapper for several workers then sums no gradients itself.
    """

    trainer: SentenceTransformerTrainer | None = None

    def __init__(self, module: SoftPromptTransformer, max_grad_norm: float, instructions: Sequence[str] = ()) -> None:
        self._module = module
        self._max_grad_norm = max_grad_norm
        self._instructions = instructions
        self._trained: list[nn.Parameter] = []
        self._elsewhere: list[nn.Parameter] = []
        self._summed_here = workers.count() > 1
        self._met: list[str] = []
        self._exchanged: dict[str, int] = {}
        self.grad_norm = 0.0

    def on_train_begin(self, args: Any = None, *others: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Start sharing soft prompts."""
        if getattr(args, "fp16", False):
            raise PromptEmbedderError("fp16 scales gradients before SoftPromptLeafCallback makes them: train in bf16")
        if self._module.training_state.leaves is None:  # in a user's own trainer
            self._module.training_state = replace(self._module.training_state, leaves=SoftPromptLeaves())
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
        leaves = self._module.training_state.leaves
        assert leaves is not None
        self._met = sorted(leaves.instructions)
        if self._summed_here:
            gradients = workers.sum_soft_prompt_gradients(self._module, self._instructions)
            self._exchanged = {"soft_prompt_gradient_bytes": gradients, "embedding_bytes": leaves.embedding_bytes}
            if self._elsewhere:
                self._exchanged["other_gradient_bytes"] = workers.average_gradients(self._elsewhere)
        leaves.embedding_bytes = 0
        leaves.backward()
        self.grad_norm = float(nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Report the gradient norm in place of the trainer's, which was taken too early, and what is ours to tell."""
        if logs is not None and "grad_norm" in logs:
            more: dict[str, Any] = {"grad_norm": self.grad_norm, **self._exchanged}
            if self._module.training_state.text_cache is not None:
                more["text_state_hit_rate"] = round(self._module.training_state.text_cache.hit_rate, 4)
            logs.update(more)
            state.log_history[-1].update(more, instructions=self._met)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop sharing."""
        self._module.training_state = replace(self._module.training_state, leaves=None)


class PrompterFreeze(TrainerCallback):  # type: ignore[misc]
    """Trains the prompter in the first steps only: later steps run neither of its passes.

    Args:
        module: the model's first module.
        steps: in which the prompter is trained.
    """

    def __init__(self, module: SoftPromptTransformer, steps: int) -> None:
        self._module = module
        self._steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze it once these steps are done."""
        if state.global_step >= self._steps:
            self._module.prompter.requires_grad_(False)


class TrainingClock(TrainerCallback):  # type: ignore[misc]
    """Adds to every log line the seconds spent in optimizer steps so far, `step_seconds`; evaluations are left out.

    Args:
        spent: seconds of what came before the first step. A run that goes on counts from its last log line instead.

    Attributes:
        spent: seconds so far.
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


class TrainingBar(TrainerCallback):  # type: ignore[misc]
    """One bar over all steps, with the latest loss and dev score; nothing where `progress` shows none."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open it."""
        if state.is_world_process_zero:
            self._bar = progress.bar(desc="Training", total=state.max_steps)
            self._bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show loss and dev score."""
        names = {"loss": "loss", "eval_dev_spearman_cosine": "dev"}
        found = {short: float(logs[name]) for name, short in names.items() if logs and name in logs}
        self._shown |= {name: f"{value:.3f}" for name, value in found.items()}
        if self._bar is not None and found:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close it."""
        if self._bar is not None:
            self._bar.close()
