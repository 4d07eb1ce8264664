"""Kill a training (or transfer) at random moments and resume it: it must end as one that was not interrupted.

    python scripts/kill_and_resume.py --kills 50
    python scripts/kill_and_resume.py --kills 10 --transfer

Trains a tiny random model, made here, for 20 steps with a checkpoint after every second one. Half of the kills
(`kill -9`) are spread evenly over the run; the others hit the moment in which a checkpoint is being written. Prints a
line per kill and the largest differences. Ends with exit code 1 if one of them is above 1e-6
(transfer: 1e-5).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.model.folder import BEGUN_FILE
from promptembedder.model.settings import ModelConfig
from promptembedder.model.store import load
from promptembedder.training.checkpoints import COMPLETE_FILE, checkpoints, trouble
from promptembedder.training.settings import EvaluationConfig, RunConfig, TrainingConfig, WarmStartConfig
from promptembedder.training.train import train
from promptembedder.transfer.settings import TransferConfig
from promptembedder.transfer.transfer import transfer

STEPS = 20
EVERY = 2
# A transfer keeps states of texts, which differ in the last bits by the batch that a text is first read in.
ALLOWED = {"training": 1e-6, "transfer": 1e-5}
TEXTS = ["A man plays a guitar.", "The bank raised its rates.", "Two dogs run.", "It rains in the town.", "She reads."]
# Children are forked with the libraries imported, so that kills hit the run and not the imports.
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Job:
    """What is killed: a training, or a transfer of the model it made.

    Attributes:
        place: folder of LLMs, rows and pairs.
        moves: whether it is a transfer.
    """

    place: Path
    moves: bool

    def run(self, output: Path, resume: bool) -> None:
        """Train or transfer to the end; in a process of its own."""
        training: dict[str, Any] = {"output": str(output), "max_steps": STEPS, "batch_size": 4}
        training["arguments"] = {"logging_steps": 1, "save_steps": EVERY, "save_total_limit": 1}
        data = DataConfig(root=str(self.place), files=(DataFile(path="rows.jsonl"),))
        evaluation = EvaluationConfig(dev="pairs.jsonl", every_steps=EVERY)
        if self.moves:
            config = TransferConfig(
                backbone=str(self.place / "other"),
                data=data,
                texts=("texts.txt",),
                training=TrainingConfig(**training),
                evaluation=evaluation,
            )
            transfer(load(self.place / "trained" / "model", device="cpu"), config, resume=resume)
            return
        lm = str(self.place / "lm")
        model = ModelConfig(prompter=lm, backbone=lm, dtype="float32", lora_rank=4)
        settings = TrainingConfig(**training, warm_start=WarmStartConfig(steps=0))
        train(RunConfig(model=model, data=data, training=settings, evaluation=evaluation), resume=resume)

    def start(self, output: Path, resume: bool = False) -> multiprocessing.process.BaseProcess:
        """Begin in a process of its own."""
        process = FORK.Process(target=_quietly, args=(self, output, resume))
        process.start()
        return process

    def finish(self, output: Path, resume: bool = False) -> None:
        """Run to the end in a process of its own."""
        process = self.start(output, resume)
        process.join()
        if process.exitcode != 0:
            sys.exit(f"{output}: {'resumed' if resume else 'whole'} run ended with exit code {process.exitcode}")

    def last_stage(self, output: Path) -> Path:
        """Where the last checkpoints are."""
        return output / "alignment_labelled" if self.moves else output


def _quietly(job: Job, output: Path, resume: bool) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    job.run(output, resume)


def make_lm(folder: Path, width: int, seed: int) -> None:
    """Save a tiny random LLM with its tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    shape = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(
        LlamaConfig(**shape, vocab_size=len(tokenizer), initializer_range=0.12, eos_token_id=0, pad_token_id=0)
    )
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Write rows, plain texts and scored pairs."""
    rows = [
        {"query": f"{TEXTS[n % 5]} {n}", "pos": [f"{n} {TEXTS[n % 5]}"], "instruction": "Find the same meaning."}
        for n in range(40)
    ]
    pairs = [{"sentence1": a, "sentence2": b, "score": i * j} for i, a in enumerate(TEXTS) for j, b in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "texts.txt").write_text("".join(f"{text} {n}\n" for n in range(8) for text in TEXTS))


def losses_of(stage: Path) -> list[float]:
    """The loss of every step, from the last checkpoint."""
    state = json.loads((checkpoints(stage)[-1] / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    """Every weight of the saved models: a transfer saves one after each stage, too."""
    return {
        f"{file.relative_to(output)} {name}": weight.float()
        for file in sorted(output.glob("**/model/**/*.safetensors"))
        for name, weight in load_file(file).items()
    }


def killed(job: Job, output: Path, seconds: float, while_writing: int | None) -> float:
    """Start a run and kill it; seconds that it lived.

    Args:
        job: what is run.
        output: its folder.
        seconds: after which it is killed.
        while_writing: kill it that long after this checkpoint began to be written instead.
    """
    process, began = job.start(output), time.monotonic()
    if while_writing is not None:
        folder = job.last_stage(output) / f"checkpoint-{while_writing}"
        while process.is_alive() and not folder.is_dir():
            time.sleep(0.0005)
        time.sleep(seconds)
    else:
        process.join(seconds)
    process.kill()
    process.join()
    return time.monotonic() - began


def seconds_to_write(job: Job, output: Path) -> float:
    """How long a checkpoint takes from its first file to its mark, in a run of its own."""
    process = job.start(output)
    folder = job.last_stage(output) / f"checkpoint-{EVERY}"
    while process.is_alive() and not folder.is_dir():
        time.sleep(0.0005)
    began = time.monotonic()
    while process.is_alive() and not (folder / COMPLETE_FILE).is_file():
        time.sleep(0.0005)
    found = time.monotonic() - began
    process.kill()
    process.join()
    return found


def found_after_kill(stage: Path) -> str:
    """What the kill left: the newest checkpoint, and whether it is complete."""
    if not (held := checkpoints(stage)):
        return "no checkpoint"
    why = trouble(held[-1])
    return f"{held[-1].name} {'complete' if why is None else 'not complete: ' + why}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--transfer", action="store_true", help="kill a transfer instead of a training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bar()
    drawn = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_lm(folder / "lm", 32, seed=0)
        make_lm(folder / "other", 48, seed=1)
        make_data(folder)
        if arguments.transfer:
            Job(folder, moves=False).finish(folder / "trained")
        job, whole, cut = Job(folder, arguments.transfer), folder / "whole", folder / "cut"
        began = time.monotonic()
        job.finish(whole)
        lasted = time.monotonic() - began
        writing = seconds_to_write(job, folder / "timed")
        expected, weights = losses_of(job.last_stage(whole)), weights_of(whole)
        print(f"whole run: {lasted:.1f} s, {1000 * writing:.0f} ms a checkpoint, final loss {expected[-1]:.8f}")
        by_loss = by_weight = 0.0
        for n in range(arguments.kills):
            # Even ones by the clock, one in each equal part of the run.
            step = drawn.randrange(EVERY, STEPS + 1, EVERY) if n % 2 else None
            after = drawn.random() * writing if n % 2 else lasted * (n + 2 * drawn.random()) / arguments.kills
            lived = killed(job, cut, after, step)
            left = found_after_kill(job.last_stage(cut))
            job.finish(cut, resume=(cut / BEGUN_FILE).is_file())
            losses, others = losses_of(job.last_stage(cut)), weights_of(cut)
            loss = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            weight = max(float((others[name] - weight).abs().max()) for name, weight in weights.items())
            by_loss, by_weight = max(by_loss, loss), max(by_weight, weight)
            print(f"kill {n + 1:3} after {lived:5.2f} s, {left}; final loss {losses[-1]:.8f}", flush=True)
            shutil.rmtree(cut)
    print(f"{arguments.kills} kills; largest difference of a step's loss {by_loss:.1e}, of a weight {by_weight:.1e}")
    sys.exit(max(by_loss, by_weight) > ALLOWED["transfer" if arguments.transfer else "training"])


if __name__ == "__main__":
    main()
