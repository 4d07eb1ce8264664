"""The examples of docs/serve.md run as they stand against a server, and give the vectors of the library.

`make test-serve` runs this folder in an environment of its own; `make test` leaves it out.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import promptembedder

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
NAME = "smollm2-135m"
TOPICS = "Identify the topic of the text."
FREE = "Find the feeling."
QUERY = "What is bread made of?"
TEXTS = ["Bread is baked from flour and water.", "The bank raised its rates again.", "A man is playing a guitar."]


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "promptembedder", "serve", NAME, "--port=0", f"--named=topics={TOPICS}"]
    server = subprocess.Popen([*command, "--dtype=float32"], stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stderr if "listening" in line)
        yield re.search(r"http://[^ ,]+", line)[0]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.fixture(scope="session")
def model():
    return promptembedder.load(NAME, dtype="float32")


def example(package: str, address: str) -> dict[str, Any]:
    """Names after the example of the guide that imports a package."""
    pytest.importorskip(package)
    (block,) = [code for code in re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S) if f"from {package}" in code]
    names: dict[str, Any] = {}
    exec(compile(block.replace("http://127.0.0.1:8000", address), package, "exec"), names)
    return names


def assert_same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(found, np.float32), expected, atol=1e-5)


def test_openai(address, model):
    names = example("openai", address)
    assert_same(names["vectors"], model.encode(["It rains.", "Banks raised rates."], prompt="Find the topic."))
    client = names["client"]
    ids = [model[0].reader.text_ids(text) for text in TEXTS]
    for given in (TEXTS, ids):
        answer = client.embeddings.create(model=f"{NAME}:document", input=given, encoding_format="float")
        assert_same([one.embedding for one in answer.data], model.encode_document(TEXTS))
    short = client.embeddings.create(model=NAME, input=TEXTS[0], dimensions=64)
    assert len(short.data[0].embedding) == 64
    assert short.usage.prompt_tokens == len(ids[0])
    assert {one.id for one in client.models.list()} == {NAME, f"{NAME}:document", f"{NAME}:topics"}


def test_errors_of_openai(address):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="is unknown") as missing:
        client.embeddings.create(model="nothing", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=NAME, input=["a", ""])
    assert refused.value.param == "input[1]"


def test_langchain(address, model):
    names = example("langchain_openai", address)
    assert_same(names["queries"].embed_query(QUERY), model.encode(QUERY, prompt=TOPICS))
    assert_same(names["documents"].embed_documents(TEXTS), model.encode_document(TEXTS))
    assert_same(names["free"].embed_documents(TEXTS), model.encode(TEXTS, prompt=FREE))


def test_llama_index(address, model):
    names = example("llama_index", address)
    assert_same(names["queries"].get_query_embedding(QUERY), model.encode(QUERY, prompt=TOPICS))
    assert_same(names["documents"].get_text_embedding_batch(TEXTS), model.encode_document(TEXTS))
    assert_same(names["free"].get_text_embedding(TEXTS[0]), model.encode(TEXTS[0], prompt=FREE))


def test_haystack(address, model):
    names = example("haystack", address)
    from haystack import Document

    assert_same(names["queries"].run(text=QUERY)["embedding"], model.encode(QUERY, prompt=TOPICS))
    documents = names["documents"].run(documents=[Document(content=text) for text in TEXTS])["documents"]
    assert_same([one.embedding for one in documents], model.encode_document(TEXTS))


def test_curl(address, model):
    """The command of the guide, by the tool itself."""
    block = re.search(r"^(curl .*?)^```", GUIDE, re.M | re.S)[1].replace("http://127.0.0.1:8000", address)
    done = subprocess.run(["bash", "-c", block], capture_output=True, text=True, check=True)
    found = [one["embedding"] for one in json.loads(done.stdout)["data"]]
    assert_same(found, model.encode(["It rains.", "Banks raised rates."], prompt="Find the topic."))


def test_the_dockerfile_is_clean():
    tool = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([tool, "--ignore=DL3042", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)
