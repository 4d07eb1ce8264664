"""The `promptembedder` command: its verbs, and what every error looks like.

Bad input is one line on standard error and exit code 2. A signal that ends the command is one line and exit code 128
plus its number.
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from io import TextIOWrapper
from types import FrameType
from typing import Annotated, Any

import typer

from promptembedder import progress
from promptembedder.cli.arguments import Quiet, as_command, be_quiet, check_output, hide_bars
from promptembedder.cli.bridge import bridge
from promptembedder.cli.compare import compare
from promptembedder.cli.demo import demo
from promptembedder.cli.encode import encode
from promptembedder.cli.evaluate import evaluate
from promptembedder.cli.explain import explain
from promptembedder.cli.export import export
from promptembedder.cli.info import info
from promptembedder.cli.path import path
from promptembedder.cli.serve import serve
from promptembedder.cli.train import train
from promptembedder.cli.transfer import transfer
from promptembedder.errors import PromptEmbedderError

# Typer carries a click of its own, so the class of wrong usage is reached through one that it exports.
_UsageError: Any = typer.BadParameter.__base__

_ONE_STOP_SECONDS = 2.0
_GARBAGE_THRESHOLDS = (200_000, 20, 20)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Instruction-following text embeddings from a frozen LLM, by soft prompts that another LLM writes.",
)
for verb in (train, encode, serve, evaluate, transfer, export, bridge, compare, explain, info, path, demo):
    app.command()(as_command(verb))


def _print_version(asked: bool) -> None:
    if asked:
        check_output()
        print(f"promptembedder {version('promptembedder')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    quiet: Quiet = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options that may come before the command."""
    if context.invoked_subcommand is None:
        check_output()
        print(context.get_help())
        raise typer.Exit
    progress.set_quiet(False)
    if quiet:
        be_quiet()
    elif not sys.stderr.isatty():
        hide_bars()


def main() -> None:
    """Entry point of the `promptembedder` command."""
    _prepare_streams()
    # Libraries make a million objects that live to the end: looking for garbage among them takes seconds of a start,
    # and as long again when the process ends.
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    atexit.register(gc.freeze)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Deprecations inside the libraries are for this project to follow up, not for the user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    try:
        with _clean_stops():
            code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, because an error of Python's own flush at exit is no single line
    except BrokenPipeError:  # whoever reads our output has seen enough
        _discard_output()
        sys.exit(1)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        _flush_or_discard()
        _fail(message, 2)
    sys.exit(code)


def _prepare_streams() -> None:
    """Make standard streams safe to use, whatever terminal or service manager has opened them, or has not."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: a file that is opened later must not take its place and get stray output
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # `print` would turn to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process lives
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # tokens of any script, on a terminal that has few


def _flush_or_discard() -> None:
    """Leave nothing for Python to write at exit where it cannot be written, such as to a disk that is full."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _discard_output()


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _clean_stops() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as an error does, so that what it was writing is removed."""
    last = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        # A session ends with both at once: the second must not interrupt the end. A later one is another try, because
        # Python drops an exception that comes up where an object is finalized.
        if time.monotonic() - last < _ONE_STOP_SECONDS:
            return
        last = time.monotonic()
        os.write(2, f"promptembedder: stopped by {signal.Signals(number).name}\n".encode())
        raise SystemExit(128 + number)

    numbers = [
        number
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None))
        if number is not None and signal.getsignal(number) == signal.SIG_DFL  # `nohup` ignores the second
    ]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) == stop:
                signal.signal(number, signal.SIG_DFL)


def _message(error: Exception) -> str | None:
    """One line for an error of the caller or of the machine; None for one of ours."""
    if isinstance(error, _UsageError):
        command = "promptembedder" if error.ctx is None else error.ctx.command_path
        return f"{error.format_message()} (see {command} --help)"
    if isinstance(error, PromptEmbedderError):
        return str(error)
    if isinstance(error, OSError):  # such as a folder that may not be looked into, or a disk that is full
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror or error}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return "out of memory on the device; use smaller batches (--batch-size, training.batch_size)"
    return None


def _fail(message: str, code: int) -> None:
    print(f"promptembedder: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
