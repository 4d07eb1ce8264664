"""The package's import graph, imports inside functions counted: no circle, and rooms that know only those below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import promptembedder

PACKAGE = Path(promptembedder.__file__).parent
GROUND = {"atomic", "config", "digest", "errors", "lock", "paths", "progress", "text"}
# Names for users: `promptembedder.load` and the path that models of format 1 name.
FRONT = {"promptembedder", "promptembedder.module"}
BELOW = {
    "ground": set(),
    "llms": {"ground"},
    "model": {"llms", "ground"},
    "data": {"llms", "ground"},
    "training": {"model", "data", "llms", "ground"},
    "transfer": {"training", "model", "data", "llms", "ground"},
    "evaluation": {"model", "data", "llms", "ground"},
    "export": {"model", "data", "llms", "ground"},
    "serving": {"export", "model", "data", "llms", "ground"},
    "bulk": {"export", "model", "data", "llms", "ground"},
}
BELOW["demo"] = set(BELOW)
BELOW["cli"] = set(BELOW)
# Dev curves of a run stand in the reports of evaluations.
EXCEPTIONS = {("evaluation", "promptembedder.training.curves")}
MOST_FLOORS = 7
MOST_LINES = 430


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    if module in FRONT:
        return "front"
    room = module.split(".")[1]
    return {"__main__": "cli"}.get(room, "ground" if room in GROUND else room)


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a module, blocks for type checkers left out."""
    for child in ast.iter_child_nodes(node):
        if only_for_types(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from statements(other)
        else:
            yield child
            yield from statements(child)


def named_in(tree: ast.AST) -> set[str]:
    """Modules of the package that a module's import statements name."""
    found = set()
    for node in statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {name for name in found if name == "promptembedder" or name.startswith("promptembedder.")}


@cache
def imports() -> dict[str, set[str]]:
    """What each module of the package imports of it."""
    return {name: named_in(ast.parse(file.read_text(encoding="utf-8"))) for name, file in MODULES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names of a circle of imports, empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports of what a room must not know."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room_of(module) not in (room_of(other), "front")
        and room_of(other) not in BELOW[room_of(module)]
        and (room_of(module), other) not in EXCEPTIONS
    ]


def floors(graph: dict[str, set[str]]) -> int:
    """Length of the longest way down through rooms."""
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        if (room := room_of(module)) != "front":
            rooms.setdefault(room, set()).update({room_of(other) for other in others} - {room, "front"})
    height: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        height[room] = 1 + max((height[other] for other in rooms.get(room, ())), default=0)
    return max(height.values())


def test_every_module_stands_in_a_room_that_is_known():
    assert {room_of(module) for module in MODULES} <= {*BELOW, "front"}
    assert set().union(*imports().values()) <= MODULES.keys()


def test_no_circle_of_imports():
    assert circle(imports()) == []


def test_rooms_import_only_those_below():
    assert climbs(imports()) == []


def test_no_more_floors_than_planned():
    assert floors(imports()) <= MOST_FLOORS


def test_the_parts_of_a_model_do_not_know_each_other():
    parts = {f"promptembedder.model.{name}" for name in ("prompter", "alignment", "backbone")}
    assert {part: imports()[part] & parts - {part} for part in parts} == {part: set() for part in parts}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_fits_in_a_readers_head(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_what_is_found_here_would_be_found():
    """Imports inside functions count, those for type checkers do not; circles and climbs are seen."""
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import promptembedder.cli.app\n"
        "def f():\n    from promptembedder.training import workers, fit\n"
        "    import promptembedder.text\n"
    )
    named = {"promptembedder.training.workers", "promptembedder.training.fit", "promptembedder.text"}
    assert named_in(ast.parse(source)) == named
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    wrong = {"promptembedder.model.build": {"promptembedder.data.rows", "promptembedder.errors"}}
    assert climbs(wrong) == ["promptembedder.model.build imports promptembedder.data.rows"]
    assert climbs({"promptembedder.evaluation.run": {"promptembedder.training.train"}})
    assert not climbs({"promptembedder.evaluation.run": {"promptembedder.training.curves"}})
    assert floors({"promptembedder.cli.app": {"promptembedder.model.store"}, "promptembedder.model.store": set()}) == 2
