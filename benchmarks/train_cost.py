"""Cost of a training step against sentence-transformers with peft LoRA: time, memory, bytes between workers.

    python benchmarks/train_cost.py --quick                                  # minutes on two CPU cores
    python benchmarks/train_cost.py --lengths 32 128 512 --batch 8 --rounds 3 --output benchmarks/results/cpu
    python benchmarks/train_cost.py --device cuda --shape qwen3-4b --dtype bfloat16 --batch 64 --lengths 128 512

Every variant runs in a process of its own, variants take turns over several rounds, ratios are of medians. The peer is
what a user would do instead: the same LLM, LoRA of rank 16 in all linear layers, last-token pooling, the instruction
as text in front; same loss, batch and text lengths. `suffix_cached` is a step of a later epoch, its texts' states in
memory (they count). `frozen_prompter` is a step of the second stage: W, a deep soft prompt and a linear head are
trained, the prompter is not. The last line is one JSON object, at 128 text tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses
from torch import Tensor

import lora
from kept_results import command
from promptembedder import ModelConfig, atomic, build
from promptembedder.llms.device import resolve_dtype
from promptembedder.llms.state_cache import open_text_cache
from promptembedder.llms.tokens import plain_ids
from promptembedder.model.leaves import SoftPromptLeaves, TrainingState
from promptembedder.model.module import SoftPromptTransformer
from promptembedder.model.settings import Precision

INSTRUCTION = "Retrieve sentences that mean the same as the given sentence."
FROZEN = ("frozen_prompter", "frozen_prompter_cached")
VARIANTS = ("lora", "lora_checkpointing", "prefix", "suffix", "suffix_cached", *FROZEN)
WARM_UP_PAIRS = 2
SHAPES = {  # published widths; weights are random, so nothing is downloaded
    "qwen3-0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16},
    "qwen3-4b": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32},
    "qwen3-8b": {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32},
}


def random_llm(shape: str, dtype: torch.dtype, folder: Path) -> str:
    """A folder with a random LLM of a published shape and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    place = folder / f"{shape}-{str(dtype).removeprefix('torch.')}"
    if (place / "config.json").is_file():
        return str(place)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<|end|>": 0} | {c: n + 1 for n, c in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(place)
    config = Qwen3Config(**SHAPES[shape], vocab_size=151_936, num_key_value_heads=8, head_dim=128)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(place)
    return str(place)


def resident_bytes(device: str, peak: bool) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    field = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def frame_ids(module: SoftPromptTransformer) -> tuple[list[int], list[int]]:
    """What stands before and after every text in ours: the template's tokens."""
    between = module.preprocess(["x"])["input_ids"][0].tolist()
    text = plain_ids(module.tokenizer, "x")
    start = next(n for n in range(len(between)) if between[n : n + len(text)] == text)
    return between[:start], between[start + len(text) :]


def measure(variant: str, length: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One variant in this process: seconds of each step, bytes of the weights and at the peak."""
    torch.manual_seed(0)
    dtype, device = resolve_dtype(arguments.dtype, arguments.device), arguments.device
    llm = prompter = "smollm2-135m-instruct"
    if arguments.shape:
        llm = random_llm(arguments.shape, dtype, arguments.scratch)
        prompter = random_llm("qwen3-0.6b", dtype, arguments.scratch)
    precision: Precision = "bfloat16" if dtype is torch.bfloat16 else "float32"
    leaves = None
    if variant.startswith("lora"):
        model = lora.build(llm, dtype, device, checkpointing=variant == "lora_checkpointing")
    else:
        config = ModelConfig(
            prompter=prompter,
            backbone=llm,
            layout="prefix" if variant == "prefix" else "suffix",
            dtype=precision,
            alignment_start="random" if arguments.shape else "auto",
            deep_rank=32 if variant in FROZEN else None,
            linear_head=variant in FROZEN,
        )
        model = build(config, device=device)
        if variant in FROZEN:
            model[0].prompter.requires_grad_(False)
        leaves = SoftPromptLeaves()
        model[0].training_state = TrainingState(leaves)
    model.train()
    loss = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    peer = variant.startswith("lora")
    # What stands around a text: the instruction in words, or the text template.
    head, tail = (model.tokenizer(INSTRUCTION)["input_ids"], []) if peer else frame_ids(model[0])
    vocabulary = min(len(model.tokenizer), 40_000)
    generator = torch.Generator().manual_seed(1)

    def column() -> dict[str, Any]:
        ids = torch.randint(260 if vocabulary > 300 else 1, vocabulary, (arguments.batch, length), generator=generator)
        before, after = (torch.tensor([part]).expand(arguments.batch, -1).long() for part in (head, tail))
        ids = torch.cat([before, ids, after], dim=1).to(device)
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return features if peer else {**features, "instruction": INSTRUCTION}

    def step(columns: list[dict[str, Any]]) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(columns, torch.empty(0)).backward()
        if leaves is not None:
            leaves.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # A small step first: libraries set themselves up and the optimizer makes its state, which stays.
    columns = [column(), column()]
    step([{k: v[:WARM_UP_PAIRS] if isinstance(v, Tensor) else v for k, v in c.items()} for c in columns])
    optimizer.zero_grad()
    weights = resident_bytes(device, peak=False)
    cached = variant.endswith("_cached")
    if cached:  # the first epoch
        module = model[0]
        cache = open_text_cache(arguments.cache_gib * 2**30, identity="benchmark")
        module.training_state = TrainingState(leaves, cache)
        for features in columns:
            module.backbone.read_text(features["input_ids"], features["attention_mask"], cache)
    reset_peak(device)
    seconds = []
    for n in range(arguments.steps):
        if n and not cached:
            columns = [column(), column()]
        seconds.append(step(columns))
    if cached and cache.misses > 2 * arguments.batch:
        sys.exit(f"--cache-gib {arguments.cache_gib} is too small for one batch")
    trained_parameters = sum(p.numel() for p in trained)
    K, D = 5, model.get_embedding_dimension()
    if variant in FROZEN:  # a row for each layer, too
        K *= 1 + int(model[0].backbone.lm.config.num_hidden_layers)
    return {
        "seconds": statistics.median(seconds),
        "examples_per_second": arguments.batch / statistics.median(seconds),
        "weights_bytes": weights,
        "peak_bytes": resident_bytes(device, peak=True),
        "trained_parameters": trained_parameters,
        # What workers have to add up each step, float32: the trained weights, or one soft prompt.
        "gradient_bytes": 4 * trained_parameters if leaves is None else 4 * K * D,
    }


def run_all(arguments: argparse.Namespace) -> dict[int, dict[str, dict[str, float]]]:
    """Rounds of processes, one per variant and length; medians over rounds."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for n in range(arguments.rounds):
        for length in arguments.lengths:
            for variant in arguments.variants:
                command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:]]
                run = subprocess.run([*command, "--worker", variant, str(length)], capture_output=True, text=True)
                if run.returncode:
                    sys.exit(f"{variant} at length {length} failed:\n{run.stderr[-2000:]}")
                row = json.loads(run.stdout.splitlines()[-1])
                found.setdefault((length, variant), []).append(row)
                print(f"round {n + 1}  length {length:4}  {variant:20} {row['seconds']:8.2f} s", file=sys.stderr)
    median: Callable[[list[dict[str, float]]], dict[str, float]] = lambda rows: {  # noqa: E731
        key: statistics.median(row[key] for row in rows) for key in rows[0]
    }
    return {length: {v: median(found[length, v]) for v in arguments.variants} for length in arguments.lengths}


def over_weights(row: dict[str, float]) -> float:
    return row["peak_bytes"] - row["weights_bytes"]


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| text tokens | variant | s a step | to LoRA | examples/s | peak GiB | to LoRA | over weights GiB | to LoRA "
        "| trained | to LoRA | gradients exchanged | to LoRA |",
        "| ---: | --- |" + " ---: |" * 11,
    ]
    for length, rows in results.items():
        peer = rows["lora"]
        for variant, row in rows.items():
            trained, exchanged = row["trained_parameters"], row["gradient_bytes"]
            lines.append(
                f"| {length} | {variant} | {row['seconds']:.2f} | {row['seconds'] / peer['seconds']:.2f} "
                f"| {row['examples_per_second']:.2f} "
                f"| {row['peak_bytes'] / 2**30:.2f} | {row['peak_bytes'] / peer['peak_bytes']:.2f} "
                f"| {over_weights(row) / 2**30:.2f} | {over_weights(row) / over_weights(peer):.2f} "
                f"| {trained / 1e6:.1f} M | {trained / peer['trained_parameters']:.2f} "
                f"| {exchanged / 1e3:,.1f} kB | {exchanged / peer['gradient_bytes']:.4f} |"
            )
    if len(results) > 1:
        lengths = sorted(results)
        lines += [
            "",
            f"Growth from {lengths[0]} to {lengths[-1]} text tokens, per token of text length:",
            "",
            "| variant | ms a step | to LoRA | MiB of peak memory | to LoRA |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        seconds, memory = slopes(results, "seconds"), slopes(results, "peak_bytes")
        for v in results[lengths[0]]:
            lines.append(
                f"| {v} | {1e3 * seconds[v]:.1f} | {seconds[v] / seconds['lora']:.2f} "
                f"| {memory[v] / 2**20:.2f} | {memory[v] / memory['lora']:.2f} |"
            )
    return "\n".join(lines)


def slopes(results: dict[int, dict[str, dict[str, float]]], key: str) -> dict[str, float]:
    first, last = min(results), max(results)
    return {v: (results[last][v][key] - results[first][v][key]) / (last - first) for v in results[first]}


def summary(results: dict[int, dict[str, dict[str, float]]]) -> dict[str, Any]:
    lengths = sorted(results)
    rows = results[128 if 128 in results else lengths[len(lengths) // 2]]
    peer, ours = rows["lora"], rows["suffix"]
    figures: dict[str, Any] = {
        "speedup": round(peer["seconds"] / ours["seconds"], 2),
        "speedup_cached": round(peer["seconds"] / rows["suffix_cached"]["seconds"], 2),
        "memory_ratio": round(ours["peak_bytes"] / peer["peak_bytes"], 3),
        "memory_over_weights_ratio": round(over_weights(ours) / over_weights(peer), 3),
    }
    longer = [length for length in lengths if length > 128]
    if 128 in results and longer:
        growth = {v: results[longer[-1]][v]["peak_bytes"] - results[128][v]["peak_bytes"] for v in ("suffix", "lora")}
        figures["memory_growth_ratio"] = round(growth["suffix"] / growth["lora"], 3)
    return figures


def draw(results: dict[int, dict[str, dict[str, float]]], place: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = sorted(results)
    variants = list(results[lengths[0]])
    for n, variant in enumerate(variants):
        places = [i + (n - (len(variants) - 1) / 2) * 0.8 / len(variants) for i in range(len(lengths))]
        rows = [results[length][variant] for length in lengths]
        time_axis.bar(places, [row["seconds"] for row in rows], 0.8 / len(variants), label=variant)
        memory_axis.bar(places, [over_weights(row) / 2**30 for row in rows], 0.8 / len(variants))
    for axis, title in ((time_axis, "seconds a step"), (memory_axis, "peak memory over the weights, GiB")):
        axis.set_title(title)
        axis.set_yscale("log")
        axis.set_xticks(range(len(lengths)), [f"{length} text tokens" for length in lengths])
    time_axis.legend(fontsize="small")
    figure.savefig(place, dpi=120)


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{torch.get_num_threads()} threads, {names[0] if names else 'unknown CPU'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape; unset: SmolLM2-135M")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=32, help="pairs")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=2, help="per process; their median counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=[v for v in VARIANTS if v not in FROZEN], choices=VARIANTS)
    parser.add_argument("--cache-gib", type=int, default=12, help="of suffix_cached")
    help_quick = "batch 8, one round of one step at 32 and 128 tokens, without checkpointing"
    parser.add_argument("--quick", action="store_true", help=help_quick)
    parser.add_argument("--output", type=Path, help="write NAME.json, NAME.md and NAME.png")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "promptembedder-shapes")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if missing := {"lora", "suffix", "suffix_cached"} - set(arguments.variants):
        parser.error(f"--variants must hold {', '.join(sorted(missing))}: ratios need them")
    if arguments.quick:
        arguments.batch, arguments.steps, arguments.rounds, arguments.lengths = 8, 1, 1, [32, 128]
        arguments.variants = [variant for variant in arguments.variants if variant != "lora_checkpointing"]
    if arguments.worker:
        print(json.dumps(measure(arguments.worker[0], int(arguments.worker[1]), arguments)))
        return
    results = run_all(arguments)
    print(table(results))
    figures = summary(results)
    if arguments.output:
        record = {"command": command(), "hardware": hardware(arguments.device), "results": results, "summary": figures}
        atomic.write_text(arguments.output.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
        text = f"`{command()}`, {record['hardware']}\n\n{table(results)}\n\n{json.dumps(figures)}\n"
        atomic.write_text(arguments.output.with_suffix(".md"), text)
        draw(results, arguments.output.with_suffix(".png"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
