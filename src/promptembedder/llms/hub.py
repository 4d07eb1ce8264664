"""What comes from the hub: named files of a repository, fetched once and kept in its cache."""

from __future__ import annotations

from pathlib import Path

from promptembedder.errors import PromptEmbedderError


def fetched(
    hub_id: str, patterns: list[str], revision: str | None = None, *, what: str = "model", advice: str | None = None
) -> tuple[Path, str | None]:
    """Fetch files of a hub id, or find them in its cache.

    Args:
        hub_id: `owner/name`.
        patterns: of the files wanted.
        revision: branch, tag or commit.
        what: name of the thing, for an error.
        advice: what to do where it cannot be had; unset: check the id.

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
    except Exception as error:  # what its HTTP client raises, which is another one from version to version
        advice = advice or "check the id, your network and HF_TOKEN"
        why = type(error).__name__
        raise PromptEmbedderError(f"{what} {hub_id} could not be fetched from the hub ({why}); {advice}") from error
    return folder, folder.name if len(folder.name) == 40 else None
