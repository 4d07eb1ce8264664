"""llama.cpp embeds with a GGUF file what the model does, from plain strings and from token ids."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, pre_tokenizers

import promptembedder
from promptembedder import ModelConfig
from promptembedder.export.compiled import compile_model, embed_compiled
from promptembedder.export.gguf_file import write
from promptembedder.export.parity import parity_texts
from promptembedder.llms.tokens import plain_ids
from promptembedder.text import composed
from serving import HARD, SMALL, environment, smallest_cosine

# Reads {"file", "tokens", "threads", "inputs"}: inputs are strings, or lists of token ids.
_CODE = """
import json, sys, urllib.request
import xllamacpp
job = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = job["file"]
parameters.embedding, parameters.warmup, parameters.verbosity = True, False, -1
parameters.n_parallel, parameters.n_gpu_layers = 1, 0
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
parameters.cache_prompt, parameters.cache_ram_mib = False, 0
parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = job["tokens"]
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(parameters)
found = [server.handle_embeddings({"input": one})["data"][0]["embedding"] for one in job["inputs"]]
def tokens(text):
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]

print("found", json.dumps([found, [tokens(one) for one in job["inputs"] if isinstance(one, str)]]))
"""
_MORE = [f"{n} {word}" for n in range(6) for word in ("it's", "«oui»", "عربية", "👩‍👩‍👧‍👦 7", "\n\nx\t")]
# Where the ways to part words differ.
_NUMBERS = ["12345", " 12345", "in 2024", "a  2024", "1. One\n2. Two\n\n3. Three", "$1,234.56", "x\n\n5", "٣٤٥ ½"]


@pytest.fixture(scope="module")
def model():
    return promptembedder.build(ModelConfig(prompter=SMALL, backbone=SMALL, dtype="float32"), device="cpu")


def compared(model, folder, texts, precision):
    """Smallest cosines from strings and from token ids; the engine's ids of strings are those of the model."""
    python = environment("llama_cpp") / "bin" / "python"
    compiled = compile_model(model, {"topic": "Find the topic."})
    folder.mkdir(exist_ok=True)
    write(compiled, model, folder, precision=precision)
    words = json.loads((folder / "instructions.json").read_text())["instructions"]["topic"]
    spelled = GGUFReader(folder / "model.gguf").fields["tokenizer.ggml.tokens"].contents()
    known = {word: i for i, word in enumerate(spelled)}
    before, after = ([known[f"<|pe:{w}"] for w in words[side].split("<|pe:")[1:]] for side in ("prefix", "suffix"))
    ids = [[*before, *plain_ids(model.tokenizer, text), *after] for text in texts]
    inputs = [*(words["prefix"] + composed(text) + words["suffix"] for text in texts), *ids]
    tokens = compiled.max_text_tokens + 256
    job = {"file": str(folder / "model.gguf"), "tokens": tokens, "threads": torch.get_num_threads(), "inputs": inputs}
    ran = subprocess.run([python, "-c", _CODE], input=json.dumps(job), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    embeddings, own_ids = json.loads(ran.stdout.split("found ")[1])
    different = [text for text, one, other in zip(texts, own_ids, ids, strict=True) if one != other]
    assert different == []
    expected = embed_compiled(model, compiled, "topic", texts).numpy()
    return tuple(smallest_cosine(half, expected) for half in np.split(np.array(embeddings), 2))


@pytest.mark.parametrize(
    ("precision", "bound"), [("float32", 0.99999), ("float16", 0.9999), ("bfloat16", 0.998), ("q8_0", 0.998)]
)
def test_texts_and_token_ids(model, tmp_path, precision, bound):
    limit = model[0].settings.max_text_tokens
    texts = [t for t in HARD if len(plain_ids(model.tokenizer, t)) <= limit]
    texts += [*_MORE, *_NUMBERS, *parity_texts(model, limit)]
    assert len(texts) >= 50
    from_texts, from_ids = compared(model, tmp_path, texts, precision)
    size = (tmp_path / "model.gguf").stat().st_size / 1e6
    print(f"llama.cpp {precision}: strings {from_texts:.7f}, ids {from_ids:.7f}, {len(texts)} texts, {size:.0f} MB")
    assert min(from_texts, from_ids) >= bound


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_tiny_models(tiny_model, tmp_path, architecture, layout):
    model = tiny_model(architecture, layout=layout)
    texts = [*_MORE, *_NUMBERS, *parity_texts(model, model[0].settings.max_text_tokens)]
    assert min(compared(model, tmp_path, texts, "float32")) >= 0.99999


def test_gemma(tiny_lm, tmp_path):
    """Windows of 12 tokens in every layer, as in the first five of Gemma's six."""
    place = shutil.copytree(tiny_lm("gemma3"), tmp_path / "llm")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "layer_types": ["sliding_attention"] * 2}))
    settings = ModelConfig(prompter=str(place), backbone=str(place), dtype="float32", lora_rank=4)
    model = promptembedder.build(settings, device="cpu")
    texts = [*_MORE, *_NUMBERS, *parity_texts(model, model[0].settings.max_text_tokens)]
    assert min(compared(model, tmp_path / "export", texts, "float32")) >= 0.99999


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(("parted", "whole"), [("digits", False), ("thousands", False), ("thousands", True)])
def test_ways_to_part_words(tiny_lm, tmp_path, parted, whole):
    """SmolLM2's own tokenizer parts digits, Llama 3's takes three; the last leaves words of the vocabulary whole."""
    place = shutil.copytree(tiny_lm("llama"), tmp_path / "llm")
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    steps = {
        "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "thousands": [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps[parted])
    tokenizer.model.ignore_merges = whole
    tokenizer.save(str(place / "tokenizer.json"))
    settings = ModelConfig(prompter=str(place), backbone=str(place), dtype="float32", lora_rank=4)
    model = promptembedder.build(settings, device="cpu")
    texts = [*_MORE, *_NUMBERS, *parity_texts(model, model[0].settings.max_text_tokens)]
    assert min(compared(model, tmp_path / "export", texts, "float32")) >= 0.99999


def test_the_code_of_the_readme(model, tmp_path):
    """Both pieces of Python, one of them against the server of llama.cpp."""
    python = environment("llama_cpp") / "bin" / "python"
    compiled = compile_model(model, {"topic": "Find the topic."})
    write(compiled, model, tmp_path)
    found = re.findall(r"^```python\n(.*?)^```", (tmp_path / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    spelled, over_http, in_process = found
    assert "http://127.0.0.1:8080" in over_http
    code = f"{spelled}\n{in_process}\nfirst = embedding\n"
    code += f'exec({over_http!r}.replace("http://127.0.0.1:8080", server.listening_address))\n'
    code += 'print("found", json.dumps([first, embedding]))\n'
    ran = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    embeddings = np.array(json.loads(ran.stdout.split("found ")[1]))
    expected = embed_compiled(model, compiled, "topic", ["Rain.", "Rain."]).numpy()
    assert smallest_cosine(embeddings, expected) >= 0.9999
