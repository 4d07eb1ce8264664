"""infinity, which serves the backbone of a model alone, for the benchmark of the server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from sentence_transformers import SentenceTransformer

from promptembedder.model.module import soft_prompt_module

NAME = "backbone"
_OPTIONS = [
    *("--engine=torch", "--no-bettertransformer", "--dtype=float32", "--device=cpu", "--no-compile"),
    *("--no-model-warmup", "--url-prefix=/v1", "--host=127.0.0.1", f"--served-model-name={NAME}"),
]
_QUIET = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def write_backbone(model: SentenceTransformer, folder: Path) -> None:
    """The backbone as a plain folder: the last token's hidden state, at length 1."""
    lm = soft_prompt_module(model).backbone.lm
    lm.save_pretrained(folder)
    soft_prompt_module(model).reader.tokenizer.save_pretrained(folder)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    for _, path in modules:
        (folder / path).mkdir(exist_ok=True)
    width = lm.config.hidden_size
    files = {
        # As older versions of transformers read them.
        "config.json": {"torch_dtype": "float32", "rope_theta": lm.config.rope_parameters["rope_theta"]},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "sentence_bert_config.json": {"max_seq_length": 256},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_lasttoken": True,
        },
    }
    for name, settings in files.items():
        known = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(known | settings), encoding="utf-8")
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")


@contextmanager
def infinity(program: str, model: SentenceTransformer) -> Iterator[str]:
    """Address of a server of the backbone; it ends with the block."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / NAME
        write_backbone(model, folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [program, "v2", f"--model-id={folder}", f"--port={port}", *_OPTIONS]
        process = subprocess.Popen(
            command, env=os.environ | _QUIET, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            address = f"http://127.0.0.1:{port}"
            while not _answers(f"{address}/v1/models"):
                assert process.poll() is None, "infinity has ended"
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
