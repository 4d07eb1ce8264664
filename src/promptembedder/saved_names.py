"""Names and identities in a saved model's folder. Imports nothing, so that a folder is read without a library."""

from __future__ import annotations

from dataclasses import dataclass

FORMAT_VERSION = 1
# What a run or transfer began with, in its folder.
BEGUN_FILE = "begun.yaml"
CONFIG_FILE = "promptembedder.json"
ALIGNMENT_FILE = "alignment.safetensors"
# Beside the alignment's matrices: what is subtracted from embeddings.
CENTRE = "centre"
PROMPTER_FOLDER = "prompter"
PROMPTER_WEIGHTS = "adapter_model.safetensors"
# In the settings file: another saved model that holds the prompter's weights.
SHARED_PROMPTER = "shared_prompter"


@dataclass(frozen=True)
class BaseModels:
    """Identity of the two LLMs under a model: what to open, and what it must turn out to be."""

    prompter: str
    prompter_revision: str | None
    prompter_fingerprint: str
    backbone: str
    backbone_revision: str | None
    backbone_fingerprint: str
