"""Train a model on rows: `train` builds, warms up and fits; `fit` is the loop alone."""

from promptembedder.errors import needs_extra

with needs_extra("train", "training"):
    from promptembedder.training.fit import fit
    from promptembedder.training.train import train

__all__ = ["fit", "train"]
