"""Evaluation with mteb's own task classes and metrics (needs the extra `evaluate`)."""

from promptembedder.errors import needs_extra

with needs_extra("evaluate", "evaluation"):
    from promptembedder.evaluation.compare import Column, Comparison, compare, markdown, read_columns, write_report
    from promptembedder.evaluation.encoder import BASELINES, InstructedEncoder, open_model, plain_reader
    from promptembedder.evaluation.run import EvaluationResult, evaluate
    from promptembedder.evaluation.tasks import QUICK, hub_tasks, local_tasks, read_instructions

__all__ = [
    "BASELINES",
    "QUICK",
    "Column",
    "Comparison",
    "EvaluationResult",
    "InstructedEncoder",
    "compare",
    "evaluate",
    "hub_tasks",
    "local_tasks",
    "markdown",
    "open_model",
    "plain_reader",
    "read_columns",
    "read_instructions",
    "write_report",
]
