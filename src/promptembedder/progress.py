"""Progress bars and messages on standard error, and `--quiet`, which turns both off."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_state = {"quiet": False}


def set_quiet(quiet: bool) -> None:
    """Turn bars and messages of this process off, or on again."""
    _state["quiet"] = quiet


def is_quiet() -> bool:
    """Whether bars and messages are off."""
    return _state["quiet"]


def say(text: str) -> None:
    """Print a message to standard error, unless quiet."""
    if not is_quiet():
        print(text, file=sys.stderr)


def bar(
    items: Iterable[T] | None = None,
    desc: str | None = None,
    *,
    total: int | None = None,
    unit: str = "it",
    leave: bool = True,
    show: bool = True,
) -> Any:
    """A `tqdm` bar that shows on a terminal only, so that output to a file holds no carriage returns.

    Args:
        items: what to go through; unset for a bar that is moved by its `update`.
        desc: the text before the bar.
        total: how many items there are; unset: `len(items)` where that is known.
        unit: name of an item.
        leave: keep the bar on the screen when it is full.
        show: off: no bar at all.

    Returns:
        The bar: an iterable of `items`, and a context manager.

    Example:
        >>> list(bar(range(3), "Counting"))
        [0, 1, 2]
    """
    from tqdm import tqdm

    # None: tqdm looks whether standard error is a terminal.
    disable = None if show and not is_quiet() else True
    return tqdm(items, desc=desc, total=total, unit=unit, leave=leave, disable=disable, dynamic_ncols=True)
