"""Exports in the engines that serve them: agreement with the model, speed beside the bare engine, and size.

    make test-engines  # makes the engines' environments
    python benchmarks/engines.py smollm2-135m --texts FILE --fold FILE --formats onnx sentence-transformers gguf

For each format, engine and precision, over the first 200 texts that the model does not truncate:

- `cosine`: the smallest between the engine's embedding and the model's (of a fold: of the folded soft tokens).
- `texts_s`: texts a second, the texts sent one by one to llama.cpp and ONNX Runtime, all at once to the others.
- `to_bare`: the same divided by that of the same engine and weights, given the texts' tokens alone.
- `mb`: size of the folder.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import promptembedder
from kept_results import command, kept, parser_of, say
from promptembedder import atomic
from promptembedder.data.texts import read_texts
from promptembedder.export.compiled import compile_model, embed_compiled
from promptembedder.export.export import export, format_module
from promptembedder.export.fold import fold
from promptembedder.export.soft_prompt import compiled_model
from promptembedder.llms.tokens import plain_ids
from promptembedder.model.module import soft_prompt_module
from promptembedder.text import composed

ROOT = Path(os.environ.get("PROMPTEMBEDDER_ENGINES") or Path(__file__).parents[1])
NAME = "query"
ENGINES = {
    "sentence-transformers": ("sentence-transformers", "vllm"),
    "gguf": ("llama_cpp",),
    "onnx": ("onnx",),
}
_PLAIN = """
import json, sys, time
job = json.load(sys.stdin)
import torch
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
torch.set_num_threads(job["threads"])
model = SentenceTransformer(job["folder"] + "/" + job["name"], device="cpu")
def timed():
    start = time.perf_counter()
    found = model.encode(job["texts"], batch_size=32)
    return found, time.perf_counter() - start
timed()
found, ours = timed()
model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
assert "promptembedder" not in sys.modules
print("found", json.dumps([found.tolist(), ours, timed()[1]]))
"""
_LLAMA = """
import json, sys, time
import xllamacpp
job = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = job["folder"] + "/model.gguf"
parameters.embedding, parameters.warmup, parameters.verbosity = True, False, -1
parameters.n_parallel, parameters.n_gpu_layers = 1, 0
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
parameters.cache_prompt, parameters.cache_ram_mib = False, 0
parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = job["tokens"]
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(parameters)
def timed(inputs):
    start = time.perf_counter()
    found = [server.handle_embeddings({"input": one})["data"][0]["embedding"] for one in inputs]
    return found, time.perf_counter() - start
timed(job["ids"])
found, ours = timed(job["spelled"])
print("found", json.dumps([found, ours, timed(job["ids"])[1]]))
"""
_ONNX = """
import json, sys, time
import numpy as np
import onnxruntime
from tokenizers import Tokenizer
job = json.load(sys.stdin)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = job["threads"]
tokenizer = Tokenizer.from_file(job["folder"] + "/tokenizer.json")
session = onnxruntime.InferenceSession(job["folder"] + "/onnx/" + job["name"] + ".onnx", options)
def timed():
    start, found = time.perf_counter(), []
    for text in job["texts"]:
        read = tokenizer.encode(text)
        inputs = {"input_ids": np.array([read.ids]), "attention_mask": np.array([read.attention_mask])}
        found.append(session.run(["sentence_embedding"], inputs)[0][0].tolist())
    return found, time.perf_counter() - start
timed()
print("found", json.dumps([*timed(), None]))
"""


def environment(engine: str) -> Path | None:
    """Python of an engine's environment, if there is one."""
    if engine == "sentence-transformers":
        return Path(sys.executable)
    python = ROOT / f".venv-engines-{engine}" / "bin" / "python"
    return python if python.is_file() else None


def ran(python: Path, code: str, job: dict[str, Any]) -> tuple[np.ndarray, float, float | None]:
    """Embeddings, seconds, and seconds of the bare engine."""
    done = subprocess.run([str(python), "-c", code], input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr[-2000:]}")
    found, ours, bare = json.loads(done.stdout.split("found ")[-1])
    return np.array(found), ours, bare


@contextmanager
def vllm(python: Path, folder: Path, dtype: str) -> Iterator[Callable[[Sequence[Any]], np.ndarray]]:
    """A server of vLLM; gives a function from texts or token ids to embeddings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--runner", "pooling", "--dtype", dtype, "--enforce-eager", "--port", str(port)]
    server = subprocess.Popen(
        [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )

    def embed(inputs: Sequence[Any]) -> np.ndarray:
        body = json.dumps({"input": list(inputs), "truncate_prompt_tokens": -1}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return np.array([one["embedding"] for one in json.load(answer)["data"]])

    try:
        while True:
            if server.poll() is not None:
                sys.exit("vLLM did not start")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield embed
    finally:
        server.terminate()
        server.wait()


def in_vllm(python: Path, job: dict[str, Any], dtype: str) -> tuple[np.ndarray, float, float | None]:
    """As `ran`."""
    with vllm(python, Path(job["folder"]) / job["name"], dtype) as embed:
        embed(job["texts"])
        start = time.perf_counter()
        found = embed(job["texts"])
        ours = time.perf_counter() - start
        start = time.perf_counter()
        embed(job["ids"])
        return found, ours, time.perf_counter() - start


def folded(model: Any, arguments: Any, form: str) -> tuple[Any, dict[str, Any] | None]:
    """The model that a format can hold, and what its fold kept; a fold is made once for all precisions."""
    if not arguments.folding or form == "onnx":
        return model, None
    if form not in arguments.folds:
        compiled = compile_model(model, {NAME: arguments.instruction})
        added = compiled.head_ED is not None or compiled.centre_D is not None
        headless = added and not getattr(format_module(form), "HOLDS_HEAD", True)
        start = time.perf_counter()
        found = fold(model, compiled, arguments.folding, rows=arguments.rows, headless=headless)
        facts = found.facts | {"seconds": time.perf_counter() - start}
        arguments.folds[form] = compiled_model(found.compiled, model), facts
    return arguments.folds[form]  # type: ignore[no-any-return]


def measured(model: Any, arguments: Any, form: str, precision: str | None, texts: list[str]) -> list[dict[str, Any]]:
    """Export once, and run every engine of the format on it."""
    lines = []
    model, fold_facts = folded(model, arguments, form)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        done = export(
            model,
            {NAME: arguments.instruction},
            Path(scratch) / "export",
            to=form,
            precision=precision,
        )
        seconds = time.perf_counter() - start
        expected = embed_compiled(model, done.compiled, NAME, texts).float().cpu().numpy()
        files = [path.stat() for path in done.folder.rglob("*") if path.is_file()]
        size = sum({one.st_ino: one.st_size for one in files}.values()) / 1e6  # instructions share the weights
        job: dict[str, Any] = {
            "folder": str(done.folder),
            "name": NAME,
            "texts": [composed(text) for text in texts],
            "ids": [plain_ids(model.tokenizer, text) for text in texts],
            "threads": torch.get_num_threads(),
            "tokens": done.compiled.max_text_tokens + 256,
        }
        if form == "gguf":
            known = json.loads((done.folder / "instructions.json").read_text())["instructions"][NAME]
            job["spelled"] = [known["prefix"] + text + known["suffix"] for text in job["texts"]]
        for engine in ENGINES[form]:
            python = environment(engine)
            if python is None or (arguments.engines and engine not in arguments.engines):
                say(f"{form}, {engine}: no environment, or not asked for")
                continue
            say(f"{form}, {precision or 'float32'}, {engine}")
            if engine == "vllm":
                found, ours, bare = in_vllm(python, job, precision or "float32")
            else:
                code = {"sentence-transformers": _PLAIN, "llama_cpp": _LLAMA, "onnx": _ONNX}[engine]
                found, ours, bare = ran(python, code, job)
            found = found / np.linalg.norm(found, axis=1, keepdims=True)
            lines.append(
                {
                    "format": form + (" (folded)" if fold_facts else ""),
                    "engine": engine,
                    "precision": done.facts["precision"],
                    "cosine": float((found * expected).sum(1).min()),
                    "texts_s": len(texts) / ours,
                    "to_bare": None if bare is None else bare / ours,
                    "mb": size,
                    "export_seconds": seconds,
                    "fold": fold_facts,
                }
            )
    return lines


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| model | format | engine | precision | smallest cosine | texts a second | to the bare engine | MB |"]
    rows.append("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for name, lines in results.items():
        for line in lines:
            bare = "-" if line["to_bare"] is None else f"{line['to_bare']:.2f}"
            rows.append(
                f"| {name} | {line['format']} | {line['engine']} | {line['precision']} | {line['cosine']:.7f} | "
                f"{line['texts_s']:.1f} | {bare} | {line['mb']:.0f} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Measure one model, and write the table of all that are in the report."""
    parser = parser_of(__doc__, None)
    parser.add_argument("model")
    parser.add_argument("--called", help="name in the table; unset: MODEL")
    parser.add_argument("-i", "--instruction", default="Retrieve sentences that mean the same as the given sentence.")
    parser.add_argument("--texts", required=True, help="200 of these are compared")
    parser.add_argument("--fold", help="plain texts to fold on, for a deep model")
    parser.add_argument("--rows", type=int, help="of a fold")
    parser.add_argument(
        "--formats", nargs="+", default=["sentence-transformers", "gguf", "onnx"], choices=list(ENGINES)
    )
    parser.add_argument("--precisions", nargs="+", help="unset: the format's own")
    parser.add_argument("--engines", nargs="+", help="unset: all that are installed")
    arguments = parser.parse_args()
    arguments.folding = [text for _, text in read_texts(arguments.fold, None, ids=False)] if arguments.fold else []
    arguments.folds = {}
    model = promptembedder.load(arguments.model, device="cpu", dtype="float32")
    limit = soft_prompt_module(model).settings.max_text_tokens
    texts = [text for _, text in read_texts(arguments.texts, None, ids=False)]
    texts = [text for text in texts if len(plain_ids(model.tokenizer, text)) <= limit][:200]
    called = arguments.called or arguments.model
    report = arguments.report or Path("runs/engines")
    results = kept(report / "engines.json", dict) if (report / "engines.json").is_file() else {}
    results.setdefault("commands", []).append(command())
    for form in arguments.formats:
        for precision in arguments.precisions or [None]:
            results.setdefault("models", {}).setdefault(called, []).extend(
                measured(model, arguments, form, precision, texts)
            )
            report.mkdir(parents=True, exist_ok=True)
            atomic.write_text(report / "engines.json", json.dumps(results, indent=1) + "\n")
    say(table(results["models"]))
    commands = "\n".join(f"- `{one}`" for one in results["commands"])
    text = f"# Exports in their engines\n\n{commands}\n\n{table(results['models'])}\n"
    atomic.write_text(report / "report.md", text)


if __name__ == "__main__":
    main()
