"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from promptembedder import progress
from promptembedder.errors import PromptEmbedderError
from promptembedder.paths import expanded
from promptembedder.text import is_blank, is_unicode

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, messages or warnings.")]


def be_quiet() -> None:
    """No bars, messages or warnings from here on, of the libraries neither."""
    progress.set_quiet(True)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    hide_bars()


def hide_bars() -> None:
    """Turn off the bars of libraries; they look at these variables when they are imported, which commands do later."""
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")


def as_command(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb as a command: it takes `--quiet`, and `~` in paths is replaced, which shells leave in `--output=~/x`."""

    @functools.wraps(verb)
    def run(*, quiet: bool = False, **given: Any) -> None:
        if quiet:
            be_quiet()
        verb(**{name: _expanded(value) for name, value in given.items()})

    quiet = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
    signature = inspect.signature(verb, eval_str=True)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), quiet])  # type: ignore[attr-defined]
    run.__annotations__ = {**verb.__annotations__, "quiet": Quiet}
    return run


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return expanded(value) if isinstance(value, Path) else value


def expanded_text(value: str) -> str:
    """As `_expanded`, for an argument that may be something else than a path, such as `-`."""
    return str(expanded(value)) if value.startswith("~") else value


ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Saved model: folder, hub id, or name of one in the package.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; unset: the accelerator, if any.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DataFolder = Annotated[Path | None, typer.Option(help="Folder that relative paths of data files start from.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")]


def only_one(given: list[str] | None, name: str = "--instruction") -> str | None:
    """The value of an option that may be given once; of several, the library would take the last without a word.

    Raises:
        PromptEmbedderError: it is given more than once.
    """
    if given and len(given) > 1:
        raise PromptEmbedderError(f"{name} is given {len(given)} times; give further ones as --named NAME=TEXT")
    return given[0] if given else None


def check_instruction(instruction: str | None, name: str = "--instruction") -> None:
    """Refuse an instruction that is blank, such as an unset variable of the shell, or no valid Unicode.

    Raises:
        PromptEmbedderError: it is.
    """
    if instruction is not None and is_blank(instruction):
        raise PromptEmbedderError(f"{name} must be a sentence")
    if instruction is not None and not is_unicode(instruction):
        raise PromptEmbedderError(f"{name} is not valid UTF-8 text")


def named_instructions(named: list[str]) -> dict[str, str]:
    """Instructions by name, of options `--named NAME=TEXT`; an instruction may hold an equals sign, a name may not.

    Raises:
        PromptEmbedderError: a value has no name, or two have the same.
    """
    found: dict[str, str] = {}
    for given in named:
        name, sign, text = given.partition("=")
        if not sign:
            raise PromptEmbedderError(f"--named {given!r}: expected NAME=TEXT, such as topic='Find the topic.'")
        if name in found:
            raise PromptEmbedderError(f"--named {name}: the name is given twice")
        found[name] = text
    return found


def check_input(texts: str) -> None:
    """Refuse to read standard input that is closed.

    Raises:
        PromptEmbedderError: it is.
    """
    if texts == "-" and sys.stdin is None:
        raise PromptEmbedderError("standard input is closed; give a file of texts")


def check_output() -> None:
    """Refuse to make what standard output alone would show where that is closed.

    Raises:
        PromptEmbedderError: it is.
    """
    if sys.stdout is None:
        raise PromptEmbedderError("standard output is closed")
