"""ONNX graphs in environments without torch: the lines of their README embed as the model does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import promptembedder
from conftest import INSTRUCTION
from promptembedder.export.compiled import compile_model, embed_compiled
from promptembedder.export.export import export
from serving import HARD, environment, smallest_cosine

pytest.importorskip("onnx")
# JavaScript and Python agree on these; `HARD` has blank texts for none of them.
NAMED = {"query": INSTRUCTION, "topic": "Find the topic."}


@cache
def made(parent: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """An export of the shipped model, which is deep, and the model's embeddings of HARD by name of the instruction."""
    model = promptembedder.load("smollm2-135m", device="cpu", dtype="float32")
    done = export(model, NAMED, parent / "export", to="onnx")
    print(f"export: {done.parity}")
    compiled = compile_model(model, NAMED)
    return done.folder, {name: embed_compiled(model, compiled, name, HARD).numpy() for name in NAMED}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return made(tmp_path_factory.mktemp("onnx"))


def lines_of(folder: Path, language: str) -> str:
    """What the README has for a language."""
    (code,) = re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def compared(program: str, ran: subprocess.CompletedProcess[str], expected: dict[str, np.ndarray]) -> None:
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    for name, expected_NE in expected.items():
        cosine = smallest_cosine(np.array(found[name]), expected_NE)
        print(f"{program}, {name}: smallest cosine {cosine:.8f} over {len(HARD)} texts")
        assert cosine > 0.99999


def test_python(exported):
    folder, expected = exported
    code = lines_of(folder, "python") + (
        "import json, sys\n"
        "texts, numbers = json.load(sys.stdin)\n"
        "found = {name: [embed([text], number)[0].tolist() for text in texts] for name, number in numbers.items()}\n"
        "assert 'torch' not in sys.modules and 'promptembedder' not in sys.modules\n"
        "print(json.dumps(found))\n"
    )
    python = environment("onnx") / "bin" / "python"
    given = json.dumps([HARD, {name: number for number, name in enumerate(expected)}])
    ran = subprocess.run(
        [str(python), "-c", code], input=given, capture_output=True, text=True, cwd=folder, check=False, env={}
    )
    compared("onnxruntime", ran, expected)


def test_javascript(exported, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    folder, expected = exported
    (tmp_path / "node_modules").symlink_to(environment("node") / "node_modules")
    code = lines_of(folder, "js") + (
        'import fs from "node:fs";\n'
        "const [texts, numbers] = JSON.parse(fs.readFileSync(0));\n"
        "const found = {};\n"
        "for (const [name, number] of Object.entries(numbers)) {\n"
        "  found[name] = [];\n"
        "  for (const text of texts) found[name].push((await embed([text], number))[0]);\n"
        "}\n"
        "console.log(JSON.stringify(found));\n"
    )
    script = tmp_path / "embed.mjs"
    script.write_text(code)
    given = json.dumps([HARD, {name: number for number, name in enumerate(expected)}])
    ran = subprocess.run([node, str(script)], input=given, capture_output=True, text=True, cwd=folder, check=False)
    compared("transformers.js", ran, expected)
