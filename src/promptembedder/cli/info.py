"""`promptembedder info`."""

from __future__ import annotations

import json

from promptembedder.cli.arguments import AsJson, ModelPath, check_output


def info(model: ModelPath, as_json: AsJson = False) -> None:
    """Show what a saved model is made of; opens no LLM."""
    check_output()
    from promptembedder.model.folder import describe

    facts = describe(model)
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        on_one_line = str(value).replace("\n", "\\n")
        print(f"{name:24} {on_one_line}")
