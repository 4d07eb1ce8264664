"""Training rows, scored pairs and texts, from files or the hub, checked."""
