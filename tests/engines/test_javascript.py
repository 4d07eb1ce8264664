"""The tokenizer of transformers.js reads what the tokenizer in Python reads."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from serving import HARD, environment, plain


def test_token_ids():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    folder, _ = plain()
    for name in ("topic", "document", "any-instruction"):
        command = [node, str(Path(__file__).parent / "token_ids.mjs"), str(environment("node")), str(folder), name]
        ran = subprocess.run(command, input=json.dumps(HARD), capture_output=True, text=True, check=True)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert json.loads(ran.stdout) == [tokenizer(text, verbose=False)["input_ids"] for text in HARD]
