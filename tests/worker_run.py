"""What every worker of `test_workers.py` runs: train, then write down its own weights."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from promptembedder.config import load_run
from promptembedder.training import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    # What is registered first is called last.
    atexit.register(lambda: print("still in the group" if dist.is_initialized() else "left", file=sys.stderr))
    folder, doomed = Path(sys.argv[1]), sys.argv[2:] == ["dies"]
    if doomed and os.environ["RANK"] == "1":
        from promptembedder.callbacks import SoftPromptLeafCallback

        SoftPromptLeafCallback.on_step_end = lambda *a, **k: os._exit(9)
    result = train(load_run(folder / "run.yaml"))
    weights = {n: p.detach().contiguous() for n, p in result.model.named_parameters() if p.requires_grad}
    save_file(weights, folder / f"worker-{os.environ.get('RANK', '0')}.safetensors")
