"""What clients send and get; embeddings are those of the library, whatever else is in a batch."""

from __future__ import annotations

import base64
import logging
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import promptembedder
from conftest import INSTRUCTION, MANY, SECOND, TEXTS
from promptembedder.serving.models import share_weights

URL = "/v1/embeddings"
TOPICS = "Identify the topic of the text."
LONG = "rain on the river and the town " * 40


def vectors(answer):
    assert answer.status_code == 200, answer.text
    return np.array([one["embedding"] for one in answer.json()["data"]], np.float32)


def refused(answer, status, code, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    return error["message"]


def test_answers_as_openai_does(client, served_models):
    found = client("plain").post(URL, json={"model": "plain", "input": TEXTS[:2]}).json()
    expected = served_models["plain"].model.encode(TEXTS[:2])
    tokens = sum(len(served_models["plain"].module.reader.text_ids(text)) for text in TEXTS[:2])
    assert found["object"] == "list"
    assert found["model"] == "plain"
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "truncated": []}
    assert [set(one) for one in found["data"]] == [{"object", "index", "embedding"}] * 2
    assert [one["index"] for one in found["data"]] == [0, 1]
    np.testing.assert_allclose([one["embedding"] for one in found["data"]], expected, atol=1e-6)


def test_one_text_and_base64(client):
    server = client("plain")
    plain = vectors(server.post(URL, json={"model": "plain", "input": "Rain."}))
    coded = server.post(URL, json={"model": "plain", "input": "Rain.", "encoding_format": "base64"}).json()
    assert len(plain) == 1
    assert np.array_equal(np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4"), plain[0])


def test_token_ids_are_read_as_their_text(client, served_models):
    server, reader = client("plain"), served_models["plain"].module.reader
    ids = [reader.text_ids(text) for text in TEXTS]
    expected = vectors(server.post(URL, json={"model": "plain", "input": TEXTS}))
    for given, texts in ((ids, slice(None)), (ids[2], slice(2, 3))):
        found = vectors(server.post(URL, json={"model": "plain", "input": given}))
        np.testing.assert_allclose(found, expected[texts], atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "prefix", "deep", "windows"])
def test_several_instructions(client, served_models, name):
    """All texts under the first one come first, so that a client that knows of one reads those."""
    body = {"model": name, "input": TEXTS[:3], "instruction": [INSTRUCTION, SECOND]}
    found = client().post(URL, json=body)
    assert [(one["index"], one["instruction"]) for one in found.json()["data"]] == [
        (n, instruction) for instruction in (INSTRUCTION, SECOND) for n in range(3)
    ]
    expected = promptembedder.encode(served_models[name].model, TEXTS[:3], [INSTRUCTION, SECOND])
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    np.testing.assert_allclose(vectors(found), expected.reshape(6, -1), atol=1e-5)


def test_several_instructions_are_one_pass_over_a_text(client, served_models):
    server, backbone, lengths = client("plain"), served_models["plain"].module.backbone, []
    vectors(server.post(URL, json={"model": "plain", "input": TEXTS}))  # makes the view
    layer = backbone._view("soft_tokens", None).layers[0]
    with_hook = layer.register_forward_pre_hook(lambda layer, inputs: lengths.append(inputs[0].shape[1]))
    body = {"model": "plain", "input": TEXTS[2], "instruction": [TOPICS, "Represent the meaning of the text."]}
    try:
        vectors(server.post(URL, json=body))
    finally:
        with_hook.remove()
    text = int(served_models["plain"].module.preprocess(TEXTS[2:3])["attention_mask"].sum()) - len(backbone.head_ids)
    soft_tokens = served_models["plain"].module.settings.num_soft_tokens
    assert lengths == [text + 2 * soft_tokens]


def test_names_stand_for_instructions(client, served_models):
    server, model = client("plain", "deep"), served_models["plain"].model
    for name, more, instruction in [
        ("plain", {}, model.prompts["query"]),
        ("plain", {"input_type": "query"}, model.prompts["query"]),
        ("plain", {"input_type": "document"}, model.prompts["document"]),
        ("plain:document", {}, model.prompts["document"]),
        ("plain:document", {"input_type": "document"}, model.prompts["document"]),
        ("plain:topics", {}, TOPICS),
    ]:
        found = vectors(server.post(URL, json={"model": name, "input": TEXTS, **more}))
        np.testing.assert_allclose(found, model.encode(TEXTS, prompt=instruction), atol=1e-6)


def test_models_show_a_digest(client, served_models):
    server = client("plain", "deep")
    listed = server.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed] == [
        f"{name}{alias}" for name in ("plain", "deep") for alias in ("", ":topics", ":document")
    ]
    from promptembedder.export import compile_model

    compiled = compile_model(served_models["plain"].model, {"topics": TOPICS})
    digests = {one["id"]: one["digest"] for one in listed}
    assert digests["plain:topics"] == compiled.digest("topics")
    assert digests["plain:document"] == compiled.digest("document")
    assert len(set(digests.values())) == 6
    assert server.get("/v1/models/deep:topics").json() == listed[4]
    assert listed[4]["dimensions"] == 32
    refused(server.get("/v1/models/deep:nothing"), 404, "model_not_found", "model")


def test_an_export_is_served_under_its_instructions(client, served_models, tmp_path):
    from promptembedder.export import export
    from promptembedder.serving.models import open_models
    from promptembedder.serving.service import Service
    from promptembedder.serving.settings import ServeSettings

    made = export(served_models["plain"].model, {"topics": TOPICS}, tmp_path / "small", to="soft-prompt")
    (opened,) = open_models([made.folder], {}, device="cpu")
    assert opened.digests["topics"] == made.digests["topics"]
    service = Service([opened], ServeSettings())
    try:
        assert set(service.catalogue.names) == {"small", "small:topics", "small:document"}
        with pytest.raises(promptembedder.PromptEmbedderError, match="not held by this export"):
            opened.module.check_instruction("Another one.")
    finally:
        service.close()


def test_dimensions(client, served_models):
    server = client("plain")
    found = vectors(server.post(URL, json={"model": "plain", "input": TEXTS, "dimensions": 8}))
    expected = served_models["plain"].model.encode(TEXTS)[:, :8]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    whole = vectors(server.post(URL, json={"model": "plain", "input": TEXTS, "dimensions": 32}))
    assert np.array_equal(whole, vectors(server.post(URL, json={"model": "plain", "input": TEXTS})))
    body = {"model": "plain", "input": "a", "dimensions": 33}
    assert "more than the 32" in refused(server.post(URL, json=body), 400, "too_many_dimensions", "dimensions")


def test_a_text_that_is_cut_is_named(client, served_models):
    server = client("plain")
    body = {"model": "plain", "input": ["short", LONG, "one", LONG]}
    found = server.post(URL, json=body)
    assert found.json()["usage"]["truncated"] == [1, 3]
    np.testing.assert_allclose(vectors(found), served_models["plain"].model.encode(body["input"]), atol=1e-6)
    message = refused(server.post(URL, json=body | {"truncate": False}), 400, "text_too_long", "input[1]")
    assert "the model reads 64" in message
    assert server.post(URL, json={"model": "plain", "input": "short", "truncate": False}).status_code == 200


def test_an_answer_does_not_depend_on_its_batch(client, served_models):
    """Many requests at once, of all models, with one, several or no instructions: equal to one text at a time."""
    server, drawn = client(batch_tokens=400), random.Random(0)
    requests = []
    for _ in range(40):
        instructions = drawn.sample([INSTRUCTION, SECOND, TOPICS, "Find the feeling."], drawn.choice([1, 1, 1, 2, 3]))
        texts = [drawn.choice([*MANY, LONG, "x"]) for _ in range(drawn.choice([1, 1, 2, 7]))]
        requests.append((drawn.choice(list(served_models)), texts, instructions))

    def ask(request):
        name, texts, instructions = request
        return server.post(URL, json={"model": name, "input": texts, "instruction": instructions})

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, requests))
    for (name, texts, instructions), answer in zip(requests, answers, strict=True):
        model = served_models[name].model
        alone = np.stack(
            [promptembedder.encode(model, [text], instruction)[0] for instruction in instructions for text in texts]
        )
        np.testing.assert_allclose(vectors(answer), alone, atol=1e-5)


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"input": []}, 400, "invalid_value", "input"),
        ({"input": ""}, 400, "invalid_value", "input"),
        ({"input": ["a", ""]}, 400, "invalid_value", "input[1]"),
        ({"input": None}, 400, "invalid_value", "input"),
        ({"input": 3}, 400, "invalid_value", "input"),
        ({"input": {"a": "b"}}, 400, "invalid_value", "input"),
        ({"input": ["a", 1]}, 400, "invalid_value", "input[1]"),
        ({"input": [1, "a"]}, 400, "invalid_value", "input[1]"),
        ({"input": [True]}, 400, "invalid_value", "input[0]"),
        ({"input": [[1], "a"]}, 400, "invalid_value", "input[1]"),
        ({"input": [[]]}, 400, "invalid_value", "input[0]"),
        ({"input": [[[1]]]}, 400, "invalid_value", "input[0][0]"),
        ({"input": [1.5]}, 400, "invalid_value", "input[0]"),
        ({"input": [-1]}, 400, "invalid_value", "input[0]"),
        ({"input": [10**30]}, 400, "invalid_value", "input[0]"),
        ({"input": [2**31 - 1]}, 400, "unknown_token_id", "input[0]"),
        ({"input": [[1], [320]]}, 400, "unknown_token_id", "input[1]"),
        ({"input": ["a"] * 2049}, 400, "invalid_value", "input"),
        ({"model": "nothing"}, 404, "model_not_found", "model"),
        ({"model": "plain:nothing"}, 404, "model_not_found", "model"),
        ({"model": 1}, 400, "invalid_value", "model"),
        ({"dimensions": 0}, 400, "invalid_value", "dimensions"),
        ({"dimensions": 10**400}, 400, "too_many_dimensions", "dimensions"),
        ({"dimensions": "8"}, 400, "invalid_value", "dimensions"),
        ({"dimensions": True}, 400, "invalid_value", "dimensions"),
        ({"encoding_format": "hex"}, 400, "invalid_value", "encoding_format"),
        ({"input_type": "passage"}, 400, "invalid_value", "input_type"),
        ({"instruction": " "}, 400, "invalid_value", "instruction"),
        ({"instruction": []}, 400, "invalid_value", "instruction"),
        ({"instruction": ["a", None]}, 400, "invalid_value", "instruction[1]"),
        ({"instruction": "a" * 8193}, 400, "invalid_value", "instruction"),
        ({"instruction": ["a"] * 17}, 400, "invalid_value", "instruction"),
        ({"instruction": "a", "input_type": "document"}, 400, "conflict", "input_type"),
        ({"instruction": "a", "model": "plain:topics"}, 400, "conflict", "instruction"),
        ({"input_type": "document", "model": "plain:topics"}, 400, "conflict", "input_type"),
        ({"input_type": "query", "model": "plain:document"}, 400, "conflict", "input_type"),
        ({"truncate": "no"}, 400, "invalid_value", "truncate"),
        ({"user": 5}, 400, "invalid_value", "user"),
        ({"insturction": "a"}, 400, "unknown_field", "insturction"),
    ],
)
def test_bad_fields(client, change, status, code, param):
    server = client("plain")
    message = refused(server.post(URL, json={"model": "plain", "input": "a", **change}), status, code, param)
    assert message
    assert server.post(URL, json={"model": "plain", "input": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", JSON, 400, "invalid_json"),
        (b"{", JSON, 400, "invalid_json"),
        (b"\xff\xfe", JSON, 400, "invalid_json"),
        (b'{"model": "plain", "input": "\xff"}', JSON, 400, "invalid_json"),
        (b'{"model": "plain", "input": "\\ud800"}', JSON, 400, "invalid_json"),
        (b'{"model": "plain", "input": "a", "user": "\\udc00"}', JSON, 400, "invalid_json"),
        (b"[" * 100_000, JSON, 400, "invalid_json"),
        (b"[]", JSON, 400, "invalid_body"),
        (b"null", JSON, 400, "invalid_body"),
        (b'"a"', JSON, 400, "invalid_body"),
        (b"model=plain&input=a", {"content-type": "application/x-www-form-urlencoded"}, 415, "invalid_content_type"),
        (b'{"model": "plain", "input": "a"}', {"content-type": "text/plain"}, 415, "invalid_content_type"),
        (b'{"model": "plain", "input": "a"}', {}, 415, "invalid_content_type"),
        (b'{"model": "plain", "input": "' + b"a" * 2**24 + b'"}', JSON, 413, "body_too_large"),
    ],
)
def test_bad_bodies(client, body, headers, status, code):
    refused(client("plain").post(URL, content=body, headers=headers), status, code)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b"9" * 5000])
def test_numbers_that_are_none(client, number):
    for field in (b"dimensions", b"input"):
        body = b'{"model": "plain", "input": "a", "' + field + b'": ' + number + b"}"
        answer = client("plain").post(URL, content=body, headers=JSON)
        assert answer.status_code == 400, answer.text
    body = b'{"model": "plain", "input": [' + number + b"]}"
    assert client("plain").post(URL, content=body, headers=JSON).status_code == 400


def test_bad_addresses(client):
    server = client("plain")
    refused(server.get("/nothing"), 404, "unknown_url")
    refused(server.get(URL), 405, "invalid_request")
    refused(server.post("/v1/models", json={}), 405, "invalid_request")


def test_a_request_of_too_many_tokens(client):
    server = client("plain", request_tokens=100)
    refused(server.post(URL, json={"model": "plain", "input": MANY}), 413, "too_many_tokens", "input")
    assert server.post(URL, json={"model": "plain", "input": "a"}).status_code == 200


def test_key(client):
    server = client("plain", api_key="secret")
    body = {"model": "plain", "input": "a"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer é"}):
        sent = {name: value.encode() for name, value in headers.items()}
        answer = server.post(URL, json=body, headers=sent)
        refused(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for closed in ("/v1/models", "/metrics"):
        refused(server.get(closed), 401, "invalid_api_key")
    assert server.post(URL, json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert {server.get(path).status_code for path in ("/health", "/ready", "/docs", "/openapi.json")} == {200}


def test_explains_an_instruction(client, served_models):
    server = client("plain", "deep")
    body = {"model": "plain", "instruction": INSTRUCTION, "top": 3}
    found = server.post("/v1/explain", json=body).json()
    expected = promptembedder.explain(served_models["plain"].model, INSTRUCTION, 3)
    assert [[word["text"] for word in one["words"]] for one in found["soft_tokens"]] == [
        [text for text, _ in one.words] for one in expected
    ]
    assert server.post("/v1/explain", json={"model": "deep:topics"}).json()["instruction"] == TOPICS
    refused(server.post("/v1/explain", json=body | {"top": 51}), 400, "invalid_value", "top")
    refused(server.post("/v1/explain", json=body | {"model": "x"}), 404, "model_not_found", "model")


def test_state(client):
    server = client("plain", warm=["Warm one.", "Warm two."])
    for one in server.service._warming:
        one.result()
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    server.post(URL, json={"model": "plain", "input": TEXTS, "instruction": "Warm two."})
    refused(server.post(URL, json={"model": "x", "input": TEXTS}), 404, "model_not_found", "model")
    page = server.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    lines = page.text.splitlines()
    assert {
        'promptembedder_answers_total{status="200"} 1.0',
        'promptembedder_answers_total{status="404"} 1.0',
        "promptembedder_texts_total 5.0",
        "promptembedder_queue_tokens 0.0",
        "promptembedder_new_instructions_total 0.0",
    } <= set(lines)


def test_a_server_that_stops_takes_no_work(client):
    server = client("plain")
    server.service.stopping = True
    answer = server.post(URL, json={"model": "plain", "input": "a"})
    refused(answer, 503, "stopping")
    assert answer.headers["connection"] == "close"
    assert server.get("/ready").status_code == 503
    assert server.get("/health").status_code == 200


def test_what_fails_is_a_500_and_the_server_goes_on(client, monkeypatch, caplog):
    server = client("plain")
    monkeypatch.setattr(server.service.batcher, "_embed", lambda model, rows: 1 / 0)
    body = {"model": "plain", "input": "a very secret text"}
    refused(server.post(URL, json=body), 500, "internal_error")
    assert "batch of 1 texts failed" in caplog.text
    monkeypatch.undo()
    assert server.post(URL, json=body).status_code == 200
    assert "secret" not in caplog.text


def test_no_text_is_logged(client, caplog):
    caplog.set_level(logging.DEBUG)
    server = client("plain", request_tokens=200)
    for text in ("secret words", "secret " * 300, ["secret", 5]):
        server.post(URL, json={"model": "plain", "input": text, "instruction": "A secret instruction."})
    server.post(URL, content=b'{"model": "secret', headers=JSON)
    assert not [record for record in caplog.records if "secret" in record.getMessage()]


def test_pages_need_no_network(client):
    server = client("plain")
    page = server.get("/docs")
    assert "openapi.json" in page.text
    assert "http://" not in page.text + server.get("/").text
    assert "https://" not in page.text + server.get("/").text
    for address in ("/", "/docs", "/static/page.js"):
        policy = server.get(address).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
    described = server.get("/openapi.json").json()
    assert set(described["paths"]) == {
        URL,
        "/v1/explain",
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/ready",
        "/metrics",
    }
    sent = described["paths"][URL]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert sent["required"] == ["model", "input"]
    assert sent["additionalProperties"] is False
    assert sent["properties"]["model"]["enum"] == ["plain", "plain:topics", "plain:document"]


def test_models_share_weights(tiny_settings):
    one, other = (promptembedder.build(tiny_settings("llama"), device="cpu", seed=seed) for seed in (0, 1))
    third = promptembedder.build(tiny_settings("qwen2"), device="cpu")
    before = other.encode(TEXTS)
    frozen = sum(p.nbytes for p in other[0].backbone.lm.parameters())
    assert share_weights([one], other) >= frozen
    assert share_weights([one], third) < 1000  # norms, all ones
    ours, theirs = (next(model[0].backbone.lm.parameters()) for model in (one, other))
    assert ours.data_ptr() == theirs.data_ptr()
    assert next(other[0].prompter.lm.get_input_embeddings().parameters()).data_ptr() == ours.data_ptr()
    assert np.array_equal(before, other.encode(TEXTS))
