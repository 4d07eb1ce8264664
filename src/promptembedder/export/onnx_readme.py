"""README of an export to ONNX: how it is served, and what it does otherwise than the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from promptembedder.export.compiled import DOCUMENT, Compiled

_TEXT = """# An embedding model as ONNX graphs

The graphs take token ids and give finished embeddings.
Template, soft prompts, pooling{and_head} and normalisation are inside.
ONNX Runtime runs them without torch and without promptembedder.

| number | name | instruction |
| --- | --- | --- |
{rows}

| file | holds |
| --- | --- |
| `onnx/model.onnx` | all instructions; the input `instruction` chooses one by its number |
| `onnx/{first}.onnx` and others | one instruction each, without the input `instruction` |
| `onnx/model.onnx_data` | the weights, which every graph reads; keep it beside the graphs |
| `tokenizer.json` | the tokenizer; it truncates texts to {limit} tokens and pads them |
| `instructions.json` | the table above |

| input or output | shape | type |
| --- | --- | --- |
| `input_ids` | batch, length | int64 |
| `attention_mask` | batch, length | int64, 1 for tokens and 0 for padding on either side |
| `instruction` | 1 or batch | int64 |
| `sentence_embedding` | batch, {E} | float32, of length 1 |

The Embedding LLM is `{backbone}`{revision}, in float32.
Send plain texts: no prompt, no chat template.

## Python

```sh
pip install onnxruntime tokenizers
```

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("onnx/model.onnx")


def embed(texts, instruction):
    read = tokenizer.encode_batch(texts)
    inputs = {{
        "input_ids": np.array([one.ids for one in read]),
        "attention_mask": np.array([one.attention_mask for one in read]),
        "instruction": np.array([instruction]),
    }}
    return session.run(["sentence_embedding"], inputs)[0]


queries = embed(["a guitar is played"], {number})
documents = embed(["A man is playing a guitar.", "Rain."], {document})
print(queries @ documents.T)
```

Long texts need memory for the longest of their batch: sort texts by length, and embed some at a time.

## JavaScript

```sh
npm install @huggingface/transformers
```

```js
import {{ AutoModel, AutoTokenizer, Tensor, env }} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "..";
const folder = {folder}; // the name of this folder
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModel.from_pretrained(folder);

async function embed(texts, instruction) {{
  const inputs = tokenizer(texts, {{ padding: true, truncation: true }});
  const number = new Tensor("int64", [BigInt(instruction)], [1]);
  const {{ sentence_embedding }} = await model({{ ...inputs, instruction: number }});
  return sentence_embedding.tolist();
}}

console.log(await embed(["a guitar is played"], {number}));
```

transformers.js says that it does not know the type of the model; the embeddings are right.

## What is different from promptembedder

An empty text is read as empty, and a batch needs at least one token.
promptembedder reads a full stop in its place: send `.`.
"""


def readme(compiled: Compiled, instructions: Mapping[str, Mapping[str, Any]], folder: str) -> str:
    """The README as Markdown.

    Args:
        compiled: what was exported, under some or all instructions.
        instructions: `number` and `instruction` of each, by name.
        folder: name of the folder.
    """
    first = next((name for name in instructions if name != DOCUMENT), DOCUMENT)
    extras = {"the centre": compiled.centre_D, "the linear head": compiled.head_ED}
    inside = "".join(f", {what}" for what, tensor in extras.items() if tensor is not None)
    prompt = next(iter(compiled.prompts.values()))
    return _TEXT.format(
        and_head=inside,
        rows="\n".join(
            f"| {one['number']} | `{name}` | {_cell(one['instruction'])} |" for name, one in instructions.items()
        ),
        first=first,
        limit=compiled.max_text_tokens,
        E=prompt.soft_KD.shape[1] if compiled.head_ED is None else len(compiled.head_ED),
        backbone=compiled.backbone,
        revision=f" at {compiled.backbone_revision}" if compiled.backbone_revision else "",
        number=instructions[first]["number"],
        document=instructions[DOCUMENT]["number"],
        folder=json.dumps(folder),
    )


def _cell(instruction: str) -> str:
    return " ".join(instruction.split()).replace("|", "\\|")
