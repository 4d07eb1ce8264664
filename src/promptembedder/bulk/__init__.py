"""Files in, vectors out; bridges between two models' vectors."""

from promptembedder.bulk.encode_file import encode_file

__all__ = ["encode_file"]
