"""Move a trained model to another backbone."""

from promptembedder.errors import needs_extra

with needs_extra("train", "a transfer"):
    from promptembedder.transfer.transfer import transfer

__all__ = ["transfer"]
