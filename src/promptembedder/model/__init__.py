"""The embedder: made, read, written, used."""
