"""`promptembedder path`."""

from __future__ import annotations

from promptembedder.cli.arguments import ModelPath


def path(model: ModelPath) -> None:
    """Print the folder of a saved model, for programs that open a model by its folder; opens no LLM."""
    from promptembedder.model.folder import describe, folder_of

    folder = folder_of(model)
    describe(folder)  # refuses what is no saved model
    print(folder.absolute())
