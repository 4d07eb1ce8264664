"""Corpora in bulk: a cluster beside one process, kills, several instructions, a peer, and a corpus that has grown.

    python benchmarks/bulk.py smollm2-135m overhead instructions peer again --texts 4000 --output results.json
    python benchmarks/bulk.py tiny same memory kills again --texts 200000

Every part prints one JSON object.

- `same`: on a cluster of two nodes, and in one process; the largest difference of vectors, and whether ids agree.
- `memory`: peak of the whole process tree, shared memory (Ray's object store) counted once, at the texts and a tenth.
- `kills`: kill -9 of an actor, of a node and of the driver in turn, at random moments; ids must be complete and unique.
- `overhead`: texts a second in one process, on a cluster with one actor, with one of one thread, and with two of one
  thread each. The rate is that between the first and the last part, so that neither opening the model nor starting
  Ray counts.
- `instructions`: two instructions beside one.
- `peer`: a sentence-transformers pool of two processes with the instruction in words, over the same backbone, beside
  two actors under one and two instructions. Startup is left out on both sides.
- `again`: a second run with 1 % new rows beside the first, whole commands.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from made_up_texts import texts as made_up_texts
from made_up_texts import write_corpus

NAMED = {"topic": "Identify the topic of the text.", "tone": "Identify the tone of the text."}
WORDS_OF_64_TOKENS = 48


class Place:
    """A folder of corpora and outputs.

    Args:
        model: folder or name of a saved model.
        count: texts of the corpus.
        folder: where.
        words: most words of a text; unset: short ones.
    """

    def __init__(self, model: str, count: int, folder: Path) -> None:
        self.model, self.count, self.folder = model, count, folder

    def corpus(self, count: int | None = None, words: int | None = None) -> Path:
        count = count or self.count
        folder = self.folder / f"corpus-{count}-{words or 'short'}"
        if not folder.exists() and words is None:
            write_corpus(folder, count)
        elif not folder.exists():
            folder.mkdir()
            assert words is not None
            rows = enumerate(made_up_texts(count, least=words, most=words))
            with (folder / "a.jsonl").open("w") as file:
                file.writelines(json.dumps({"id": n, "text": text}) + "\n" for n, text in rows)
        return folder

    def command(self, corpus: Path, output: Path, *options: str, names: int = 1) -> list[str]:
        named = [f"--named={name}={text}" for name, text in list(NAMED.items())[:names]]
        device = [] if os.environ.get("BULK_DEVICE") else ["--device=cpu"]
        return [
            *(sys.executable, "-m", "promptembedder", "encode", self.model, str(corpus), "-o", f"{output}/"),
            *(*named, *device, *options),
        ]

    def run(self, corpus: Path, *options: str, names: int = 1, name: str = "out", keep: bool = False) -> dict[str, Any]:
        """Run a command; its seconds, and texts a second between the first and the last part."""
        output = self.folder / name
        if not keep:
            shutil.rmtree(output, ignore_errors=True)
        started = time.monotonic()
        subprocess.run(self.command(corpus, output, *options, names=names), check=True, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        return {"seconds": round(seconds, 2), "rate": round(rate_of(output), 1), "output": output}


def rate_of(output: Path) -> float:
    """Texts a second after the first part."""
    parts = sorted((path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in (output / "parts").iterdir())
    seconds = parts[-1][0] - parts[0][0]
    return sum(rows for _, rows in parts[1:]) / seconds if seconds else float("nan")


@contextmanager
def cluster(cpus: int = 2) -> Iterator[Any]:
    """Two nodes on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cpus, "object_store_memory": 300 << 20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.second = found.add_node(num_cpus=cpus, object_store_memory=300 << 20)
    found.wait_for_nodes()
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def same(place: Place) -> dict[str, Any]:
    corpus = place.corpus()
    place.run(corpus, name="alone")
    with cluster() as nodes:
        place.run(corpus, "--ray", nodes.address, "--workers=2", name="cluster")
    one, other = (pq.read_table(place.folder / name / "parts").sort_by("id") for name in ("alone", "cluster"))
    difference = float(np.abs(np.stack(one["topic"].to_numpy()) - np.stack(other["topic"].to_numpy())).max())
    ids = one["id"].to_pylist() == other["id"].to_pylist() == list(range(place.count))
    return {"texts": place.count, "ids_same": ids, "largest_difference": difference}


def peak_of(run: Any) -> int:
    """Peak bytes of this process and all below it while something runs: what each has alone, and shared once."""
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.is_set():
            alone, shared = 0, 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    memory = process.memory_info()
                    alone, shared = alone + memory.rss - memory.shared, max(shared, memory.shared)
            peak = max(peak, alone + shared)
            over.wait(0.5)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        run()
    finally:
        over.set()
        watching.join()
    return peak


def memory(place: Place) -> dict[str, Any]:
    found = {}
    for count in (place.count // 10, place.count):
        corpus = place.corpus(count)
        found[f"process_{count}"] = peak_of(lambda corpus=corpus: place.run(corpus))

        def on_cluster(corpus: Path = corpus) -> None:
            with cluster() as nodes:
                place.run(corpus, "--ray", nodes.address, "--workers=2")

        found[f"cluster_{count}"] = peak_of(on_cluster)
    few, many = place.count // 10, place.count
    ratios = {
        f"{kind}_ratio": round(found[f"{kind}_{many}"] / found[f"{kind}_{few}"], 3) for kind in ("process", "cluster")
    }
    return {**{name: f"{size / 2**20:.0f} MiB" for name, size in found.items()}, **ratios}


def block_actors() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [process.pid] * ("_BlockActor" in " ".join(process.cmdline()))
    return found


def kills(place: Place, runs: int = 10, seed: int = 1) -> dict[str, Any]:
    """Every run goes on until it is complete; a killed driver is started again."""
    corpus, drawn, found = place.corpus(), random.Random(seed), []
    place.run(corpus, name="alone")
    whole = len(list((place.folder / "alone" / "parts").iterdir()))
    for number in range(runs):
        kind, at = ("actor", "node", "driver")[number % 3], drawn.randint(1, whole - 2)
        output = place.folder / f"killed-{number}"
        shutil.rmtree(output, ignore_errors=True)
        with cluster() as nodes:
            command = place.command(corpus, output, "--ray", nodes.address, "--workers=2")
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while process.poll() is None and len(list(output.glob("parts/*.parquet"))) < at:
                time.sleep(0.02)
            hit = process.poll() is None
            if kind == "node":
                nodes.remove_node(nodes.second, allow_graceful=False)
            else:
                for pid in [process.pid] if kind == "driver" else block_actors()[:1]:
                    os.kill(pid, signal.SIGKILL)
            code = process.wait()
            again = 0
            while code:
                again += 1
                code = subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode
        ids = pq.read_table(output / "parts", columns=["id"])["id"].to_pylist()
        state = json.loads((output / "manifest.json").read_text())["state"]
        found.append(
            {
                **{"killed": kind, "while_running": hit, "after_parts": at, "of_parts": whole, "started_again": again},
                **{
                    "complete": set(ids) == set(range(place.count)),
                    "unique": len(set(ids)) == len(ids),
                    "state": state,
                },
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr)
        shutil.rmtree(output)
    return {"texts": place.count, "runs": found, "all_well": all(one["complete"] and one["unique"] for one in found)}


def overhead(place: Place, rounds: int = 1) -> dict[str, Any]:
    corpus = place.corpus()
    rates: dict[str, list[float]] = {"process": [], "one_actor": [], "one_of_one_thread": [], "two_of_one_thread": []}
    for _ in range(rounds):
        rates["process"].append(place.run(corpus)["rate"])
        rates["one_actor"].append(place.run(corpus, "--ray=local", "--workers=1")["rate"])
        for name, workers in (("one_of_one_thread", 1), ("two_of_one_thread", 2)):
            options = ("--ray=local", f"--workers={workers}", "--devices-per-worker=1")
            rates[name].append(place.run(corpus, *options)["rate"])
    middle = {name: float(np.median(values)) for name, values in rates.items()}
    return {
        "texts": place.count,
        "texts_a_second": rates,
        "one_actor_to_process": round(middle["one_actor"] / middle["process"], 3),
        "two_to_one_of_one_thread": round(middle["two_of_one_thread"] / middle["one_of_one_thread"], 3),
    }


def instructions(place: Place, rounds: int = 3) -> dict[str, Any]:
    corpus = place.corpus(min(place.count, 1024), WORDS_OF_64_TOKENS)
    one = [place.run(corpus, names=1)["rate"] for _ in range(rounds)]
    two = [place.run(corpus, names=2)["rate"] for _ in range(rounds)]
    return {"texts_a_second": {"one": one, "two": two}, "ratio": round(float(np.median(one) / np.median(two)), 3)}


def peer(place: Place, rounds: int = 1) -> dict[str, Any]:
    """The pool embeds in this process's children, one thread each."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    from promptembedder.llms.locate import locate
    from promptembedder.model.folder import folder_of, read_saved

    bases = read_saved(folder_of(place.model)).base_models
    folder = str(locate(bases.backbone, bases.backbone_revision).folder)
    words = Transformer(folder, model_kwargs={"dtype": torch.float32})
    words.tokenizer.pad_token = words.tokenizer.pad_token or words.tokenizer.eos_token
    pooling = Pooling(words.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[words, pooling, Normalize()], device="cpu")
    torch.set_num_threads(1)
    texts, corpus = list(made_up_texts(place.count)), place.corpus()
    rates: dict[str, list[float]] = {"pool": [], "pool_of_two": [], "one": [], "two": []}
    for _ in range(rounds):
        pool = model.start_multi_process_pool(["cpu", "cpu"])
        model.encode(texts[:64], pool=pool, prompt="warm", chunk_size=32)
        for name, count in (("pool", 1), ("pool_of_two", 2)):
            started = time.monotonic()
            for prompt in list(NAMED.values())[:count]:
                model.encode(texts, pool=pool, prompt=f"Instruct: {prompt}\nQuery: ", batch_size=32, chunk_size=256)
            rates[name].append(round(len(texts) / (time.monotonic() - started), 1))
        model.stop_multi_process_pool(pool)
        for name, count in (("one", 1), ("two", 2)):
            rates[name].append(place.run(corpus, "--ray=local", "--workers=2", names=count)["rate"])
    middle = {name: float(np.median(values)) for name, values in rates.items()}
    return {
        "texts": place.count,
        "texts_a_second": rates,
        "one_instruction": round(middle["one"] / middle["pool"], 3),
        "two_instructions": round(middle["two"] / middle["pool_of_two"], 3),
    }


def again(place: Place) -> dict[str, Any]:
    corpus = place.folder / "grown"
    shutil.rmtree(corpus, ignore_errors=True)
    write_corpus(corpus, place.count)
    first = place.run(corpus, name="again")["seconds"]
    nothing = place.run(corpus, name="again", keep=True)["seconds"]
    few = max(1, place.count // 100)
    write_corpus(corpus, few, files=1, seed=14, first=place.count)
    second = place.run(corpus, name="again", keep=True)["seconds"]
    ids = pq.read_table(place.folder / "again" / "parts", columns=["id"])["id"].to_pylist()
    return {
        **{"texts": place.count, "new": few, "first_seconds": first, "nothing_new_seconds": nothing},
        **{"second_seconds": second, "ratio": round(second / first, 4), "rows": len(ids), "unique": len(set(ids))},
    }


def report(entries: list[dict[str, Any]]) -> str:
    """The results as Markdown: figures, command and hardware of every part."""
    lines = ["# Corpora in bulk", ""]
    for entry in entries:
        machine = ", ".join(f"{name} {value}" for name, value in entry["hardware"].items())
        lines += [f"## {entry['part']}, {entry['model']}", "", f"`python {entry['command']}` on {machine}", ""]
        figures = {name: value for name, value in entry.items() if name not in ("part", "model", "command", "hardware")}
        lines += ["| figure | value |", "| --- | --- |"]
        lines += [
            f"| {name} | {len(value) if name == 'runs' else json.dumps(value)} |" for name, value in figures.items()
        ]
        for run in entry.get("runs", []):
            lines += [f"| a run | {', '.join(f'{name}: {value}' for name, value in run.items())} |"]
        lines += [""]
    return "\n".join(lines)


PARTS = {"same": same, "memory": memory, "kills": kills, "overhead": overhead, "instructions": instructions}
PARTS |= {"peer": peer, "again": again}


def tiny_model(folder: Path) -> str:
    """A random model of two layers, saved."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import write_tiny_lm  # type: ignore[import-not-found]
    from promptembedder import ModelConfig, build, save

    lm = str(write_tiny_lm(folder / "lm", "llama"))
    save(build(ModelConfig(prompter=lm, backbone=lm, dtype="float32", lora_rank=4), device="cpu"), folder / "tiny")
    return str(folder / "tiny")


def hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    ram = round(psutil.virtual_memory().total / 2**30)
    return {"cpu": name, "cores": os.cpu_count(), "ram_gb": ram, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a saved model, or tiny")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--output", type=Path, help="JSON file that results are added to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bulk-") as scratch:
        folder = Path(scratch)
        model = tiny_model(folder) if arguments.model == "tiny" else arguments.model
        place = Place(model, arguments.texts, folder)
        for name in arguments.parts:
            with_rounds = arguments.rounds is not None and name in ("overhead", "instructions", "peer")
            found = PARTS[name](place, **({"rounds": arguments.rounds} if with_rounds else {}))  # type: ignore[operator]
            entry = {
                "part": name,
                "model": arguments.model,
                "command": " ".join(sys.argv),
                **found,
                "hardware": hardware(),
            }
            print(json.dumps(entry), flush=True)
            if arguments.output is not None:
                before = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps([*before, entry], indent=2) + "\n")
                arguments.output.with_suffix(".md").write_text(report([*before, entry]))


if __name__ == "__main__":
    main()
