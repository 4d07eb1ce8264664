"""llama.cpp embeds with a GGUF file what the model does, from plain strings and from token ids."""

from __future__ import annotations

import json
import re
import subprocess

import numpy as np
import pytest
from gguf import GGUFReader

import promptembedder
from promptembedder import ModelConfig
from promptembedder.export.compiled import compile_model, embed_compiled
from promptembedder.export.gguf_file import write
from promptembedder.export.parity import parity_texts
from promptembedder.llms.tokens import plain_ids
from promptembedder.text import composed
from serving import HARD, SMALL, environment, smallest_cosine

# Reads {"file", "tokens", "inputs"}: inputs are strings, or lists of token ids.
_CODE = """
import json, sys
import xllamacpp
job = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = job["file"]
parameters.embedding, parameters.warmup, parameters.verbosity = True, False, -1
parameters.n_parallel, parameters.n_gpu_layers = 1, 0
parameters.cache_prompt, parameters.cache_ram_mib = False, 0
parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = job["tokens"]
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(parameters)
found = [server.handle_embeddings({"input": one})["data"][0]["embedding"] for one in job["inputs"]]
print("found", json.dumps(found))
"""
_MORE = [f"{n} {word}" for n in range(6) for word in ("it's", "«oui»", "عربية", "👩‍👩‍👧‍👦 7", "\n\nx\t")]


@pytest.fixture(scope="module")
def model():
    return promptembedder.build(ModelConfig(prompter=SMALL, backbone=SMALL, dtype="float32"), device="cpu")


@pytest.mark.parametrize(
    ("precision", "bound"), [("float32", 0.99999), ("float16", 0.9999), ("bfloat16", 0.998), ("q8_0", 0.998)]
)
def test_texts_and_token_ids(model, tmp_path, precision, bound):
    python = environment("llama_cpp") / "bin" / "python"
    compiled = compile_model(model, {"topic": "Find the topic."})
    write(compiled, model, tmp_path, precision=precision)
    limit = compiled.max_text_tokens
    texts = [t for t in HARD if len(plain_ids(model.tokenizer, t)) <= limit]
    texts += [*_MORE, *parity_texts(model, limit)]
    assert len(texts) >= 50
    words = json.loads((tmp_path / "instructions.json").read_text())["instructions"]["topic"]
    known = {word: i for i, word in enumerate(_tokens(tmp_path / "model.gguf"))}
    before, after = ([known[f"<|pe:{w}"] for w in words[side].split("<|pe:")[1:]] for side in ("prefix", "suffix"))
    inputs = [words["prefix"] + composed(text) + words["suffix"] for text in texts]
    inputs += [[*before, *plain_ids(model.tokenizer, text), *after] for text in texts]
    job = {"file": str(tmp_path / "model.gguf"), "tokens": limit + 256, "inputs": inputs}
    ran = subprocess.run([python, "-c", _CODE], input=json.dumps(job), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = np.array(json.loads(ran.stdout.split("found ")[1]))
    expected = embed_compiled(model, compiled, "topic", texts).numpy()
    from_texts, from_ids = (smallest_cosine(half, expected) for half in np.split(found, 2))
    size = (tmp_path / "model.gguf").stat().st_size / 1e6
    print(f"llama.cpp {precision}: strings {from_texts:.7f}, ids {from_ids:.7f}, {len(texts)} texts, {size:.0f} MB")
    assert min(from_texts, from_ids) >= bound


def _tokens(file):
    return GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()


def test_the_code_of_the_readme(model, tmp_path):
    """Both pieces of Python, the second against llama.cpp's own server."""
    python = environment("llama_cpp") / "bin" / "python"
    compiled = compile_model(model, {"topic": "Find the topic."})
    write(compiled, model, tmp_path)
    spelled, over_http, in_process = re.findall(
        r"^```python\n(.*?)^```", (tmp_path / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert "http://127.0.0.1:8080" in over_http
    over_http = over_http.replace("http://127.0.0.1:8080", "{address}")
    code = f"{spelled}\n{in_process}\nfirst = embedding\n"
    code += f"over_http = {over_http!r}.replace('{{address}}', server.listening_address)\n"
    code += 'exec(over_http)\nprint("found", json.dumps([first, embedding]))\n'
    ran = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = np.array(json.loads(ran.stdout.split("found ")[1]))
    expected = embed_compiled(model, compiled, "topic", ["Rain.", "Rain."]).numpy()
    assert smallest_cosine(found, expected) >= 0.9999
