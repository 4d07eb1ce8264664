"""Settings: YAML round trip, overrides, and what every bad setting is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ByteSize

from promptembedder import ModelConfig, PromptEmbedderError, RunConfig
from promptembedder.config import dump_yaml, parse
from promptembedder.data.settings import DataConfig, DataFile
from promptembedder.training.settings import EvaluationConfig, TrainingConfig, WarmStartConfig, load_run

OTHER_THAN_DEFAULT = RunConfig(
    model=ModelConfig(layout="prefix", readout="mean", softmax_temperature=0.25, text_template="«{text}»: ü\n#"),
    data=DataConfig(
        root="/données",
        files=(
            DataFile(path="a.jsonl", weight=0.5, instruction="yes", asymmetric=True, max_rows=7),
            DataFile(path="b"),
        ),
        max_negatives=0,
    ),
    training=TrainingConfig(
        matryoshka_dims=(8, 16),
        prompter_learning_rate=1e-7,
        warm_start=WarmStartConfig(steps=0, cue='2024-01-01: "'),
        early_stop_patience=3,
        mask_false_negatives=True,
    ),
    evaluation=EvaluationConfig(dev="null", test="1e-4", every_steps=1),
)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., RunConfig]:
    """`read(yaml, *overrides)` through a file."""

    def load(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run(path, overrides)

    return load


@pytest.mark.parametrize("config", [RunConfig(), OTHER_THAN_DEFAULT], ids=["defaults", "others"])
def test_yaml_round_trip(read: Callable[..., RunConfig], config: RunConfig) -> None:
    assert read(dump_yaml(config)) == config


def test_an_empty_file_is_all_defaults(read: Callable[..., RunConfig]) -> None:
    assert read("# nothing\n") == RunConfig()


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("training.max_steps=3", "training", "max_steps", 3),
        ("training.prompter_learning_rate=1e-4", "training", "prompter_learning_rate", 1e-4),
        ("training.temperature=0.1", "training", "temperature", 0.1),
        ("training.matryoshka_dims=[8, 16]", "training", "matryoshka_dims", (8, 16)),
        ("training.mask_false_negatives=true", "training", "mask_false_negatives", True),
        ("training.warm_start.steps=0", "training", "warm_start", WarmStartConfig(steps=0)),
        ("training.text_state_cache=8GiB", "training", "text_state_cache", ByteSize(8 * 2**30)),
        ("training.early_stop_patience=null", "training", "early_stop_patience", None),
        ("evaluation.test=sts/test.jsonl.gz", "evaluation", "test", "sts/test.jsonl.gz"),
        ("model.text_template=a = {text}", "model", "text_template", "a = {text}"),
        ("model.text_template={text}", "model", "text_template", "{text}"),
        ('model.text_template=This : "{text}"', "model", "text_template", 'This : "{text}"'),
        ("model.text_template={text} # one", "model", "text_template", "{text} # one"),
        ("model.default_instruction=Topic: which one?", "model", "default_instruction", "Topic: which one?"),
        ("model.default_instruction=Say which # it has", "model", "default_instruction", "Say which # it has"),
        ("training.output=2024-02-30", "training", "output", "2024-02-30"),
        ("data.files=[{path: a.jsonl, weight: 2}]", "data", "files", (DataFile(path="a.jsonl", weight=2.0),)),
    ],
)
def test_override(read: Callable[..., RunConfig], override: str, section: str, name: str, value: object) -> None:
    found = getattr(getattr(read("", override), section), name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_replace_only_what_they_name_and_the_last_one_wins(read: Callable[..., RunConfig]) -> None:
    text = "training: {max_steps: 7, batch_size: 5, warm_start: {steps: 9, cue: word}}\ndata: {files: [{path: a}]}"
    config = read(text, "training.max_steps=1", "training.max_steps=2", "training.warm_start.steps=4")
    assert config.training == TrainingConfig(max_steps=2, batch_size=5, warm_start=WarmStartConfig(steps=4, cue="word"))
    assert config.data.files == (DataFile(path="a"),)


def test_a_whole_section_may_be_given(read: Callable[..., RunConfig]) -> None:
    assert read("", "data={files: [{path: rows.jsonl}]}").data.files == (DataFile(path="rows.jsonl"),)


def test_a_root_for_a_section_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: rows.jsonl")
    with pytest.raises(PromptEmbedderError, match=r"data = 'rows.jsonl'"):
        load_run(tmp_path / "run.yaml", root=str(tmp_path))


BAD_SETTINGS = {
    "unknown section": ("modell: {layout: prefix}", ["'modell'", "model, data, training, evaluation"]),
    "unknown name": ("training: {max_step: 3}", ["'training.max_step'", "max_steps", "batch_size"]),
    "unknown nested": ("training: {warm_start: {stesp: 3}}", ["'training.warm_start.stesp'", "steps, cue"]),
    "unknown in list": ("data: {files: [{path: a, wieght: 3}]}", ["data.files.0.wieght", "path, weight"]),
    "missing path": ("data: {files: [{weight: 3}]}", ["data.files.0.path", "required"]),
    "wrong type": ("training: {max_steps: many}", ["training.max_steps = 'many':", "valid integer"]),
    "fraction for int": ("training: {max_steps: 2.5}", ["training.max_steps = 2.5:", "valid integer"]),
    "number for text": ("model: {prompter: 5}", ["model.prompter = 5:", "valid string"]),
    "section is text": ("training: fast", ["training = 'fast':", "dictionary"]),
    "number for list": ("training: {matryoshka_dims: 8}", ["training.matryoshka_dims = 8:", "tuple"]),
    "millions of soft tokens": (
        "model: {num_soft_tokens: 1000000}",
        ["model.num_soft_tokens = 1000000:", "less than or equal to 512"],
    ),
    "no soft tokens": ("model: {num_soft_tokens: 0}", ["model.num_soft_tokens = 0:", "greater than or equal to 1"]),
    "temperature 0": ("model: {softmax_temperature: 0}", ["model.softmax_temperature = 0:", "greater than 0"]),
    "temperature < 0": ("model: {softmax_temperature: -1}", ["model.softmax_temperature = -1:", "greater than 0"]),
    "NaN": ("model: {softmax_temperature: .nan}", ["model.softmax_temperature = nan:", "finite number"]),
    "infinity": ("training: {temperature: .inf}", ["training.temperature = inf:", "finite number"]),
    "layout": ("model: {layout: infix}", ["model.layout = 'infix':", "'prefix' or 'suffix'"]),
    "no text": ("model: {text_template: 'a word'}", ["text_template", "'a word'", "{text} exactly once"]),
    "no line break": ("model: {text_template: '{text}\\nThe'}", ["text_template", "double quotes in YAML"]),
    "text twice": ("model: {text_template: '{text} {text}'}", ["text_template", "'{text} {text}'", "exactly once"]),
    "unreadable size": ("training: {text_state_cache: lots}", ["training.text_state_cache = 'lots':", "byte string"]),
    "unit unknown": ("training: {text_state_cache: 8 apples}", ["text_state_cache = '8 apples':", "byte unit"]),
    "no room": ("training: {text_state_cache: 0}", ["training.text_state_cache = 0:", "greater than 0"]),
    "batch of 1": ("training: {batch_size: 1}", ["training.batch_size = 1:", "greater than or equal to 2"]),
    "warmup of all": ("training: {warmup: 1}", ["training.warmup = 1:", "less than 1"]),
    "empty string": ("evaluation: {dev: ''}", ["evaluation.dev = '':", "at least 1 character"]),
    "no date": ("training: {output: 2024-02-30}", ["is not YAML: day"]),
    "a date": ("training: {output: 2024-01-01}", ["training.output", "2024", "valid string"]),
    "two at once": ("training: {loss: mse, batch_size: 0}", ["training.batch_size = 0:", "and 1 more"]),
}


@pytest.mark.parametrize(("text", "named"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_setting_is_told_by_name_value_and_what_is_valid(
    read: Callable[..., RunConfig], tmp_path: Path, text: str, named: list[str]
) -> None:
    message = _refusal(read, text)
    for part in [str(tmp_path / "run.yaml"), *named]:
        assert part in message


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.max_steps", ["'training.max_steps'", "section.name=value"]),
        ("training.max_steps=-1", ["training.max_steps = -1:", "greater than or equal to 0"]),
        ("training.max_steps=", ["training.max_steps = None:", "valid integer"]),
        ("training.warm_start.stesp=1", ["'training.warm_start.stesp'", "steps, cue"]),
        ("training.max_steps.x=1", ["training.max_steps.x", "'max_steps' is not a section"]),
        ("model.layout=[prefix", ["model.layout = '[prefix':", "'prefix' or 'suffix'"]),
        ("layout=prefix", ["'layout'", "model, data, training, evaluation"]),
        ("=5", ["'=5'"]),
    ],
)
def test_bad_override(read: Callable[..., RunConfig], override: str, named: list[str]) -> None:
    message = _refusal(read, "training: {max_steps: 3}", override)
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: b: c", ["not YAML", "line 1"]),
        ("a: [1,\n  2", ["not YAML", "line 2"]),
        ("model: !!python/object:os.system {}", ["not YAML", "os.system"]),
        ("- model\n- data\n", ["mapping of sections", "list"]),
        ("just text", ["mapping of sections", "str"]),
    ],
)
def test_file_that_is_no_config(read: Callable[..., RunConfig], tmp_path: Path, text: str, named: list[str]) -> None:
    message = _refusal(read, text)
    for part in [str(tmp_path / "run.yaml"), *named]:
        assert part in message


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"model: {backbone: caf\xe9}")
    for path, reason in [(tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory"), (latin, "utf-8")]:
        message = _refusal(load_run, path)
        assert str(path) in message
        assert reason in message


def test_parse_names_where_it_was_asked_from() -> None:
    assert _refusal(parse, ModelConfig, {"lora_rank": 0}, "saved.json").startswith("saved.json: lora_rank = 0")


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        RunConfig().training.max_steps = 3  # type: ignore[misc]


def _refusal(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(PromptEmbedderError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_empty_section_means_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training:\nmodel: {num_soft_tokens: 2}\n")
    assert load_run(tmp_path / "run.yaml").training == RunConfig().training


def test_root_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {root: other, max_negatives: 2}\n")
    config = load_run(tmp_path / "run.yaml", root="2024 #1")
    assert (config.data.root, config.data.max_negatives) == ("2024 #1", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", ["!!timestamp x", "!!bool x", "!!int ''", "!!float ''", "[" * 3000], ids=lambda value: value[:12]
)
def test_values_that_yaml_itself_cannot_make(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{output: {value}}}")
    with pytest.raises(PromptEmbedderError, match=f"^config {path} is not YAML: ") as caught:
        load_run(path)
    assert "\n" not in str(caught.value)
    path.write_text("{}")
    assert load_run(path, [f"training.output={value}"]).training.output == value  # words, not YAML


def test_values_of_any_size_are_shown_short(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    aliases = "".join(f"- &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12))
    for text in (
        f"training: {{max_steps: -0x{'f' * 5000}}}",  # more digits than Python prints
        f"unused:\n- &a0 [x]\n{aliases}model: {{layout: *a12}}",  # 9 to the 12th entries if written out
        f"model: {{layout: {'word ' * 1000}}}",
        "model: {lora_alpha: 32, lora_rank: null}",
    ):
        path.write_text(text)
        with pytest.raises(PromptEmbedderError) as caught:
            load_run(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1500
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ['training.output="a\\0b"', 'data.texts=["c", "a\\0b"]'])
def test_a_path_holds_no_nul(read: Callable[..., RunConfig], override: str) -> None:
    name = override.partition("=")[0]
    with pytest.raises(PromptEmbedderError, match=rf"{name}(\.1)? holds a NUL character"):
        read("", override)


def test_settings_that_name_each_other_many_times_are_looked_at_once(read: Callable[..., RunConfig]) -> None:
    levels = "".join(f"  l{n}: &l{n} [*l{n - 1}, *l{n - 1}, *l{n - 1}]\n" for n in range(1, 40))
    with pytest.raises(PromptEmbedderError, match="unknown setting"):
        read(f"data:\n  l0: &l0 [x]\n{levels}")
