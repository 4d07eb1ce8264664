"""Writes cut short, run by `test_killed.py`: one process opens the libraries, and a fork of it does each write.

A fork ends at the n-th file operation, for n = 1, 2, ... until one is through. It is killed, or stopped by SIGTERM as
the command takes it, or the disk is full. Python's audit events tell of file operations before they happen. A limit on
the size of files is another way to end: it stops writes in their middle, those of other languages, too.

    python killed_run.py FOLDER LLM_FOLDER SCENARIO...

prints a JSON line for each scenario and way to end: how often it ended so, and what was wrong.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from promptembedder import ModelConfig, PromptEmbedderError, atomic, build, save

CHANGES = {"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlopen"}
MAKES = {"os.rename", "os.mkdir", "os.link"}
SIZES = (0, 100, 600, 3000)
Files = dict[str, bytes]


class Scenario(NamedTuple):
    """What is there before, and the write.

    Attributes:
        prepare: makes what is there before.
        write: what is cut short.
        apart: its files are whole each by itself.
        varying: its files hold a time.
    """

    prepare: Callable[[Path], Any]
    write: Callable[[Path], Any]
    apart: bool = False
    varying: bool = False


def files(folder: Path) -> Files:
    """Content by relative path of all files in no scratch folder; locks, and folders without a file, hold nothing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if ".promptembedder-" not in name and not name.endswith(".lock") and path.is_file():
            found[name] = path.read_bytes()
    return found


def left_over(folder: Path) -> list[Path]:
    return list(folder.rglob(".promptembedder-*"))


def end_at(n: int, folder: Path, how: str) -> None:
    """End this process at its n-th change below a folder; a full disk stays full."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        makes = event in MAKES
        if event == "open":
            makes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        elif event not in CHANGES:
            return
        place = arguments[0]
        if event == "open" and not makes:
            return
        if event != "ctypes.dlopen" and not str(place).startswith(str(folder)):
            return
        if how == "full":
            seen += makes
            if makes and seen >= n:
                raise OSError(28, "No space left on device", str(place))
            return
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGTERM)

    sys.addaudithook(hook)


def in_a_fork(scenario: Scenario, work: Path, how: str, n: int, says: Path) -> int:
    """Do the write; 0 if it is through, 2 if it is refused in one line, else as the process ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    signal.alarm(60)  # one that hangs is a fault
    try:
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZES[n - 1], SIZES[n - 1]))
        else:
            end_at(n, work, how)
        if how == "stopped":
            from promptembedder.cli.app import _clean_stops

            with _clean_stops():
                scenario.write(work)
        else:
            scenario.write(work)
        code = 0
    except PromptEmbedderError as error:
        says.write_text(str(error)) if how != "limit" else None
        code = 2 if "\n" not in str(error) else 1
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def wrong(scenario: Scenario, found: Files, before: Files, after: Files) -> str:
    """What of a folder's content is neither old nor new."""
    if found in (before, after):
        return ""
    if not scenario.apart:
        return f"neither old nor new: {sorted(found)}"
    for name, content in found.items():
        if ".in_use-" in name:  # of the process that was killed; the next one removes it
            continue
        if scenario.varying and name not in before:
            try:
                [json.loads(line) for line in content.splitlines()] if name.endswith("l") else json.loads(content)
            except ValueError:
                return f"{name} is cut short" if name.endswith(("json", "jsonl")) else ""
        elif content not in (before.get(name), after.get(name)):
            return f"{name} is neither old nor new"
    return ""


def run(name: str, scenario: Scenario, place: Path, how: str) -> dict[str, Any]:
    ended, faults, began = 0, [], time.monotonic()
    prepared, expected, work, says = (place / part for part in ("prepared", "expected", "work", "says"))
    prepared.mkdir(parents=True)
    scenario.prepare(prepared)
    shutil.copytree(prepared, expected)
    scenario.write(expected)
    before, after = files(prepared), files(expected)
    for n in range(1, 1 + len(SIZES) if how == "limit" else 400):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(prepared, work)
        code = in_a_fork(scenario, work, how, n, says)
        if how != "limit" and code == 0:
            break
        ended += code != 0
        if code not in {"killed": (-9,), "stopped": (143,), "full": (2,), "limit": (0, 2)}[how]:
            faults.append(f"{n}: ended with {code}")
        if how == "full" and code == 2 and "No space left" not in says.read_text():
            faults.append(f"{n}: {says.read_text()}")
        if fault := wrong(scenario, files(work), before, after):
            faults.append(f"{n}: {fault}")
        if how != "killed" and left_over(work):
            faults.append(f"{n}: left {left_over(work)}")
        for scratch in left_over(work):
            atomic.clear_abandoned(scratch.parent)
        if left_over(work):
            faults.append(f"{n}: not cleared {left_over(work)}")
        if fault := wrong(scenario, files(work), before, after):
            faults.append(f"{n}: after it was cleared: {fault}")
    shutil.rmtree(place)
    seconds = round(time.monotonic() - began, 1)
    return {"scenario": name, "how": how, "ended": ended, "seconds": seconds, "faults": faults}


def scenarios(llm: str) -> dict[str, Callable[[], Scenario]]:
    def made(**changes: Any) -> Any:
        return build(ModelConfig(prompter=llm, backbone=llm, dtype="float32", **changes), device="cpu")

    def model() -> Scenario:
        old, new = made(linear_head=True), made(num_soft_tokens=3)

        def prepare(folder: Path) -> None:
            save(old, folder / "model")
            (folder / "model" / ".git").mkdir()
            (folder / "model" / ".git" / "HEAD").write_text("main")
            (folder / "model" / "notes.txt").write_text("mine")

        return Scenario(prepare, lambda folder: save(new, folder / "model"))

    def encoded(ending: str) -> Scenario:
        from promptembedder.bulk import encode_file as room
        from promptembedder.model import store

        opened = made()
        store.load = lambda *a, **k: opened
        base = Path(sys.argv[1]) / f"base-{ending}"
        save(opened, base)

        def write(folder: Path) -> None:
            room(base, str(folder / "texts.txt"), folder / "new" / f"v.{ending}", batch_size=1)

        return Scenario(lambda folder: (folder / "texts.txt").write_text("a text\n" * 40), write)

    def states() -> Scenario:
        from promptembedder.llms.state_cache import open_text_cache

        rows = [torch.full((2, 3), float(n)) for n in range(3)]

        def write(folder: Path) -> None:
            cache = open_text_cache(1 << 20, identity="one", folder=folder / "states")
            for n, row in enumerate(rows):
                cache.put(f"{n:040}", [row])

        return Scenario(lambda folder: None, write, apart=True)

    def conversion() -> Scenario:
        from safetensors.torch import save_file

        from promptembedder.llms import convert

        def fake(gguf: Path, output: Path, source: str) -> None:
            (output / "config.json").write_text("{}")
            save_file({"w": torch.ones(1000)}, output / "model.safetensors")

        convert._convert_gguf = fake
        part = Path(sys.argv[1]) / "part"
        part.write_bytes(b"gguf" * 1000)
        digest = convert.sha256_of([part])

        def write(folder: Path) -> None:
            os.environ[convert.CACHE_ENV] = str(folder / "cache")
            convert.converted("llm", digest, [part])

        return Scenario(lambda folder: None, write)

    def results() -> Scenario:
        from promptembedder import evaluation

        encoder = evaluation.InstructedEncoder(made(), "tiny/model", "one")
        data = Path(sys.argv[1]) / "data"
        tasks = evaluation.local_tasks(data)
        for task in tasks:
            task.load_data()
        return Scenario(
            lambda folder: None, lambda folder: evaluation.evaluate(encoder, tasks, folder), apart=True, varying=True
        )

    def bridge() -> Scenario:
        from promptembedder.bulk.bridge import Bridge

        def write(folder: Path, size: int = 9) -> None:
            Bridge(np.eye(size, dtype=np.float32), {}).save(folder / "b.safetensors")

        return Scenario(lambda folder: write(folder, 8), write)

    return {
        "model": model,
        "npy": lambda: encoded("npy"),
        "parquet": lambda: encoded("parquet"),
        "states": states,
        "conversion": conversion,
        "results": results,
        "bridge": bridge,
    }


if __name__ == "__main__":
    known = scenarios(sys.argv[2])
    for chosen in sys.argv[3:]:
        scenario_of = known[chosen]()
        for way in ("killed", "stopped", "full", "limit"):
            print(json.dumps(run(chosen, scenario_of, Path(sys.argv[1]) / chosen / way, way)), flush=True)
