"""Files of a repository on the hub, fetched once and kept in the hub's cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptembedder.errors import PromptEmbedderError


@dataclass(frozen=True)
class HubAccess:
    """How the hub is asked, where that is not left to its client's own settings.

    Attributes:
        token: of the hub, or whether to use the saved one.
        cache_folder: where files are kept.
        local_files_only: take what is in the cache, ask nobody.
    """

    token: str | bool | None = None
    cache_folder: str | None = None
    local_files_only: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """As the hub's client takes them."""
        named = {
            "token": self.token,
            "cache_dir": self.cache_folder,
            "local_files_only": self.local_files_only or None,
        }
        return {name: value for name, value in named.items() if value is not None}


AS_CONFIGURED = HubAccess()


def fetched(
    hub_id: str,
    patterns: list[str],
    revision: str | None = None,
    *,
    what: str = "model",
    advice: str | None = None,
    access: HubAccess = AS_CONFIGURED,
) -> tuple[Path, str | None]:
    """Fetch files of a hub id, or find them in the cache.

    Args:
        hub_id: `owner/name`.
        patterns: of the names of the files.
        revision: branch, tag or commit.
        what: kind of repository, for the error.
        advice: for the error; unset: check the id, the network and HF_TOKEN.
        access: how to ask the hub.

    Returns:
        The folder, and the commit.

    Raises:
        PromptEmbedderError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    # Some repositories hold the same weights a second time, in their maker's layout.
    wanted: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["consolidated*"]}
    try:
        with quiet_hub():
            folder = Path(snapshot_download(hub_id, revision=revision, **wanted, **access.arguments))
    except Exception as error:  # the HTTP client and its errors depend on the version
        advice = advice or "check the id, your network and HF_TOKEN"
        why = type(error).__name__
        raise PromptEmbedderError(f"{what} {hub_id} could not be fetched from the hub ({why}); {advice}") from error
    return folder, folder.name if len(folder.name) == 40 else None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Hide what the hub's client says of every try; without a network it tries many times, and then raises."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
