"""Evaluation with mteb's own task classes and metrics (needs the extra `evaluate`)."""

from promptembedder.evaluation.encoder import BASELINES, InstructedEncoder, open_model
from promptembedder.evaluation.run import EvaluationResult, evaluate
from promptembedder.evaluation.tasks import QUICK, hub_tasks, local_tasks

__all__ = [
    "BASELINES",
    "QUICK",
    "EvaluationResult",
    "InstructedEncoder",
    "evaluate",
    "hub_tasks",
    "local_tasks",
    "open_model",
]
