"""Move a trained model to another backbone."""
