"""Models that come with the package, opened by name."""

from __future__ import annotations

from pathlib import Path

from promptembedder.saved_names import CONFIG_FILE

PLACE = Path(__file__).parent / "models"


def names() -> list[str]:
    """Names that `load` and the commands take in place of a folder."""
    return sorted(settings.parent.name for settings in PLACE.glob(f"*/{CONFIG_FILE}"))


def folder_of(model: str | Path) -> Path:
    """The folder of a saved model, given as that folder or as the name of one that comes with the package.

    A saved model in a folder of that name goes first. What is neither is given back as it is.
    """
    folder = Path(model)
    return PLACE / folder if str(folder) in names() and not (folder / CONFIG_FILE).is_file() else folder


def hint() -> str:
    """What to add to an error about a model that is not there."""
    return f"; models by name: {', '.join(names())}" if names() else ""
