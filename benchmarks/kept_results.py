"""What the benchmarks share: the data folder, results kept from run to run, the command noted beside figures."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from promptembedder import atomic
from promptembedder.data.readers import DATA_ENV


def parser_of(description: str | None, output: str | None) -> argparse.ArgumentParser:
    """A parser with `--data`, `--report` and, where things are kept, `--output`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get(DATA_ENV), help=f"unset: ${DATA_ENV}")
    if output is not None:
        parser.add_argument("--output", type=Path, default=Path(output), help="everything made, kept from run to run")
    parser.add_argument("--report", type=Path, help="folder of figures, table and pictures")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with a data folder that is there."""
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error(f"give --data or set {DATA_ENV}")
    arguments.data = Path(arguments.data)
    if not arguments.data.is_dir():
        parser.error(f"no data folder at {arguments.data}")
    return arguments


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, from the file where it is there already."""
    if not path.is_file():
        atomic.write_text(path, json.dumps(make(), indent=1) + "\n")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def one_setting(output: Path, settings: dict[str, Any]) -> None:
    """Refuse an output folder whose results were made with other settings."""
    found = kept(output / "settings.json", lambda: settings)
    if different := [name for name in settings if found.get(name) != settings[name]]:
        sys.exit(f"{output} was made with other settings ({', '.join(different)}); choose another --output")


def command() -> str:
    """The command line of this run."""
    return " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
