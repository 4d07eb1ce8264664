"""The examples of docs/wrappers.md run as they stand, and every wrapper gives each text its instruction.

`make test-wrappers` runs this file in an environment of its own; `make test` leaves it out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(ANONYMIZED_TELEMETRY="False", HAYSTACK_TELEMETRY_ENABLED="False", TQDM_DISABLE="1")

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import promptembedder
from promptembedder.model.folder import folder_of

GUIDE = Path(__file__).parents[2] / "docs" / "wrappers.md"
NAME = "smollm2-135m"
TOPIC = "Identify the topic of the text."
QUERY = "What is bread made of?"
BREAD = "Bread is baked from flour and water."


def blocks(heading: str, language: str = "python") -> list[str]:
    """Code blocks under a heading of the guide."""
    section = GUIDE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)


def run(heading: str, package: str) -> Iterator[dict[str, Any]]:
    """Run the blocks under a heading one after the other; gives their names after each."""
    pytest.importorskip(package)
    names: dict[str, Any] = {"__name__": f"guide_{heading.lower()}"}
    for block in blocks(heading):
        exec(compile(block, f"{GUIDE.name}: {heading}", "exec"), names)
        yield names


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the shipped model's name stands for a copy with another query instruction.

    The vectors of the shipped model's own two instructions differ by less than 0.001, so a mix-up would hardly show.
    """
    folder = tmp_path_factory.mktemp("place") / NAME
    shutil.copytree(folder_of(NAME), folder)
    for name, section, key in [
        ("promptembedder.json", "model", "default_instruction"),
        ("config_sentence_transformers.json", "prompts", "query"),
    ]:
        settings = json.loads((folder / name).read_text())
        settings[section][key] = TOPIC
        (folder / name).write_text(json.dumps(settings))
    return folder.parent


@pytest.fixture(scope="session")
def model(place: Path) -> SentenceTransformer:
    model = promptembedder.load(place / NAME)
    texts = [BREAD, QUERY]
    assert np.abs(model.encode_query(texts) - model.encode_document(texts)).max() > 0.05
    return model


@pytest.fixture(autouse=True)
def _in_place(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).symlink_to(place / NAME)
    monkeypatch.chdir(tmp_path)


def assert_same(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(found, dtype=np.float32), expected, rtol=0, atol=1e-5)


def assert_blanks(documents: list[str]) -> None:
    assert {"", "   "} <= set(documents)


def test_every_example_has_a_test() -> None:
    headings = re.findall(r"^## (.+)$", GUIDE.read_text(encoding="utf-8"), re.M)
    tested = re.findall(r'run\("(\w+)"', Path(__file__).read_text(encoding="utf-8"))
    assert [heading for heading in headings if blocks(heading)] == tested


def test_path() -> None:
    [line] = blocks("The model's folder", "sh")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, check=True)
    assert (Path(done.stdout.strip()) / "modules.json").is_file()


def test_langchain(model: SentenceTransformer) -> None:
    [names] = run("LangChain", "langchain_huggingface")
    documents, embeddings = names["documents"], names["embeddings"]
    assert_blanks(documents)
    assert_same([row["vector"] for row in names["store"].store.values()], model.encode_document(documents))
    assert_same(embeddings.embed_query(QUERY), model.encode_query(QUERY))
    assert names["found"][0].page_content == BREAD
    symmetric = names["HuggingFaceEmbeddings"](
        model_name=NAME, model_kwargs={"trust_remote_code": True}, encode_kwargs={"prompt": "Name the country."}
    )
    assert_same(symmetric.embed_documents(documents), model.encode(documents, prompt="Name the country."))
    assert_same(symmetric.embed_query(QUERY), model.encode(QUERY, prompt="Name the country."))


def test_llamaindex(model: SentenceTransformer) -> None:
    [names] = run("LlamaIndex", "llama_index.embeddings.huggingface")
    documents, embeddings, index = names["documents"], names["embeddings"], names["index"]
    assert_blanks(documents)
    assert_same(embeddings.get_text_embedding_batch(documents), model.encode_document(documents))
    assert_same(embeddings.get_query_embedding(QUERY), model.encode_query(QUERY))
    texts = {key: node.text for key, node in index.docstore.docs.items()}
    assert sorted(texts.values()) == sorted(text for text in documents if text)
    for key, vector in index.vector_store.data.embedding_dict.items():
        assert_same(vector, model.encode_document(texts[key]))
    assert names["found"][0].text == BREAD
    plain = names["HuggingFaceEmbedding"](model_name=NAME, trust_remote_code=True)
    assert_same(plain.get_text_embedding(BREAD), model.encode_query(BREAD))  # what the guide warns of


def test_haystack(model: SentenceTransformer) -> None:
    [names] = run("Haystack", "haystack_integrations.components.embedders.sentence_transformers")
    documents = names["documents"]
    assert_blanks(documents)
    assert_same([document.embedding for document in names["embedded"]], model.encode_document(documents))
    assert names["store"].count_documents() == len(documents)
    assert_same(names["query"], model.encode_query(QUERY))
    assert names["found"][0].content == BREAD
    prefixed = names["SentenceTransformersTextEmbedder"](model=NAME, trust_remote_code=True, prefix="Some words. ")
    assert_same(prefixed.run(QUERY)["embedding"], model.encode_query(f"Some words. {QUERY}"))


def test_chroma(model: SentenceTransformer) -> None:
    search = run("Chroma", "chromadb")
    names = next(search)
    documents, collection = names["documents"], names["collection"]
    assert_blanks(documents)
    vectors = model.encode_document(documents)
    assert_same(collection.get(include=["embeddings"])["embeddings"], vectors)
    distance = np.sum((vectors[2] - model.encode_query(QUERY)) ** 2)
    again = names["chromadb"].PersistentClient("chroma").get_collection("documents")
    for found in (names["found"], again.query(query_texts=[QUERY], n_results=1)):
        assert found["documents"] == [[BREAD]]
        assert found["distances"][0][0] == pytest.approx(distance, abs=1e-5)
    names = next(search)
    assert_same(names["embed"](documents), model.encode(documents, prompt=TOPIC))
    assert_same(names["embed"].embed_query([QUERY]), model.encode([QUERY], prompt=TOPIC))
    second = names["SentenceTransformerEmbeddingFunction"](
        model_name=str(folder_of(NAME)), trust_remote_code=True, default_prompt_name="document"
    )
    assert_same(second([BREAD]), model.encode([BREAD], prompt=TOPIC))  # what the guide warns of


def test_qdrant(model: SentenceTransformer) -> None:
    [names] = run("Qdrant", "qdrant_client")
    documents = names["documents"]
    assert_blanks(documents)
    vectors = model.encode_document(documents)
    points = names["client"].retrieve("documents", ids=list(range(len(documents))), with_vectors=True)
    assert_same([point.vector for point in points], vectors)
    assert names["found"][0].payload == {"text": BREAD}
    assert names["found"][0].score == pytest.approx(vectors[2] @ model.encode_query(QUERY), abs=1e-5)


def test_faiss(model: SentenceTransformer) -> None:
    [names] = run("FAISS", "faiss")
    documents = names["documents"]
    assert_blanks(documents)
    vectors = model.encode_document(documents)
    assert_same(names["index"].reconstruct_n(0, len(documents)), vectors)
    assert names["places"].tolist() == [[2]]
    assert names["scores"][0, 0] == pytest.approx(vectors[2] @ model.encode_query(QUERY), abs=1e-5)


def test_bertopic(model: SentenceTransformer) -> None:
    for names in run("BERTopic", "bertopic"):
        documents, topics, topic_model = names["documents"], names["topics"], names["topic_model"]
        assert_blanks(documents)
        assert len(topics) == len(topic_model.get_document_info(documents)) == len(documents)
        assert len(set(topics) - {-1}) >= 2
        for topic in set(topics):
            assert any(word for word, _ in topic_model.get_topic(topic))
        assert_same(topic_model.embedding_model.embed(documents), model.encode(documents, prompt=TOPIC))
    assert type(names["topic_model"].representation_model).__name__ == "KeyBERTInspired"


def test_keybert(model: SentenceTransformer) -> None:
    [names] = run("KeyBERT", "keybert")
    documents, keywords = names["documents"], names["keywords"]
    assert_blanks(documents)
    assert [len(found) for found in keywords] == [2, 0, 2, 0]
    for text, found in zip(documents, keywords, strict=True):
        for word, score in found:
            assert word in text.lower()
            one, other = model.encode([text, word], prompt=TOPIC)
            assert score == pytest.approx(one @ other, abs=1e-4)  # KeyBERT keeps four digits


def test_setfit(model: SentenceTransformer) -> None:
    [names] = run("SetFit", "setfit")
    assert list(names["predicted"][:2]) == ["travel", "food"]
    assert names["predicted"][2] in names["labels"]
    assert_same(names["classifier"].encode(names["texts"]), model.encode(names["texts"], prompt=TOPIC))
