"""Matrix products of the LLM's shapes in float32, bfloat16 and dynamic int8 on this CPU: GFLOP/s and ratios.

python benchmarks/cpu_precision.py
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

ROWS, IN, OUT = 1024, 576, 1536  # tokens of a chunk, SmolLM2-135M's width and MLP width


def gflops(run: Callable[[], object], rounds: int = 30) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 2 * ROWS * IN * OUT / statistics.median(times) / 1e9


def main() -> None:
    warnings.simplefilter("ignore")
    results = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            x, linear = torch.randn(ROWS, IN, dtype=dtype), nn.Linear(IN, OUT, bias=False, dtype=dtype)
            results[str(dtype).removeprefix("torch.")] = gflops(partial(linear, x))
        plain = nn.Sequential(nn.Linear(IN, OUT, bias=False))
        packed = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
        x = torch.randn(ROWS, IN)
        results["int8"] = gflops(partial(packed, x))
    ratios = {name: round(value / results["float32"], 2) for name, value in results.items()}
    cpu = torch.cpu.get_capabilities()
    native = {name: cpu.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx512_vnni")}
    print(json.dumps({"gflops": {k: round(v) for k, v in results.items()}, "to_float32": ratios, "cpu": native}))


if __name__ == "__main__":
    main()
