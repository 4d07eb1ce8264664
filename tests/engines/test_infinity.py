"""infinity, which has sentence-transformers 3 and transformers 4, serves plain folders."""

from __future__ import annotations

from serving import HARD, environment, plain, serving, smallest_cosine


def test_texts():
    folder, expected = plain()
    program = str(environment("infinity") / "bin" / "infinity_emb")
    options = ["--engine", "torch", "--no-bettertransformer", "--dtype", "float32", "--device", "cpu"]
    command = [program, "v2", "--model-id", "topic", *options, "--no-model-warmup"]
    with serving(command, folder, DO_NOT_TRACK="1") as embed:
        found = embed("/embeddings", HARD, model="topic")
    # sentence-transformers before 5.? strips texts.
    same = [n for n, text in enumerate(HARD) if text == text.strip()]
    cosine = smallest_cosine(found[same], expected["topic"][same])
    print(f"infinity: smallest cosine {cosine:.8f} over {len(same)} texts")
    assert cosine > 0.99999
