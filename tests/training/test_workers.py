"""Two workers over gloo: equal to one with the joined batch, in step to the last bit, none left hanging."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import INSTRUCTION
from promptembedder import PromptEmbedderError
from promptembedder.config import dump_yaml
from promptembedder.data.families import FAMILIES
from promptembedder.data.settings import DataConfig
from promptembedder.model.leaves import SoftPromptLeaves, TrainingState
from promptembedder.training import workers

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("worker_run.py")


def run(command, folder, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*command, str(SCRIPT), str(folder), *more], capture_output=True, text=True, env=environment, timeout=550
    )


def torchrun(number):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]


def trained(config, folder, number):
    """The weights of every worker, and what was printed."""
    folder.mkdir()
    config = replace(config, training=replace(config.training, output=str(folder / "run")))
    (folder / "run.yaml").write_text(dump_yaml(config))
    done = run([sys.executable] if number == 1 else torchrun(number), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    # Threads of a group that is not left, or still referenced, abort a process at its exit, now and then.
    assert [(folder / f"at-exit-{n}").read_text() for n in range(number)] == ["[] False"] * number
    return [load_file(folder / f"worker-{n}.safetensors") for n in range(number)], done.stdout


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("suffix", {"loss": "cached_infonce", "mini_batch_size": 2, "gradient_accumulation": 2}),
        ("prefix", {"mask_false_negatives": True, "linear_head": True}),
        ("suffix", {"text_state_cache": 2**20, "text_state_folder": "states"}),
    ],
)
def test_two_workers_equal_one_with_the_joined_batch(run_config, tmp_path, layout, changes):
    changes = dict(changes)
    model = {"layout": layout, "linear_head": changes.pop("linear_head", False)}
    if "text_state_folder" in changes:
        changes["text_state_folder"] = str(tmp_path / "states")
    config = run_config(model=model, batch_size=10, max_steps=4, **changes)
    (one,), printed_by_one = trained(config, tmp_path / "one", 1)
    several, printed = trained(config, tmp_path / "two", 2)
    for name, weight in one.items():
        assert torch.equal(several[0][name], several[1][name]), f"{name}: workers out of step"
        assert torch.allclose(weight, several[0][name], atol=1e-5), name
    assert max(float(weight.abs().max()) for name, weight in one.items() if "lora_B" in name) > 1e-5
    # AdamW hardly sees the size of gradients; their norm does.
    norms, expected = numbers("grad_norm", printed), numbers("grad_norm", printed_by_one)
    assert len(norms) == 4
    assert norms == pytest.approx(expected, rel=1e-3)
    K, D = 5, 32
    flags = 4  # two instructions of the data, two defaults of the model
    instructions = {int(n - flags) // (K * D * 4) for n in numbers("soft_prompt_gradient_bytes", printed)}
    assert instructions <= {1, 2}
    assert all((n - flags) % (K * D * 4) == 0 for n in numbers("soft_prompt_gradient_bytes", printed))
    assert len([n for n in numbers("embedding_bytes", printed) if n > 0]) == 4
    assert set(numbers("other_gradient_bytes", printed)) == ({D * D * 4} if model["linear_head"] else set())
    assert (tmp_path / "two" / "run" / "model" / "alignment.safetensors").is_file()


def test_two_workers_equal_one_without_in_batch_negatives(run_config, tmp_path):
    config = run_config(batch_size=10, max_steps=4, gradient_accumulation=2)
    # Batches that are not full are left out with several workers only: 240 rows of a kind fill theirs.
    made_up = {"contrast_rows": 240 * len(FAMILIES), "contrast_in_batch_negatives": False}
    config = replace(config, data=DataConfig(root=str(tmp_path), **made_up))
    (one,), printed_by_one = trained(config, tmp_path / "one", 1)
    (first, second), printed = trained(config, tmp_path / "two", 2)
    for name, weight in one.items():
        assert torch.equal(first[name], second[name]), f"{name}: workers out of step"
        assert torch.allclose(weight, first[name], atol=1e-5), name
    norms = numbers("grad_norm", printed)
    assert len(norms) == 4
    assert norms == pytest.approx(numbers("grad_norm", printed_by_one), rel=1e-3)


def numbers(name, printed):
    return [float(n) for n in re.findall(rf"'{name}': '?([\d.e-]+)", printed)]


def test_a_worker_that_dies_leaves_nobody_hanging(run_config, tmp_path):
    config = run_config(batch_size=8, max_steps=500, arguments={"save_steps": 500})
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    start = time.monotonic()
    done = run(torchrun(2), tmp_path, "dies")
    assert done.returncode != 0
    assert time.monotonic() - start < 400
    assert re.search(r"worker 0 stops: (the launcher ended the run|another worker died)", done.stderr), done.stderr
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("formatting_a_traceback", [False, True])
def test_last_words_while_the_main_thread_waits_outside_python(formatting_a_traceback):
    """SIGTERM reaches a worker in a collective operation, where no Python handler runs, or in torch's excepthook."""
    code = (
        "import ctypes, io, sys\nfrom promptembedder.training.workers import _last_words\n"
        "with _last_words('the end'):\n"
        f"    sys.stderr = io.StringIO() if {formatting_a_traceback} else sys.stderr\n"
        "    print('ready', flush=True)\n"
        "    while True:\n        ctypes.CDLL(None).sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        start = time.monotonic()
        process.terminate()
        _, printed = process.communicate(timeout=200)
    assert printed == b"promptembedder: the end\n"
    assert process.returncode == 1
    assert time.monotonic() - start < 20


def test_last_words_after_an_error_on_the_way_out():
    """The launcher's signal can come while a worker is still unwinding: the line is printed all the same."""
    code = (
        "import time\nfrom promptembedder.training.workers import _last_words\n"
        "try:\n    with _last_words('the end'):\n        raise RuntimeError\n"
        "except RuntimeError:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        _, printed = process.communicate(timeout=200)
    assert printed == b"promptembedder: the end\n"


@pytest.mark.parametrize(
    ("batch_size", "largest", "number", "message"),
    [
        (5, 100, 2, r"batch_size = 5 cannot be shared by 2 workers: give a multiple of 2, at least 4"),
        (4, 100, 4, r"batch_size = 4 cannot be shared by 4 workers: give a multiple of 4, at least 8"),
        (8, 7, 2, r"2 workers share full batches of 8 rows of one instruction, but none has more than 7 rows"),
    ],
)
def test_more_workers_than_examples(monkeypatch, batch_size, largest, number, message):
    monkeypatch.setenv("WORLD_SIZE", str(number))
    with pytest.raises(PromptEmbedderError, match=message):
        workers.check(batch_size, {"a": largest, "b": 2})


def test_rows_that_fill_no_batch_are_said(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "2")
    workers.check(8, {"many": 100, "few": 7})
    assert "fewer rows than a batch of 8, so left out: few" in caplog.text


def test_one_worker_may_have_any_batch(monkeypatch, caplog):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    workers.check(5, {"a": 3})
    assert not caplog.records  # incomplete batches are trained on, so nothing is said to be left out


def test_an_instruction_only_another_worker_met(tiny_model, monkeypatch):
    """Every worker sends the same gradients through its prompter, also those of instructions it did not meet."""
    module = tiny_model()[0]
    module.training_state = TrainingState(SoftPromptLeaves())
    module.soft_prompt("here").sum().backward()
    reduced = []

    def all_reduce(tensor, op=None):
        reduced.append(tuple(tensor.shape))
        if tensor.dtype == torch.uint8:
            tensor.copy_(torch.tensor([1, 0, 1]))  # the other worker met "there"
        else:
            tensor[1] = 2.0

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setenv("WORLD_SIZE", "2")
    sent = workers.sum_soft_prompt_gradients(module, ["here", "nowhere", "there"])
    assert reduced == [(3,), (2, 5, 32)]
    assert sent == 3 + 2 * 5 * 32 * 4
    assert torch.equal(module.soft_prompt("here").grad, torch.full((1, 5, 32), 0.5))
    assert torch.equal(module.soft_prompt("there").grad, torch.ones(1, 5, 32))
    module.training_state.leaves.backward()
    assert module.alignment.weight.grad is not None


def test_an_instruction_nobody_was_told_of(tiny_model):
    module = tiny_model()[0]
    module.training_state = TrainingState(SoftPromptLeaves())
    module.soft_prompt("surprise").sum().backward()
    with pytest.raises(PromptEmbedderError, match=r"met instructions that the others do not know: \['surprise'\]"):
        workers.sum_soft_prompt_gradients(module, [INSTRUCTION])
