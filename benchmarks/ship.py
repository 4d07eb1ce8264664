"""Make a trained model small enough to come with the package: half precision, and a card.

    python benchmarks/ship.py runs/general-suffix/model smollm2-135m

Writes `src/promptembedder/models/NAME`. The text limit is raised to `--max-text-tokens`: in layout `suffix` nothing
that reads the text is trained, so longer ones than in training are no trouble. The card takes figures from `--results`,
the folder that `promptembedder evaluate NAME` wrote; run it once without, evaluate, and once more with.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from promptembedder import evaluation
from promptembedder.config import load_run
from promptembedder.evaluation.encoder import training_facts
from promptembedder.module import CONFIG_FILE

PLACE = Path(__file__).parents[1] / "src" / "promptembedder" / "models"
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


def card(name: str, folder: Path, results: Path | None) -> str:
    saved = json.loads((folder / CONFIG_FILE).read_text())
    facts = training_facts(folder) or {}
    run = load_run(folder / "config.yaml")
    lines = [
        "---",
        "library_name: sentence-transformers",
        "tags: [sentence-transformers, promptembedder, soft-prompts]",
        "license: apache-2.0",
        "---",
        f"# {name}",
        "",
        "Instruction-following embeddings from a frozen SmolLM2-135M-Instruct (Apache-2.0), by soft prompts that the "
        "same LLM with LoRA writes. Comes with promptembedder; the LLM itself does not.",
        "",
        "```python",
        "import promptembedder",
        "",
        f'model = promptembedder.load("{name}")',
        'embeddings = model.encode(["a text"], prompt="Identify the topic of the news article.")',
        "```",
        "",
        "## Training",
        "",
        f"Recipe `recipes/general-suffix.yaml`: layout `suffix`, {saved['model']['num_soft_tokens']} soft tokens, "
        f"{facts['steps']} steps of {run.training.batch_size} rows, one hard negative, texts cut at "
        f"{run.data.max_text_tokens} tokens, {facts['trained_parameters']:,} trained parameters, "
        f"{facts['seconds']:,.0f} s on two CPU cores. Weights are kept in float16.",
        "",
        "| file | source | licence as stated at the source |",
        "| --- | --- | --- |",
    ]
    for source in run.data.files:
        stem = Path(source.path).name.split(".")[0]
        lines.append(f"| {stem} | {' | '.join(LICENCES[stem])} |")
    lines += [
        "",
        "Files whose licence forbids commercial use were left out. Rows that occur in the evaluation tasks had been "
        "removed by whoever made the files.",
        "",
    ]
    if results is not None:
        comparison = evaluation.compare(evaluation.read_columns([results]))
        lines += [
            "## Results",
            "",
            f"`promptembedder evaluate {name} --data FOLDER` (quick suite, a sample drawn with a fixed seed), x 100:",
            "",
            evaluation.markdown(comparison),
            "",
        ]
    lines += [
        "## Limits",
        "",
        "English. A 135M LLM knows little: expect sentence similarity and intents to work, knowledge-heavy retrieval "
        "less so. Trained on few rows for minutes; instructions far from those of training are followed less well.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("name")
    parser.add_argument("--max-text-tokens", type=int, default=512)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    scratch = PLACE / f".{arguments.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(arguments.model, scratch)
    for file in scratch.rglob("*.safetensors"):
        save_file({name: value.to(torch.float16) for name, value in load_file(file).items()}, file)
    saved = json.loads((scratch / CONFIG_FILE).read_text())
    saved["model"]["max_text_tokens"] = arguments.max_text_tokens
    (scratch / CONFIG_FILE).write_text(json.dumps(saved, indent=2) + "\n")
    (scratch / "README.md").write_text(card(arguments.name, scratch, arguments.results))
    shutil.rmtree(PLACE / arguments.name, ignore_errors=True)
    scratch.rename(PLACE / arguments.name)
    size = sum(file.stat().st_size for file in (PLACE / arguments.name).rglob("*") if file.is_file())
    print(f"{PLACE / arguments.name}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
