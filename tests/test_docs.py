"""Documents that are made from code are up to date, and what the README shows exists."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from promptembedder.training.settings import load_run

ROOT = Path(__file__).parent.parent


def test_command_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["reference"]()
    assert (ROOT / "docs" / "cli.md").read_text() == made, "run: python docs/make_cli.py > docs/cli.md"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    config = load_run(recipe)
    assert config.data.files
    assert config.training.max_steps * config.training.batch_size <= 650 * 96  # an hour on two cores


def anchors(page):
    """Headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        place = (page.parent / link).resolve() if link else page
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), f"{link}#{anchor}"


def sentences(page):
    """Sentences of each line of a page's prose; code blocks, tables, headings and front matter are left out."""
    text = re.sub(r"\A---\n.*?\n---\n|^ *```.*?^ *```$", "", page.read_text(), flags=re.S | re.M)
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith(("|", "#", ":::")):
            prose = re.sub(r"^ *(?:[-*]|\d+\.) +", "", line)
            prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", prose))
            yield re.split(r"(?<=[.!?])[\"')\]*]* +(?=\S)", prose)


PROSE = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "src").glob("promptembedder/models/*/*.md"),
]


@pytest.mark.parametrize("page", PROSE, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_prose_has_one_short_sentence_a_line(page):
    lines = list(sentences(page))
    assert not [line for line in lines if len(line) > 1], "more than one sentence a line"
    assert not [s for (s, *_) in lines if len(re.findall(r"\w\S*", s)) > 25], "more than 25 words"
    assert not [s for (s, *_) in lines if len(re.findall(r"\[[^\]]+\]", s)) > 1], "more than one link"


def test_sentences_are_told_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A. B\n\nSee `a. b` [it](x.md). **One.** Two (1.5).\n\n```sh\nmake. Go.\n```\n- 3. Four.\n| a. b |\n"
    )
    assert list(sentences(page)) == [["See code [it].", "**One.", "Two (1.5)."], ["3.", "Four."]]


def test_readme_targets_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z]+)", readme, re.M)) <= targets


def test_versions_of_wrappers_are_those_under_test():
    shown = re.findall(r"^\|[^|]*\| `([^`]+)`", (ROOT / "docs" / "wrappers.md").read_text(), re.M)
    pinned = (ROOT / "tests" / "wrappers" / "requirements.txt").read_text().splitlines()
    assert len(shown) == 9
    assert set(shown) <= set(pinned)


@pytest.mark.slow
def test_import_needs_no_extra():
    """All but `evaluation`, `serving` and what runs on Ray opens where no such extra is; so does every public name."""
    script = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(["mteb", "matplotlib", "markdown", "pytest", "fastapi", "uvicorn", "orjson", "ray"]))
import promptembedder
for found in pkgutil.walk_packages(promptembedder.__path__, "promptembedder."):
    if found.name.split(".")[1] in ("evaluation", "serving") or found.name.endswith(("__main__", "ray_runner")):
        continue
    importlib.import_module(found.name)
print([name for name in promptembedder.__all__ if getattr(promptembedder, name, None) is None])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
