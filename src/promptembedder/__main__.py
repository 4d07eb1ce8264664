"""`python -m promptembedder`: the same as the `promptembedder` command."""

from promptembedder.cli import main

main()
