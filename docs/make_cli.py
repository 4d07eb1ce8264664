"""Print docs/cli.md from the commands' own help: python docs/make_cli.py > docs/cli.md."""

from __future__ import annotations

import typer

from promptembedder.cli.app import app


def reference() -> str:
    """The help of every command, as Markdown."""
    group = typer.main.get_command(app)
    context = group.make_context("promptembedder", [], resilient_parsing=True)
    parts = ["# Command line\n\nMade by `python docs/make_cli.py > docs/cli.md`; a test keeps it up to date.\n"]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        inner.max_content_width = inner.terminal_width = 100
        parts.append(f"## promptembedder {name}\n\n```text\n{command.get_help(inner).strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
