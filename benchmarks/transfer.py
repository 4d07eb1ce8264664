"""Transfer of a trained prompter to unseen backbones, next to training from scratch and to LoRA, on STSBenchmark.

    PROMPTEMBEDDER_DATA=... python benchmarks/transfer.py --model runs/paraphrase-suffix/model \
        --backbones gemma-3-270m qwen2.5-coder-0.5b-instruct --report benchmarks/results/transfer-cpu

Rows, batches and loss are those of the recipe `paraphrase-suffix.yaml` for all parts. Dev is pairs of STSBenchmark dev,
scored every `--every` steps; test is STSBenchmark. Dev chooses the closed form and, of every part, the best weights.

- `hard_cue`: PromptEOL, untrained. `hard_cue_centred`: the same, centred on the rows' texts.
- `closed_form`: the prompter moved, embeddings centred on the rows' texts, nothing trained. `closed_form_plain`: not
  centred.
- `alignment_only`: W trained on the labelled rows. `unlabelled`: W trained on the rows' texts alone, after the old
  model's similarities, embeddings centred. `texts_then_rows`: on texts, then on rows, `--steps` of each, not centred.
- `from_scratch`: prompter and W trained anew for this backbone. `lora`: LoRA on it (`benchmarks/lora.py`). Both see the
  rows that W sees; only a transfer has what the prompter learnt on the old backbone.
- `few_rows`, with `--few PAIRS...`: W on rows, W on texts and then rows, and LoRA on that many labelled pairs alone,
  repeated for `--few-steps` steps. Half come from each of the recipe's first two files, in file order; those of the
  first have a labelled negative too. Seconds of W include the reading of every text. LoRA has the rate that was chosen
  on all rows. Sizes of earlier commands are in the report too.

LoRA's learning rate is the best of three on dev after `--choose` steps, for each backbone; `--lora-rate` sets it.
With `--states 40GiB` a backbone's text states are kept on disk from part to part. `alignment_only` runs before the
other trained parts, so its seconds include the reading of every text; those of `unlabelled` and `from_scratch` do not.
With `--quick PART...` the models of these parts are evaluated on the quick suite too.
Every part is kept in `--output` and not run again. `transfer_report.py` explains the figures. The last lines are one
JSON object per backbone.

And back: `--model OUTPUT/gemma-3-270m/from_scratch/model --backbones smollm2-135m-instruct` and another `--output`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

import lora
import promptembedder
import transfer_report
from kept_results import command, kept, one_setting, parsed, parser_of, say
from promptembedder import atomic, evaluation
from promptembedder.data.rows import load_training_data
from promptembedder.data.scored_pairs import read_scored_pairs
from promptembedder.data.settings import DataConfig
from promptembedder.llms.locate import locate
from promptembedder.model.baselines import hard_cue
from promptembedder.model.leaves import TrainingState
from promptembedder.model.module import soft_prompt_module
from promptembedder.training.curves import read_facts
from promptembedder.training.evaluators import pair_evaluator
from promptembedder.training.fit import text_cache
from promptembedder.training.settings import RunConfig, load_run
from promptembedder.training.train import train
from promptembedder.transfer.centring import sample_of_texts
from promptembedder.transfer.rebase import on_backbone
from promptembedder.transfer.report import TransferResult
from promptembedder.transfer.settings import TransferConfig
from promptembedder.transfer.transfer import transfer

RECIPE = Path(__file__).parents[1] / "recipes" / "paraphrase-suffix.yaml"
TEST = "sts/STSBenchmark.jsonl.gz"


def recipe(arguments: argparse.Namespace, backbone: str) -> RunConfig:
    """The recipe's settings on a backbone; the parts are scored on test by `tested`."""
    settings = list(arguments.set or [])
    if arguments.states:
        folder = place_of(arguments, backbone).resolve() / "states"
        settings += [f"training.text_state_cache={arguments.states}", f"training.text_state_folder={folder}"]
    config = load_run(RECIPE, settings, root=str(arguments.data))
    training = replace(config.training, max_steps=arguments.steps, batch_size=arguments.batch)
    evaluation = replace(config.evaluation, dev_pairs=arguments.pairs, every_steps=arguments.every, test=TEST)
    return replace(config, model=replace(config.model, backbone=backbone), training=training, evaluation=evaluation)


def untested(config: RunConfig) -> RunConfig:
    return replace(config, evaluation=replace(config.evaluation, test=None))


@contextmanager
def kept_states(arguments: argparse.Namespace, backbone: str, model: SentenceTransformer) -> Iterator[None]:
    """While inside, the model takes texts' states from the backbone's folder and keeps them there, with `--states`."""
    module = soft_prompt_module(model)
    with module.in_training(TrainingState(text_cache=text_cache(module, recipe(arguments, backbone).training))):
        yield


def tested(arguments: argparse.Namespace, backbone: str, model: SentenceTransformer) -> float:
    """Spearman x 100 on test."""
    config = recipe(arguments, backbone)
    test = pair_evaluator(config.evaluation, config.data.root, "test")
    assert test is not None
    with kept_states(arguments, backbone, model):
        return 100 * float(test(model)["test_spearman_cosine"])


def place_of(arguments: argparse.Namespace, backbone: str) -> Path:
    """Where everything of a backbone goes; it may be a path or a hub id."""
    return Path(arguments.output / slug(backbone))


def slug(backbone: str) -> str:
    return re.sub(r"[^\w.-]+", "-", backbone).strip("-")


def moved(
    arguments: argparse.Namespace,
    backbone: str,
    name: str,
    texts: list[str] | None,
    *,
    rows: bool,
    config: RunConfig | None = None,
) -> dict[str, Any]:
    """Closed form, then W alone on texts, on rows or on one after the other; `config` is the recipe where unset."""
    config, output = untested(config or recipe(arguments, backbone)), place_of(arguments, backbone) / name
    resumed = any(output.glob("*/checkpoint-*"))
    if name == "alignment_only" and not resumed:
        # Its seconds are compared with LoRA's, which reads every text: none may have been read by an earlier run.
        shutil.rmtree(place_of(arguments, backbone) / "states", ignore_errors=True)
    files = () if texts is None else (plain_texts(arguments, backbone, name, texts),)
    result: TransferResult = transfer(
        promptembedder.load(arguments.model),
        TransferConfig(
            backbone=backbone,
            data=config.data if rows else DataConfig(root=config.data.root),
            texts=files,
            text_instructions=() if texts is None else (config.evaluation.instruction,),
            training=replace(config.training, output=str(output)),
            evaluation=config.evaluation,
        ),
        resume=resumed,
    )
    start, *trained = result.stages
    curve = [(0, start.seconds, start.dev), *(point for stage in trained for point in stage.curve)]
    test = tested(arguments, backbone, result.model)
    found = {"test": test, "dev": result.scores["dev"], "start": result.starts[0].name, "curve": curve}
    return found if texts is None else found | {"texts": trained[0].examples}


def untrained(arguments: argparse.Namespace, backbone: str) -> dict[str, Any]:
    """Test scores of the hard cue and of the closed form, each as it is and with the mean over some texts taken away.

    The cue's is taken from vectors of unit length; its hidden states are nearly all equally long.
    """
    config = recipe(arguments, backbone)
    old = promptembedder.load(arguments.model)
    module = soft_prompt_module(on_backbone(old, locate(backbone)))
    first, second, scores = read_scored_pairs(TEST, config.data.root)
    texts = texts_of_rows(arguments, backbone)
    sample = [text for text, _ in sample_of_texts(texts, [config.evaluation.instruction], config.training.seed)]
    one, other, some = (hard_cue(module, part, batch_size=64) for part in (first, second, sample))
    centre = some.mean(0)
    cues = {
        "hard_cue": spearman(one, other, scores),
        "hard_cue_centred": spearman(one - centre, other - centre, scores),
    }
    closed: dict[str, float] = {}
    for name, centred in (("closed_form_plain", False), ("closed_form", True)):
        result = transfer(
            old,
            TransferConfig(
                backbone=backbone,
                data=replace(DataConfig(root=config.data.root), max_text_tokens=config.data.max_text_tokens),
                texts=(plain_texts(arguments, backbone, "closed_form", texts),) if centred else (),
                text_instructions=(config.evaluation.instruction,),
                training=replace(config.training, output=str(place_of(arguments, backbone) / name), max_steps=0),
                evaluation=untested(config).evaluation,
            ),
        )
        closed[name] = tested(arguments, backbone, result.model)
        closed |= {f"{name}_dev": round(result.scores["dev"], 2)}
    starts = {start.name: round(start.dev or 0.0, 2) for start in result.starts}
    return {**cues, **closed, "starts_dev": starts}


def spearman(first_NE: NDArray[Any], second_NE: NDArray[Any], scores: list[float]) -> float:
    """Of cosines, x 100."""
    cosines_N = (first_NE * second_NE).sum(-1) / np.linalg.norm(first_NE, axis=-1) / np.linalg.norm(second_NE, axis=-1)
    return 100 * float(spearmanr(cosines_N, scores).statistic)


def plain_texts(arguments: argparse.Namespace, backbone: str, part: str, texts: list[str]) -> str:
    """A file of them."""
    path = place_of(arguments, backbone) / part / "texts.jsonl"
    atomic.write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path.resolve())


def scratch(arguments: argparse.Namespace, backbone: str) -> dict[str, Any]:
    """Prompter and W trained anew before the new backbone."""
    config = untested(recipe(arguments, backbone))
    output = place_of(arguments, backbone) / "from_scratch"
    prompter = soft_prompt_module(promptembedder.load(arguments.model)).settings.prompter
    model = replace(config.model, prompter=prompter)
    config = replace(config, model=model, training=replace(config.training, output=str(output)))
    result = train(config, resume=any(output.glob("checkpoint-*")))
    return {
        "test": tested(arguments, backbone, result.model),
        "dev": result.scores["dev"],
        "curve": result.curve(),
    }


def peer(arguments: argparse.Namespace, backbone: str) -> dict[str, Any]:
    config = recipe(arguments, backbone)
    output = place_of(arguments, backbone) / "lora" / "model"
    tried: dict[float, float] = {}
    for rate in lora.RATES if arguments.lora_rate is None else ():
        place = place_of(arguments, backbone) / f"lora-{rate:g}-{arguments.choose}-steps.json"
        tried[rate] = kept(place, partial(after_few_steps, config, rate, arguments.choose))["dev"]
        say(f"{backbone}: LoRA at {rate:g} has {tried[rate]:.2f} on dev after {arguments.choose} steps")
    chosen = arguments.lora_rate or max(tried, key=lambda rate: tried[rate])
    return trained_lora(config, chosen, output) | {"learning_rate": chosen, "tried": tried}


def trained_lora(config: RunConfig, rate: float, output: Path) -> dict[str, Any]:
    done = lora.train(config, learning_rate=rate, output=output, follow=True)
    test = replace(config, evaluation=replace(config.evaluation, dev=config.evaluation.test, dev_pairs=None))
    return {"test": lora.dev_score(done.model, test), "curve": done.curve}


def few_rows(arguments: argparse.Namespace, backbone: str) -> dict[int, dict[str, Any]]:
    """W and LoRA on a handful of labelled pairs, seen again and again; every part of it is kept on its own.

    Returns:
        By number of pairs, what each of `FEW_PARTS` came to, those of earlier commands included.
    """
    place = place_of(arguments, backbone)
    for wanted in arguments.few:
        config = of_few_rows(arguments, backbone, wanted)
        pairs = pairs_of(config)
        for part in FEW_PARTS:
            name = f"few_rows-{pairs}x{arguments.few_steps}-{part}"
            say(f"{backbone}: {pairs} labelled pairs, {part}")
            kept(place / f"{name}.json", partial(trained_on_few, arguments, backbone, part, name, config))
    found: dict[int, dict[str, Any]] = {}
    for path in place.glob(f"few_rows-*x{arguments.few_steps}-*.json"):
        _, size, part = path.stem.split("-")
        found.setdefault(int(size.split("x")[0]), {})[part] = json.loads(path.read_text(encoding="utf-8"))
    return {pairs: {part: found[pairs][part] for part in FEW_PARTS if part in found[pairs]} for pairs in sorted(found)}


def trained_on_few(
    arguments: argparse.Namespace, backbone: str, part: str, name: str, config: RunConfig
) -> dict[str, Any]:
    if part == "lora":
        place = place_of(arguments, backbone)
        rate = kept(place / "lora.json", partial(peer, arguments, backbone))["learning_rate"]
        return trained_lora(config, rate, place / name / "model")
    before = texts_of_rows(arguments, backbone) if part == "texts_then_rows" else None
    return moved(arguments, backbone, name, before, rows=True, config=config)


def of_few_rows(arguments: argparse.Namespace, backbone: str, pairs: int) -> RunConfig:
    """The recipe on that many labelled pairs, whose texts nobody has read before."""
    config = recipe(arguments, backbone)
    of_each = pairs // 2
    training = replace(
        config.training,
        max_steps=arguments.few_steps,
        batch_size=min(arguments.batch, of_each),
        text_state_cache=None,
        text_state_folder=None,
    )
    files = tuple(replace(file, max_rows=of_each) for file in config.data.files[:2])
    return replace(config, data=replace(config.data, files=files), training=training)


def pairs_of(config: RunConfig) -> int:
    """Labelled pairs: a row may have several positives."""
    data = load_training_data(config.data, config.model.document_instruction, config.training.seed)
    return sum(len(rows) for rows in data.datasets.values())


def after_few_steps(config: RunConfig, rate: float, steps: int) -> dict[str, float]:
    """LoRA's dev score after a few steps, none of which is kept."""
    with tempfile.TemporaryDirectory() as scratch:
        training = replace(config.training, max_steps=steps, output=f"{scratch}/model")
        return {"dev": lora.dev_score(lora.train(replace(config, training=training), learning_rate=rate).model, config)}


def quick(arguments: argparse.Namespace, backbone: str, part: str) -> dict[str, Any]:
    """The quick suite's scores of the model that a part left."""
    folder = place_of(arguments, backbone) / part / "model"
    name = f"{slug(backbone)}/{part}"
    if part == "lora":
        encoder = lora.encoder(recipe(arguments, backbone), folder, name, REVISION)
        states: AbstractContextManager[None] = nullcontext()
    else:
        model = promptembedder.load(folder)
        encoder = evaluation.InstructedEncoder(model, name, REVISION, training=read_facts(folder))
        states = kept_states(arguments, backbone, model)
    given = evaluation.read_instructions(arguments.data / "instructions.json")
    tasks = evaluation.local_tasks(arguments.data, instructions=given, quick=True)
    with states:
        result = evaluation.evaluate(encoder, tasks, arguments.output / "quick", batch_size=64)
    return {"mean": result.mean, "scores": result.scores}


def even(text: str) -> int:
    number = int(text)
    if number < 4 or number % 2:
        raise argparse.ArgumentTypeError(f"{number} cannot be shared by two files, a batch of at least 2 from each")
    return number


def texts_of_rows(arguments: argparse.Namespace, backbone: str) -> list[str]:
    """The anchors of the labelled rows, as plain texts."""
    config = recipe(arguments, backbone)
    data = load_training_data(config.data, config.model.document_instruction, config.training.seed)
    return sorted({text for rows in data.datasets.values() for text in rows["anchor"]})


PARTS: dict[str, Callable[[argparse.Namespace, str], dict[str, Any]]] = {
    "start": untrained,
    "alignment_only": lambda a, backbone: moved(a, backbone, "alignment_only", None, rows=True),
    "unlabelled": lambda a, backbone: moved(a, backbone, "unlabelled", texts_of_rows(a, backbone), rows=False),
    "texts_then_rows": lambda a, backbone: moved(a, backbone, "texts_then_rows", texts_of_rows(a, backbone), rows=True),
    "from_scratch": scratch,
    "lora": peer,
}
FEW_PARTS = ("alignment_only", "texts_then_rows", "lora")
QUICK = ("closed_form", "alignment_only", "unlabelled", "texts_then_rows", "from_scratch", "lora")
REVISION = "transfer"


def measured(arguments: argparse.Namespace, backbone: str) -> transfer_report.Measured:
    """Everything that the command asks for on one backbone."""
    place = place_of(arguments, backbone)
    parts = {}
    for name in (part for part in PARTS if part in arguments.parts):
        say(f"{backbone}: {name}")
        parts[name] = kept(place / f"{name}.json", partial(PARTS[name], arguments, backbone))
    few = few_rows(arguments, backbone)
    means = {}
    for part in arguments.quick:
        say(f"{backbone}: quick suite, {part}")
        means[part] = kept(place / f"quick_{part}.json", partial(quick, arguments, backbone, part))["mean"]
    return transfer_report.Measured(parts, few, means)


def main() -> None:
    parser = parser_of(__doc__, "runs/transfer-benchmark")
    parser.add_argument("--model", type=Path, required=True, help="the trained model, as the recipe makes it")
    parser.add_argument("--backbones", nargs="+", default=["gemma-3-270m", "qwen2.5-coder-0.5b-instruct"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=300, help="of dev")
    parser.add_argument("--every", type=int, default=10, help="steps between dev scores")
    parser.add_argument("--choose", type=int, default=15, metavar="STEPS", help="of the runs that pick LoRA's rate")
    parser.add_argument("--few", nargs="+", type=even, default=[], metavar="PAIRS", help="labelled pairs, even numbers")
    parser.add_argument("--few-steps", type=int, default=32, metavar="STEPS", help="of the runs on so few pairs")
    parser.add_argument("--lora-rate", type=float, help="LoRA's learning rate; unset: chosen")
    parser.add_argument("--states", metavar="SIZE", help="keep text states on disk, e.g. 40GiB")
    parser.add_argument("--set", nargs="+", metavar="SECTION.NAME=VALUE", help="change the recipe's settings")
    parser.add_argument("--quick", nargs="+", default=[], choices=QUICK, metavar="PART", help=", ".join(QUICK))
    arguments = parsed(parser)
    names = ("steps", "batch", "pairs", "every", "choose", "lora_rate", "states", "set")
    settings = {name: getattr(arguments, name) for name in names} | {"model": str(arguments.model.resolve())}
    one_setting(arguments.output, settings)
    backbones = {backbone: measured(arguments, backbone) for backbone in arguments.backbones}
    if arguments.report:
        transfer_report.write(arguments.report, command(), backbones)
    print(transfer_report.tables(backbones))
    for backbone, found in backbones.items():
        print(json.dumps({"backbone": backbone} | transfer_report.figures_of(found)))


if __name__ == "__main__":
    main()
