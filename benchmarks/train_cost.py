"""Cost of a training step against sentence-transformers with peft LoRA: time, memory, trained parameters.

    python benchmarks/train_cost.py --quick                                  # minutes on two CPU cores
    python benchmarks/train_cost.py --lengths 32 128 512 --rounds 3
    python benchmarks/train_cost.py --device cuda --shape qwen3-4b --dtype bfloat16 --batch 64

Every variant runs in a process of its own, variants take turns over several rounds, ratios are of medians. The peer is
what a user would do instead: the same LLM, LoRA of rank 16 in all linear layers, last-token pooling, the instruction
as text in front; same loss, batch and text lengths. The last line is one JSON object at the middle length.
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
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import Tensor

from promptembedder import ModelConfig, base_models, build
from promptembedder.module import SoftPromptLeaves

INSTRUCTION = "Retrieve sentences that mean the same as the given sentence."
VARIANTS = ("lora", "lora_checkpointing", "prefix", "suffix", "suffix_int8")
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


def lora_model(llm: str, dtype: torch.dtype, device: str, checkpointing: bool) -> SentenceTransformer:
    from peft import LoraConfig

    folder = str(base_models.locate(llm).folder)
    transformer = Transformer(folder, model_kwargs={"dtype": dtype})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device)
    model.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


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


def measure(variant: str, length: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One variant in this process: seconds of each step, bytes of the weights and at the peak."""
    torch.manual_seed(0)
    dtype, device = base_models.resolve_dtype(arguments.dtype, arguments.device), arguments.device
    llm = prompter = "smollm2-135m-instruct"
    if arguments.shape:
        llm = random_llm(arguments.shape, dtype, arguments.scratch)
        prompter = random_llm("qwen3-0.6b", dtype, arguments.scratch)
    name = str(dtype).removeprefix("torch.")
    leaves = None
    if variant.startswith("lora"):
        model = lora_model(llm, dtype, device, variant == "lora_checkpointing")
    else:
        config = ModelConfig(
            prompter=prompter,
            backbone=llm,
            layout="prefix" if variant == "prefix" else "suffix",
            text_pass="int8" if variant == "suffix_int8" else "same",
            dtype=name,
            alignment_start="random" if arguments.shape else "auto",
        )
        model = build(config, device=device)
        leaves = model[0].leaves = SoftPromptLeaves()
    model.train()
    loss = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    head = model.tokenizer(INSTRUCTION)["input_ids"] if variant.startswith("lora") else []
    vocabulary = min(len(model.tokenizer), 40_000)
    generator = torch.Generator().manual_seed(1)

    def column() -> dict[str, Tensor | str]:
        ids = torch.randint(260 if vocabulary > 300 else 1, vocabulary, (arguments.batch, length), generator=generator)
        ids = torch.cat([torch.tensor([head]).expand(arguments.batch, -1).long(), ids], dim=1).to(device)
        features: dict[str, Tensor | str] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return features if head else {**features, "instruction": INSTRUCTION}

    weights = resident_bytes(device, peak=False)
    reset_peak(device)
    seconds = []
    for _ in range(arguments.steps + 1):
        columns = [column(), column()]
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(columns, torch.empty(0)).backward()
        if leaves is not None:
            leaves.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),  # the first step warms up
        "weights_bytes": weights,
        "peak_bytes": resident_bytes(device, peak=True),
        "trained_parameters": sum(p.numel() for p in trained),
    }


def run_all(arguments: argparse.Namespace) -> dict[int, dict[str, dict[str, float]]]:
    """Rounds of processes, one per variant and length; medians over rounds."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    variants = [v for v in VARIANTS if v != "suffix_int8" or arguments.device == "cpu"]
    for n in range(arguments.rounds):
        for length in arguments.lengths:
            for variant in variants:
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
    return {length: {v: median(found[length, v]) for v in variants} for length in arguments.lengths}


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| text tokens | variant | s a step | to LoRA | peak GiB | to LoRA | over weights GiB | to LoRA | trained |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for length, rows in results.items():
        peer = rows["lora"]
        for variant, row in rows.items():
            over, peer_over = (r["peak_bytes"] - r["weights_bytes"] for r in (row, peer))
            lines.append(
                f"| {length} | {variant} | {row['seconds']:.2f} | {row['seconds'] / peer['seconds']:.2f} "
                f"| {row['peak_bytes'] / 2**30:.2f} | {row['peak_bytes'] / peer['peak_bytes']:.2f} "
                f"| {over / 2**30:.2f} | {over / peer_over:.2f} | {row['trained_parameters'] / 1e6:.1f} M |"
            )
    return "\n".join(lines)


def summary(results: dict[int, dict[str, dict[str, float]]]) -> dict[str, Any]:
    lengths = sorted(results)
    rows = results[128 if 128 in results else lengths[len(lengths) // 2]]
    peer, ours = rows["lora"], rows["suffix"]
    over, peer_over = (r["peak_bytes"] - r["weights_bytes"] for r in (ours, peer))
    figures: dict[str, Any] = {
        "speedup": round(peer["seconds"] / ours["seconds"], 2),
        "speedup_int8": round(peer["seconds"] / rows["suffix_int8"]["seconds"], 2) if "suffix_int8" in rows else None,
        "memory_ratio": round(ours["peak_bytes"] / peer["peak_bytes"], 3),
        "memory_over_weights_ratio": round(over / peer_over, 3),
    }
    if len(lengths) > 1:
        growth = {v: results[lengths[-1]][v]["peak_bytes"] - results[lengths[0]][v]["peak_bytes"] for v in rows}
        figures["memory_growth_ratio"] = round(growth["suffix"] / growth["lora"], 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape; unset: SmolLM2-135M")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=32, help="pairs")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="batch 8, one round of one step at 32 and 128 tokens")
    parser.add_argument("--output", type=Path, help="write NAME.json and NAME.md")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "promptembedder-shapes")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batch, arguments.steps, arguments.rounds, arguments.lengths = 8, 1, 1, [32, 128]
    if arguments.worker:
        print(json.dumps(measure(arguments.worker[0], int(arguments.worker[1]), arguments)))
        return
    results = run_all(arguments)
    print(table(results))
    figures = summary(results)
    if arguments.output:
        settings = {k: str(v) for k, v in vars(arguments).items() if k not in ("worker", "output")}
        record = {"settings": settings, "results": results, "summary": figures}
        arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(results) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
