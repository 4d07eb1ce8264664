"""Files of a repository on the hub, fetched once and kept in the hub's cache."""

from __future__ import annotations

from pathlib import Path

from promptembedder.errors import PromptEmbedderError


def fetched(
    hub_id: str, patterns: list[str], revision: str | None = None, *, what: str = "model", advice: str | None = None
) -> tuple[Path, str | None]:
    """Fetch files of a hub id, or find them in the cache.

    Args:
        hub_id: `owner/name`.
        patterns: of the names of the files.
        revision: branch, tag or commit.
        what: kind of repository, for the error.
        advice: for the error; unset: check the id, the network and HF_TOKEN.

    Returns:
        The folder, and the commit.

    Raises:
        PromptEmbedderError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            # Some repositories hold the same weights a second time, in their maker's layout.
            snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"])
        )
    except Exception as error:  # the HTTP client and its errors depend on the version
        advice = advice or "check the id, your network and HF_TOKEN"
        why = type(error).__name__
        raise PromptEmbedderError(f"{what} {hub_id} could not be fetched from the hub ({why}); {advice}") from error
    return folder, folder.name if len(folder.name) == 40 else None
