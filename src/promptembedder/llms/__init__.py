"""Find, convert, open and run a base LLM."""
