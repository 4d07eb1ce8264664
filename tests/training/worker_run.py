"""What every worker of `test_workers.py` runs: train, then write down its own weights."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from promptembedder.training.settings import load_run
from promptembedder.training.train import train


def gloo_threads() -> list[str]:
    """Names of the threads that exchange tensors; where the system does not tell, none."""
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it may end meanwhile
            names.append(file.read_text().strip())
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, doomed = Path(sys.argv[1]), sys.argv[2:] == ["dies"]
    # What is registered first is called last. A file each: what workers print at a time gets mixed.
    at_exit = folder / f"at-exit-{os.environ.get('RANK', '0')}"
    atexit.register(lambda: at_exit.write_text(f"{gloo_threads()} {dist.is_initialized()}"))
    if doomed and os.environ["RANK"] == "1":
        from promptembedder.training.callbacks import SoftPromptLeafCallback

        SoftPromptLeafCallback.on_step_end = lambda *a, **k: os._exit(9)
    result = train(load_run(folder / "run.yaml"))
    weights = {n: p.detach().contiguous() for n, p in result.model.named_parameters() if p.requires_grad}
    if os.environ.get("RANK", "0") == "0":
        print(result.history)
    save_file(weights, folder / f"worker-{os.environ.get('RANK', '0')}.safetensors")
