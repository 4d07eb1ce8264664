"""Files in, vectors out."""
