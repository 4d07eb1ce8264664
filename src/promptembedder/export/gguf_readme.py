"""README of a GGUF export: how llama.cpp and what is built on it serve it, and what they do otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from promptembedder.export.compiled import DOCUMENT, Compiled

_TEXT = """# Instructions in one GGUF file

`model.gguf` is an embedding model for llama.cpp, under each of these instructions.

| name | instruction | text tokens | tokens in all |
| --- | --- | --- | --- |
{rows}

- Backbone: `{backbone}`{revision}, weights in {precision}.
- Embeddings have {D} dimensions; compare them by cosine.
- Pooling is that of the last token, and the file says so.

## What a client sends

A client writes an instruction's `prefix` before each text and its `suffix` after it.
Both are in `instructions.json`.

```python
import json
import unicodedata

around = json.load(open("instructions.json", encoding="utf-8"))["instructions"]["{first}"]


def spelled(text):
    return around["prefix"] + unicodedata.normalize("NFC", text) + around["suffix"]
```

The words in them are special tokens, so the engine has to parse special tokens.
Some stand for words of the template and have the same embedding: as plain words they would grow together with the text.
Cut texts to {limit} tokens before; an engine that cuts off the end cuts off the instruction.

## llama.cpp

```bash
llama-server -m model.gguf --embeddings --pooling last -c {context} -b {context} -ub {context} -np 1
```

```python
import json
import urllib.request

body = json.dumps({{"input": [spelled("Rain.")]}}).encode()
request = urllib.request.Request(
    "http://127.0.0.1:8080/v1/embeddings", body, {{"Content-Type": "application/json"}}
)
with urllib.request.urlopen(request) as answer:
    embedding = json.load(answer)["data"][0]["embedding"]
```

Add `-ctk f32 -ctv f32` for the last digits: the cache of keys and values is in float16 otherwise.

## xllamacpp

```python
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "model.gguf"
parameters.embedding = True
parameters.n_parallel = 1
parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = {context}
server = xllamacpp.Server(parameters)
answer = server.handle_embeddings({{"input": spelled("Rain.")}})
embedding = answer["data"][0]["embedding"]
```

## Ollama and node-llama-cpp

These were not tested.

- Ollama: a `Modelfile` with the line `FROM ./model.gguf`, then `ollama create`.
  Send `spelled(text)` to `/api/embed` with `"truncate": false`.
- node-llama-cpp: give `getEmbeddingFor` the tokens `model.tokenize(prefix + text + suffix, true)`.
  With plain strings it does not parse special tokens.

## What is different from promptembedder

- An empty text, or one of blanks alone, is read as it is; promptembedder reads a full stop in its place.
- A text that holds the spelling of a soft token, such as `{word}`, is read with that soft token in it.
- Word embeddings are in {table}, whatever the other weights are in.
"""


def readme(compiled: Compiled, precision: str, around: Mapping[str, int]) -> str:
    """The README as Markdown.

    Args:
        compiled: what was written.
        precision: of the weights.
        around: tokens around a text, by instruction.
    """
    names, limit = list(compiled.prompts), compiled.max_text_tokens
    first = next((name for name in names if name != DOCUMENT), DOCUMENT)
    rows = [
        f"| `{name}` | {_cell(compiled.prompts[name].instruction)} | {limit} | {limit + around[name]} |"
        for name in names
    ]
    return _TEXT.format(
        rows="\n".join(rows),
        backbone=compiled.backbone,
        revision=f" at {compiled.backbone_revision}" if compiled.backbone_revision else "",
        precision=precision,
        D=compiled.prompts[first].soft_KD.shape[1],
        first=first,
        limit=limit,
        context=-(-(limit + max(around.values())) // 256) * 256,
        word=f"<|pe:{first}:0|>",
        table="float32" if precision == "float32" else "float16",
    )


def _cell(instruction: str) -> str:
    return " ".join(instruction.split()).replace("|", "\\|")
