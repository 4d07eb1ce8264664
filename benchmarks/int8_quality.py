"""What reading texts in dynamic int8 does to quality: the same model, both ways, on mteb's evaluators.

    python benchmarks/int8_quality.py MODEL --data FOLDER --report benchmarks/results/int8-quality-cpu

Any saved model of layout `suffix`. The last line is one JSON object: the mean of both and the largest loss of a task.
"""

from __future__ import annotations

import json

import promptembedder
from kept_results import command, parsed, parser_of
from promptembedder import evaluation
from promptembedder.model.module import soft_prompt_module


def main() -> None:
    parser = parser_of(__doc__, "runs/int8-quality")
    parser.add_argument("model", help="folder or name of a saved model")
    parser.add_argument("--task", nargs="+", help="unset: the quick suite")
    arguments = parsed(parser)
    data = arguments.data
    given = evaluation.read_instructions(data / "instructions.json")
    revision = evaluation.open_model(arguments.model).mteb_model_meta.revision
    for text_pass in ("same", "int8"):
        model = promptembedder.load(arguments.model)
        soft_prompt_module(model).backbone.text_pass = text_pass
        encoder = evaluation.InstructedEncoder(model, f"text-pass/{text_pass}", str(revision))
        tasks = evaluation.local_tasks(data, arguments.task, instructions=given, quick=True)
        evaluation.evaluate(encoder, tasks, arguments.output, batch_size=64)
    places = [arguments.output / "results" / f"text-pass__{name}" / str(revision) for name in ("same", "int8")]
    comparison = evaluation.compare(evaluation.read_columns(places), to="same")
    if arguments.report:
        evaluation.write_report(comparison, arguments.report, command())
    print(evaluation.markdown(comparison))
    same, int8 = (comparison.columns[name].scores for name in ("same", "int8"))
    figures = {name: round(comparison.mean(name), 2) for name in ("same", "int8")}
    print(json.dumps(figures | {"largest_loss": round(max(same[task] - int8[task] for task in same), 2)}))


if __name__ == "__main__":
    main()
