"""What comes from the hub: named files of a repository, fetched once and kept in its cache."""

from __future__ import annotations

from pathlib import Path

from promptembedder.errors import PromptEmbedderError
from promptembedder.saved_names import CONFIG_FILE


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


def saved_model(hub_id: str, revision: str | None = None) -> Path | None:
    """A saved model's folder, fetched from the hub: settings and safetensors, no code and no pickle.

    Args:
        hub_id: `owner/name`.
        revision: branch, tag or commit; unset: the main branch.

    Returns:
        None where there is no such model, or it is not one of ours.

    Raises:
        PromptEmbedderError: it is one of ours, and not all of it can be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # without a network it would tell of every try
    try:
        hf_hub_download(hub_id, CONFIG_FILE, revision=revision)
    except Exception:  # as above; whatever it is, there is no model to open
        return None
    finally:
        logging.set_verbosity(before)
    return fetched(hub_id, ["*.json", "*.safetensors", "*.md"], revision)[0]
