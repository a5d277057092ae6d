import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from trainer.api import train
from trainer.base.errors import UserError
from trainer.base.yaml_files import dump
from trainer.cli import RECIPES, parse_train, train_parser
from trainer.config import Config

FIELDS = [
    "model_name_or_path",
    "model_revision",
    "init",
    "max_length",
    "dropout",
    "attn_implementation",
    "trust_remote_code",
    "dataset_name",
    "dataset_config_name",
    "dataset_revision",
    "train_file",
    "objective",
    "class_weights",
    "pos_weight",
    "layerwise_lr_decay",
    "freeze_embeddings",
    "freeze_layers",
    "lr_scheduler_kwargs",
    "label_map",
    "eval_label_map",
    "max_samples_per_source",
    "source_weights",
    "early_stopping_patience",
    "early_stopping_threshold",
    "validation_file",
    "step_form",
    "test_file",
    "premise_column",
    "hypothesis_column",
    "label_column",
    "label_names",
    "max_train_samples",
    "max_eval_samples",
    "max_test_samples",
    "verify_data",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "train_batch_size",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "label_smoothing_factor",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "output_dir",
    "run_name",
    "seed",
    "data_seed",
    "bf16",
    "unpad",
    "tf32",
    "gradient_checkpointing",
    "torch_compile",
    "ddp_comm_hook",
    "exact_shards",
    "exact_threads",
    "deepspeed",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "preemption_signals",
    "skip_nonfinite",
    "backend",
    "ddp_timeout",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "metric_for_best_model",
    "load_best_model_at_end",
    "logging_steps",
    "report_to",
    "track_emissions",
    "country_iso_code",
    "write_report",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
]


def test_surface_is_frozen():
    """Adding a field is a decision: it is made here too."""
    assert sorted(field.name for field in dataclasses.fields(Config)) == sorted(FIELDS)


def test_precedence(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 3e-4\nseed: 5\n")
    config = parse_train(["--recipe", "allnli-100k", "--config", str(file), "--seed", "6"])
    assert (config.seed, config.learning_rate) == (6, 3e-4)  # command line, config file
    assert (config.bf16, config.adam_beta2, config.run_name) == (True, 0.999, "allnli-100k")  # recipe, default


def test_resolved_config_reads_back(tmp_path):
    config = parse_train(["--recipe", "allnli-100k", "--dropout", "0", "--label_names", "a,b"])
    (tmp_path / "config.yaml").write_text(dump(dataclasses.asdict(config)))
    assert parse_train(["--config", str(tmp_path / "config.yaml")]) == config


def test_flags_and_dashes():
    assert parse_train(["--recipe", "demo", "--bf16", "--learning-rate", "1e-4"]).bf16
    assert parse_train(["--recipe", "demo", "--tf32", "--bf16", "true"]).tf32
    assert not parse_train(["--recipe", "allnli-100k", "--bf16=false"]).bf16


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES.glob("*.yaml")])
def test_every_recipe_is_valid(recipe):
    assert parse_train(["--recipe", recipe]).run_name == recipe


def test_the_cards_hyperparameters():
    config = parse_train(["--recipe", "allnli-100k"])
    card = {
        "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64, "num_train_epochs": 1, "warmup_ratio": 0.1,
        "bf16": True, "learning_rate": 5e-5, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "lr_scheduler_type": "linear", "seed": 42,
        "gradient_accumulation_steps": 1, "label_smoothing_factor": 0.0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in card} == card


BAD = {
    "--lerning_rate 1": "did you mean '--learning_rate'",
    "--recipe alnli-100k": "did you mean 'allnli-100k'",
    "--learning_rate abc": "learning_rate",
    "--backend dpp": "did you mean 'ddp'",
    "--init pretraind": "pretrained",
    "--max_train_samples 1.5": "max_train_samples",
    "--max_train_samples 0": "max_train_samples must be above 0",
    "--dropout 1": "dropout must be at least 0 and below 1",
    "--learning_rate nan": "learning_rate must be a finite number",
    "--metric_for_best_model f2": "unknown metric_for_best_model 'f2'",
    "--metric_for_best_model f1": "metric_for_best_model f1 is no score of objective cross_entropy; use f1_macro",
    "--label_names [a,a]": "twice",
    "--config /nowhere.yaml": "/nowhere.yaml",
    "--load_best_model_at_end --eval_strategy no": "load_best_model_at_end needs eval_strategy",
    "--early_stopping_patience 3 --eval_strategy no": "early_stopping_patience needs eval_strategy",
    "--early_stopping_threshold 0.1": "without early_stopping_patience",
    "--objective mse --class_weights 1,2": "class_weights is for classes",
    "--pos_weight 2": "pos_weight is for objective binary_cross_entropy",
    "--label_map neutral": "neutral has no value",
    "--label_map a=x,a=y": "gives 'a' two values",
    "--label_map a=": "none of them empty",
    "--label_map a=b=c": "'a=b=c' has more than one =",
    "--label_map a=>x": "must look like a=x,b=y",
    "--test_file a.csv --test_file b.csv": "--test_file is given twice; give all of it at once, as --test_file a,b",
    "--max_steps 0": "max_steps must be positive",
    "--max_steps -20": "max_steps must be positive, or -1 for num_train_epochs, got -20",
    "--ddp_timeout 100000000000": "ddp_timeout must be above 0 and below",
    "--xyzzy 1": "unknown option '--xyzzy'; the nearest of",
    "--gradient_accumulation_steps 2": "follows from train_batch_size",
    "--seed 99999999999999999999": "below 9.22337e+18",
    "--output_dir=": "output_dir is empty",
    "--run_name ../x": "run_name '../x' must be a plain name",
    "--preemption_signals SIGTERMM": "did you mean 'SIGTERM'",
    "--save_total_limit 0": "save_total_limit must be above 0",
    "--skip_nonfinite 1 --deepspeed zero1": "does not work with DeepSpeed",
    "--data_seed -1": "data_seed must be at least 0",
    "stray": "stray",
    "--lr 1": "did you mean '--learning_rate'",
    "--epochs 3": "did you mean '--num_train_epochs'",
    "--optim sgd": "always AdamW",
    "--label_names a,b,": "none of them empty",
    "--bf16 perhaps": "perhaps",
    "--num_train_epochs inf": "num_train_epochs must be a finite number",
    "--save_total_limit none_": "save_total_limit must be a whole number",
    "--seed": "--seed",
    "--lora_r -1": "lora_r must be at least 0",
    "--lora_alpha 16": "lora_alpha does nothing while lora_r is 0; give --lora_r",
    "--lora_target_modules q_proj": "lora_target_modules does nothing while lora_r is 0",
    "--lora_r 8 --lora_alpha 0": "lora_alpha must be above 0",
    "--exact_shards 0": "exact_shards must be above 0",
    "--exact_shards 6": "exact_shards must be a power of two, got 6; the nearest are 4 and 8",
    "--exact_shards 128": "exact_shards 128 is more than the 64 pairs of train_batch_size",
    "--exact_shards 4 --train_batch_size null": "needs train_batch_size",
    "--exact_shards 4 --backend fsdp": "works with the backends single and ddp; fsdp adds",
    "--exact_shards 4 --backend deepspeed": "works with the backends single and ddp; deepspeed adds",
    "--exact_shards 4 --deepspeed zero1": "works with the backends single and ddp; deepspeed adds",
    "--exact_shards 4 --ddp_comm_hook bf16": "leave out ddp_comm_hook bf16",
    "--exact_shards 4 --torch_compile": "torch_compile chooses kernels by itself",
    "--exact_shards 4 --step_form captured": "leave out step_form captured",
    "--exact_threads 2": "exact_threads does nothing without exact_shards",
    "--exact_shards 4 --exact_threads 0": "exact_threads must be above 0",
    "--gpus 2": "crossrank launch local --nproc N -- train",
    "--nproc_per_node 2": "crossrank launch local --nproc N -- train",
    "--config ~no_such_user/x.yaml": "cannot read config file ~no_such_user/x.yaml",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_command_line(arguments):
    with pytest.raises(UserError) as caught:
        parse_train(["--recipe", "demo", *arguments.split()])
    assert BAD[arguments] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1", "did you mean 'learning_rate'"),
        ("recipe: demo", "unknown field 'recipe'; a recipe is no field: say --recipe NAME"),
        ("seed: x", "seed must be a whole number, got 'x'"),
        ("- learning_rate", "`field: value`"),
        ("- 1", "`field: value`"),
        ("a: [", "cannot read"),
        ("[]", "`field: value`"),
        ("false", "`field: value`"),
        ("0", "`field: value`"),
        ("max_steps: 1\nmax_steps: 2", 'line 2: found duplicate key "max_steps"'),
        ("\nseed: 'x", "line 2: found unexpected end of stream"),
        ("[" * 5000, "nested too deep"),
        ("seed: 1\n".encode("utf-16"), "no text in UTF-8"),
        ("max_train_samples: 0", "max_train_samples must be above 0"),
        ("output_dir: ''", "output_dir is empty"),
    ],
)
def test_bad_config_file_is_named(tmp_path, text, expected):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        parse_train(["--recipe", "demo", "--config", str(file)])
    assert expected in str(caught.value)
    assert str(file) in str(caught.value)
    assert "unicode string" not in str(caught.value)
    assert len(str(caught.value)) < 300


FILE_VALUES = {
    "learning_rate: 1e-5": ("learning_rate", 1e-5),
    "eval_strategy: no": ("eval_strategy", "no"),
    "seed: 010": ("seed", 10),
    "run_name: off": ("run_name", "off"),
    "run_name: '1e-5'": ("run_name", "1e-5"),
    "report_to: [tensorboard]": ("report_to", ["tensorboard"]),
    "report_to: none": ("report_to", []),
    "report_to: [none]": ("report_to", []),
    "label_names: a,b": ("label_names", ["a", "b"]),
    "warmup_steps: 1e2": ("warmup_steps", 100),
    "bf16: yes": ("bf16", True),
    "bf16: off": ("bf16", False),
    "save_total_limit: null": ("save_total_limit", None),
}


@pytest.mark.parametrize("text", FILE_VALUES)
def test_values_of_a_file_mean_what_they_say(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    name, value = FILE_VALUES[text]
    assert getattr(parse_train(["--recipe", "demo", "--config", str(tmp_path / "a.yaml")]), name) == value


@pytest.mark.parametrize("value", ["#1.csv", "null", "&x", "1e-5", "a: b", "- a", "[a", "true", "-x.csv", "'q'"])
def test_text_on_the_command_line_is_text(value):
    for name in ("train_file", "output_dir", "hub_model_id"):
        expected = [value] if name == "train_file" else value
        assert getattr(parse_train(["--recipe", "demo", f"--{name}", value]), name) == expected
        assert getattr(parse_train([f"--{name}={value}", "--recipe", "demo"]), name) == expected


BAD_FROM_PYTHON = {
    "lr_scheduler_type": "polynomials", "backend": "dpp", "eval_strategy": "epochs", "learning_rate": "fast",
    "seed": 1.5, "bf16": "maybe", "train_file": 3, "label_names": [1, 2], "max_steps": True, "init": None,
    "num_train_epochs": float("inf"), "weight_decay": float("nan"), "output_dir": ["a"], "label_names ": "a",
    "save_steps": np.array([1, 2]), "train_batch_size": pd.DataFrame({"a": [1, 2]}), "run_name": np.array(["a", "b"]),
    "save_strategy": pd.DataFrame({"a": [1, 2]}), "report_to": np.array([1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FROM_PYTHON)
def test_python_is_checked_as_the_command_line_is(name):
    with pytest.raises(UserError, match=name.strip()) as caught:
        parse_train(["--recipe", "demo"], {name: BAD_FROM_PYTHON[name]})
    assert "\n" not in str(caught.value)
    with pytest.raises((UserError, TypeError), match=name.strip()):
        Config(**{"dataset_name": "builtin", name: BAD_FROM_PYTHON[name]})


def test_python_s_own_types(tmp_path):
    config = parse_train(
        [], {"train_file": tmp_path / "a.csv", "label_names": "no,yes", "learning_rate": 1, "seed": "7"}
    )
    assert (config.train_file, config.label_names) == ([str(tmp_path / "a.csv")], ["no", "yes"])
    assert (config.learning_rate, config.seed) == (1.0, 7)
    fields = {"train_file": "a.csv", "label_names": pd.Series(["a", "b", "a"]).unique(), "max_steps": np.int64(5),
              "learning_rate": np.float32(0.5), "bf16": np.bool_(True), "seed": torch.tensor(7)}  # fmt: skip
    config = parse_train([], fields)
    assert (config.label_names, config.max_steps, config.seed) == (["a", "b"], 5, 7)
    assert (config.learning_rate, config.bf16, type(config.seed)) == (0.5, True, int)


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ([Config(dataset_name="builtin")], {"learning_rate": 1e-3}),
        ([Config(dataset_name="builtin")], {"recipe": "demo"}),
        (["demo"], {}),
        ([{"recipe": "demo"}], {}),
        ([], {"recipe": 3}),
        ([], {"recipe": "--help"}),
        ([], {"recipe": Path("dmo")}),
    ],
)
def test_train_takes_a_config_or_fields(given, fields):
    with pytest.raises(UserError, match=r"a Config and nothing else|recipe must be text|unknown recipe"):
        train(*given, **fields)


def test_own_data_drops_what_the_recipe_says_of_its_own(tmp_path):
    """Neither its limits nor its classes, revision or name; but its hyperparameters."""
    (tmp_path / "a.yaml").write_text("test_file: t.csv\n")
    for arguments, fields in (
        (["--train_file", "mine.csv"], {}),
        (["--dataset_name", "other/nli"], {}),
        (["--train_file", "mine.csv", "--config", str(tmp_path / "a.yaml")], {}),
        ([], {"train_file": "mine.csv"}),
    ):
        config = parse_train(["--recipe", "allnli-100k", *arguments], fields)
        assert (config.max_train_samples, config.max_eval_samples, config.label_names) == (None, None, None)
        assert (config.dataset_config_name, config.dataset_revision) == (None, None)
        assert (config.bf16, config.warmup_ratio, config.train_batch_size) == (True, 0.1, 64)
    assert parse_train(["--recipe", "allnli-100k", "--max_train_samples", "50"]).dataset_name is not None
    limited = parse_train(["--recipe", "allnli-100k", "--train_file", "mine.csv", "--max_eval_samples", "9"])
    assert (limited.max_eval_samples, limited.max_train_samples) == (9, None)


def test_own_data_drops_what_a_config_file_says_of_its_own(tmp_path, capsys):
    """Such as the config.yaml of an earlier run; it is said what is dropped."""
    earlier = parse_train(["--recipe", "allnli-100k", "--premise_column", "p", "--seed", "7"])
    (tmp_path / "a.yaml").write_text(dump(dataclasses.asdict(earlier)))
    for arguments, fields in ((["--train_file", "mine.csv"], {}), ([], {"train_file": tmp_path / "mine.csv"})):
        config = parse_train(["--config", str(tmp_path / "a.yaml"), *arguments], fields)
        assert (config.dataset_name, config.max_train_samples, config.label_names) == (None, None, None)
        assert (config.premise_column, config.seed, config.bf16) == (None, 7, True)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"since config file {tmp_path / 'a.yaml'} is of other data: dataset_name, " in line
        assert "premise_column, label_names, max_train_samples" in line
    # These name no other data.
    for fields in ({"validation_file": None}, {"dataset_name": earlier.dataset_name}, {"train_file": None}):
        assert parse_train(["--config", str(tmp_path / "a.yaml")], fields) == earlier
        assert parse_train(["--recipe", "allnli-100k"], fields).max_train_samples == 100_000
    assert not capsys.readouterr().err


def test_null_is_a_value_for_some_fields_only(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: null\n")
    with pytest.raises(UserError, match="learning_rate"):
        parse_train(["--recipe", "demo", "--config", str(tmp_path / "a.yaml")])


def test_names_and_homes():
    config = parse_train(["--recipe", "demo", "--label_names=a, b", "--output_dir=~/x"])
    assert config.label_names == ["a", "b"]
    assert config.output_dir == os.path.expanduser("~/x")


def test_no_data():
    with pytest.raises(UserError, match="no data"):
        parse_train([])


def test_help_names_groups_and_defaults():
    text = " ".join(train_parser().format_help().split())
    for expected in ("Optimisation:", "Batch:", "--max_grad_norm", "default: 5e-05", "Pairs in one optimizer step"):
        assert expected in text


def test_parsing_needs_no_torch():
    code = "import sys, trainer.cli as c; c.parse_train(['--recipe', 'demo']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_a_config_file_of_comments_sets_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("# seed: 1\n")
    assert parse_train(["--recipe", "demo", "--config", str(tmp_path / "mine.yaml")]).seed == 42
