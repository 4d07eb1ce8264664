"""Several workers under `torchrun` or `accelerate launch`: who we are, and what they tell each other.

Workers share every batch. Only the gradients of soft prompts are summed, N x K x D numbers a step, whatever the size
of prompter and backbone; every worker then does the same small backward and stays in step with the others.

Shapes: N instructions of the step, I instructions known, K soft tokens, D backbone width.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from promptembedder.errors import PromptEmbedderError
from promptembedder.model.module import SoftPromptTransformer

logger = logging.getLogger(__name__)


_GO_ON = "go on from the last checkpoint with --resume"


def count() -> int:
    """How many workers there are; 1 outside a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """This worker's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def device() -> str | None:
    """The accelerator of this worker; None leaves the choice to the library."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if count() > 1 and torch.cuda.is_available() else None


def local_count() -> int:
    """How many workers this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def local_number() -> int:
    """This worker's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", number()))


def check(batch_size: int, rows: Mapping[str, int]) -> None:
    """Refuse what cannot be shared among the workers.

    Args:
        batch_size: pairs of a forward over all workers.
        rows: how many each dataset has; a dataset has one instruction.

    Raises:
        PromptEmbedderError: the batch cannot be cut into equal parts, or no dataset fills one batch.
    """
    if count() == 1:
        return
    if batch_size % count() or batch_size < 2 * count():
        raise PromptEmbedderError(
            f"training.batch_size = {batch_size} cannot be shared by {count()} workers: "
            f"give a multiple of {count()}, at least {2 * count()}"
        )
    if max(rows.values()) < batch_size:
        raise PromptEmbedderError(
            f"{count()} workers share full batches of {batch_size} rows of one instruction, but none has more than "
            f"{max(rows.values())} rows: give more rows, fewer workers or a smaller training.batch_size"
        )
    short = [name for name, number_of_rows in rows.items() if number_of_rows < batch_size]
    if short and number() == 0:
        logger.warning("fewer rows than a batch of %d, so left out: %s", batch_size, ", ".join(short))


def sum_soft_prompt_gradients(module: SoftPromptTransformer, instructions: Sequence[str]) -> int:
    """Add up the gradients of the step's soft prompts over all workers, divided by their number.

    Args:
        module: the leaves of its training state hold this worker's gradients.
        instructions: all that can occur, in the same order on every worker.

    Returns:
        Bytes that this worker gave to the others.

    Raises:
        PromptEmbedderError: an instruction of this step is not among `instructions`.
    """
    leaves = module.training_state.leaves
    assert leaves is not None
    if unknown := leaves.instructions - set(instructions):
        raise PromptEmbedderError(f"worker {number()} met instructions that the others do not know: {sorted(unknown)}")
    place = module.alignment.weight.device
    used_I = torch.tensor([leaves.has_gradient(name) for name in instructions], dtype=torch.uint8, device=place)
    dist.all_reduce(used_I, op=dist.ReduceOp.MAX)
    names = [name for name, used in zip(instructions, used_I.tolist(), strict=True) if used]
    if not names:
        return used_I.nbytes
    leaf_of = {name: module.soft_prompt(name) for name in names}  # another worker's instruction is made here too
    gradients_NKD = torch.cat([_gradient(leaf_of[name]) for name in names])
    dist.all_reduce(gradients_NKD)
    for name, gradient_KD in zip(names, gradients_NKD / count(), strict=True):
        leaf_of[name].grad = gradient_KD[None]
    return used_I.nbytes + gradients_NKD.nbytes


def average_gradients(parameters: Sequence[nn.Parameter]) -> int:
    """Average the gradients of weights that are no part of a soft prompt; returns the bytes this worker gave."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= count()
    return sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)


@contextmanager
def stopping_together() -> Iterator[None]:
    """Say in one line that another worker is gone, where a collective operation fails or the launcher ends the run.

    Raises:
        PromptEmbedderError: a collective operation failed.
    """
    if count() == 1:
        yield
        return
    atexit.register(_leave)
    with _last_words(f"worker {number()} stops: the launcher ended the run, as it does when a worker died; {_GO_ON}"):
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error):
                why = str(error).splitlines()[0]
                raise PromptEmbedderError(
                    f"worker {number()} stops: another worker died or cannot be reached ({why}); {_GO_ON}"
                ) from error
            raise


def _leave() -> None:
    """End this worker's threads of the process group: left to themselves they may abort the process while it exits.

    A thread that lets go of a Python tensor while the interpreter is taken down aborts. Threads of gloo are ended with
    the group's last reference only, and the trainer's cycles hold some (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


@contextmanager
def _last_words(text: str) -> Iterator[None]:
    """Print a line and exit on SIGTERM, also while the main thread waits inside a collective operation.

    After an error this stays so: the worker is on its way out, and the launcher's signal may overtake its message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Looked up now: torch's excepthook puts a buffer in its place while it formats a traceback.
    stderr = sys.stderr

    def listen() -> None:
        while byte := os.read(reading, 1):
            if byte[0] == signal.SIGTERM:
                print(f"promptembedder: {text}", file=stderr, flush=True)
                os._exit(1)

    # Python runs handlers in the main thread only, which may be waiting; the byte gets through at once.
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    yield
    signal.set_wakeup_fd(descriptor)
    signal.signal(signal.SIGTERM, handler)
    os.close(writing)  # ends the thread


def _gradient(leaf_NKD: Tensor) -> Tensor:
    return torch.zeros_like(leaf_NKD) if leaf_NKD.grad is None else leaf_NKD.grad
