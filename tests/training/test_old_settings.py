"""Retired settings in YAML: ignored where they changed nothing, else refused by name with what to do; arguments."""

from __future__ import annotations

import pytest
import yaml

from promptembedder import ModelConfig, PromptEmbedderError, TransferConfig
from promptembedder.config import parse
from promptembedder.training.arguments import check_arguments
from promptembedder.training.settings import load_run
from promptembedder.training.train import train

NEUTRAL = {
    "model": {
        "lora_alpha": 32,
        "condition_on": "instruction",
        "text_pass": "same",
        "backbone_layers": None,
        "readout_layers": [],
        "centred": False,
        "instruction_guidance": 1.0,
        "instruction_template": None,
        "deep_soft_prompt": False,
        "deep_soft_prompt_rank": None,
    },
    "training": {
        "scale_alignment_rate": True,
        "soft_prompt_leaf": True,
        "train_alignment": True,
        "softmax_temperature_start": None,
        "schedule": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 5,
        "keep_checkpoints": 2,
        "save_every_steps": None,
    },
}
TRANSFER = {"backbone_layers": (None, 3), "distillation_temperature": (0.05, 0.1), "unfrozen_steps": (0, 20)}
CHANGED = [
    ("model", "lora_alpha", 16),
    ("model", "condition_on", "instruction_and_text"),
    ("model", "text_pass", "int8"),
    ("model", "backbone_layers", 12),
    ("model", "readout_layers", [3]),
    ("model", "centred", True),
    ("model", "instruction_guidance", 1.5),
    ("model", "instruction_template", "\n{instruction}\n"),
    ("model", "deep_soft_prompt", True),
    ("training", "scale_alignment_rate", False),
    ("training", "soft_prompt_leaf", False),
    ("training", "train_alignment", False),
    ("training", "softmax_temperature_start", 2.0),
    ("training", "schedule", "cosine"),
    ("training", "weight_decay", 0.01),
    ("training", "max_grad_norm", 0.5),
    ("training", "logging_steps", 1),
    ("training", "keep_checkpoints", 9),
    ("training", "save_every_steps", 20),
]
# What replaces a setting that became an argument of the library's trainer.
NOW = {
    "schedule": "lr_scheduler_type",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "logging_steps": "logging_steps",
    "keep_checkpoints": "save_total_limit",
    "save_every_steps": "save_steps",
}


def read(tmp_path, settings):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return load_run(tmp_path / "run.yaml")


def test_neutral_values_are_ignored(tmp_path):
    assert read(tmp_path, NEUTRAL) == read(tmp_path, {})
    neutral = {name: value for name, (value, _) in TRANSFER.items()}
    assert parse(TransferConfig, {"backbone": "x", **neutral}, "t") == TransferConfig(backbone="x")


@pytest.mark.parametrize(("section", "name", "value"), CHANGED)
def test_other_values_are_refused_by_name(tmp_path, section, name, value):
    with pytest.raises(PromptEmbedderError) as caught:
        read(tmp_path, {section: {name: value}})
    message = str(caught.value)
    assert f"{tmp_path / 'run.yaml'}: {section}.{name} = {value!r} is no longer a setting; " in message
    assert NOW.get(name, "") in message
    assert "\n" not in message
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(PromptEmbedderError, match=f"{section}.{name} = "):
        load_run(tmp_path / "empty.yaml", [f"{section}.{name}={yaml.safe_dump(value, default_flow_style=True)}"])


@pytest.mark.parametrize("name", TRANSFER)
def test_retired_settings_of_a_transfer(name):
    with pytest.raises(PromptEmbedderError, match=f"t: {name} = .* is no longer a setting; "):
        parse(TransferConfig, {"backbone": "x", name: TRANSFER[name][1]}, "t")


def test_deep_soft_prompts_of_low_rank_become_deep_rank(tmp_path):
    old = {"deep_soft_prompt": True, "deep_soft_prompt_rank": 8}
    assert read(tmp_path, {"model": old}).model == ModelConfig(deep_rank=8)


def test_alpha_may_be_twice_another_rank(tmp_path):
    assert read(tmp_path, {"model": {"lora_rank": 4, "lora_alpha": 8}}).model == ModelConfig(lora_rank=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wieght_decay": 0.1}, "arguments.wieght_decay is no argument of the trainer; nearest: weight_decay"),
        ({"max_steps": 3}, "arguments.max_steps has a setting of its own: training.max_steps"),
        ({"output_dir": "x"}, "arguments.output_dir has a setting of its own: training.output"),
        ({"seed": 3}, "arguments.seed has a setting of its own: training.seed"),
        ({"fp16": True}, "arguments.fp16 has a setting of its own: model.dtype"),
        *(
            ({name: None}, f"arguments.{name} is decided by the training itself")
            for name in ("prompts", "batch_sampler", "multi_dataset_batch_sampler", "save_strategy", "eval_strategy")
        ),
        ({"max_grad_norm": 0}, "arguments.max_grad_norm is 0, expected a positive number"),
        ({"lr_scheduler_type": "zigzag"}, "training.arguments: zigzag is not a valid SchedulerType"),
    ],
)
def test_arguments_that_cannot_be_set(run_config, tmp_path, arguments, message):
    with pytest.raises(PromptEmbedderError, match=message):
        check_arguments(arguments)
    with pytest.raises(PromptEmbedderError, match=message):
        train(run_config(arguments=arguments))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_arguments_reach_the_trainer(run_config, tmp_path):
    arguments = {"lr_scheduler_type": "constant", "logging_steps": 2, "save_steps": 1, "save_total_limit": 9}
    result = train(run_config(max_steps=4, warmup=0, prompter_learning_rate=1e-4, arguments=arguments))
    rates = [line["learning_rate"] for line in result.history if "learning_rate" in line]
    assert rates == pytest.approx([1e-4, 1e-4])
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 4
