"""Every setting of a run: frozen dataclasses, recipes, config files, the command line's fields.

Precedence: a field's default < recipe < config file < command line. Fields are flat and carry the names that
transformers' TrainingArguments and run_glue.py made standard, so a model card's hyperparameter list can be pasted
into a config file. Nothing here imports torch: a login node can validate a run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

RECIPES = Path(__file__).parent / "recipes"


class UserError(ValueError):
    """A mistake in the user's input; its message names the place and the fix, and is printed without a traceback."""


class TrainingFailed(RuntimeError):
    """The run cannot go on, through no mistake in the input; printed without a traceback."""


EXIT_CODE = 85  # preempted: start the same command again


class Preempted(Exception):
    """The ranks have agreed to stop, since one was asked to; the message is for the user."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A group of fields, whose numbers are checked at construction."""

    def __post_init__(self) -> None:
        for own in dataclasses.fields(self):
            name, value = own.name, getattr(self, own.name)
            if value is None and "None" not in str(own.type):
                raise UserError(f"{name} must have a value")
            if name in PATHS and value is not None and value.startswith("~"):
                object.__setattr__(self, name, str(Path(value).expanduser()))
            if name in POSITIVE and value is not None and not value > 0:
                raise UserError(f"{name} must be positive, got {value}")
            if name in NOT_NEGATIVE and value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} must be a finite number of at least 0, got {value}")
            if value == "":
                raise UserError(f"{name} is empty; leave it out, or give it a value")
            if name in PROBABILITIES and value is not None and not 0 <= value < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Fields):
    """Model"""

    model_name_or_path: str = "distilbert/distilroberta-base"
    """Encoder to start from: a hub name, a local folder, or `builtin` (a tiny BERT made from scratch)."""
    model_revision: str | None = None
    """Branch, tag or commit on the hub."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the architecture and the tokenizer, and draws the weights from `seed`."""
    max_length: int | None = None
    """Longest pair in tokens, longest text cut first; None = the tokenizer's own limit."""
    dropout: float | None = None
    """Every dropout probability of the model; None = the model's own."""
    attn_implementation: str | None = None
    """Attention kernel of transformers (sdpa, eager, flash_attention_2 ...); None = crossrank's own where it knows
    the family, whose dropout masks do not depend on the number of ranks."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Fields):
    """Data"""

    dataset_name: str | None = None
    """Hub name, a folder of `save_to_disk`, or `builtin`; only a name in reports where *_file fields are given."""
    dataset_config_name: str | None = None
    """Configuration of the hub data set, such as `pair-class`."""
    dataset_revision: str | None = None
    """Branch, tag or commit on the hub."""
    train_file: str | None = None
    """Training pairs: parquet, csv, tsv, jsonl (each also .gz), SNLI's or MultiNLI's own txt, jsonl or tsv, or a
    `save_to_disk` folder. Where any *_file is given, nothing comes from the hub."""
    validation_file: str | None = None
    """Pairs of the dev split."""
    test_file: str | None = None
    """Pairs of the test split."""
    premise_column: str | None = None
    """None = `premise`, else `sentence1`."""
    hypothesis_column: str | None = None
    """None = `hypothesis`, else `sentence2`."""
    label_column: str | None = None
    """None = `label`, else `gold_label`."""
    label_names: list[str] | None = None
    """Class names, in the order of the integer labels, as `a,b,c`; None = from the data. Integers without names mean
    entailment, neutral, contradiction where those are the classes."""
    max_train_samples: int | None = None
    """Use the first N pairs of the training split."""
    max_eval_samples: int | None = None
    """Use the first N pairs of the dev split."""
    max_test_samples: int | None = None
    """Use the first N pairs of the test split."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Fields):
    """Batch"""

    per_device_train_batch_size: int = 64
    """Largest number of pairs in one forward of one rank."""
    per_device_eval_batch_size: int = 64
    """Pairs in one forward of evaluation and prediction."""
    gradient_accumulation_steps: int = 1
    """Forwards of a rank before an optimizer step."""
    train_batch_size: int | None = None
    """Pairs in one optimizer step, over all ranks. When given, gradient_accumulation_steps is derived, and the run is
    the same on any number of ranks; None = per_device_train_batch_size * gradient_accumulation_steps * ranks."""


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig(Fields):
    """Optimisation"""

    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never on biases and norms."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 = do not clip."""
    num_train_epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int = -1
    """Optimizer steps; overrides num_train_epochs when positive."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Course of the learning rate after warmup."""
    warmup_ratio: float = 0.0
    """Share of all steps over which the learning rate rises from 0."""
    warmup_steps: int = 0
    """The same in steps; overrides warmup_ratio when positive."""
    label_smoothing_factor: float = 0.0
    """Probability mass spread evenly over all classes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Fields):
    """Run"""

    output_dir: str | None = None
    """Run folder; None = runs/<run_name>-<date>-<time>. A folder that holds a run is never overwritten."""
    run_name: str | None = None
    """Name in reports; None = the recipe's name."""
    seed: int = 42
    """Seed of weights, dropout and (without data_seed) of the data's order."""
    data_seed: int | None = None
    """Seed of the data's order alone."""
    bf16: bool = False
    """Forward in bfloat16 autocast; weights, gradients' sums and optimizer stay in fp32."""
    tf32: bool = False
    """Allow TF32 in fp32 matrix products on CUDA."""
    unpad: bool = True
    """Compute real tokens alone: no padding outside attention, and first tokens alone in the last layer. Exact; for
    BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT and ModernBERT, others run padded."""
    torch_compile: bool = False
    """Compile the model's layers; the first steps take a minute or more."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Fields):
    """Parallel"""

    backend: Literal["auto", "single", "ddp", "deepspeed", "fsdp"] = "auto"
    """How ranks are wired; auto = single on one rank, ddp on several, deepspeed where that field is set."""
    deepspeed: str | None = None
    """A config of DeepSpeed: zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, or a JSON file of your own."""
    ddp_comm_hook: Literal["none", "bf16"] = "none"
    """ddp: what travels between ranks; bf16 = gradients rounded to bfloat16, half the bytes, no longer the same run."""
    ddp_timeout: int = 1800
    """Seconds until a collective that not every rank reached is an error."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Fields):
    """Evaluation"""

    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to evaluate on the dev split while training; the final evaluation on dev and test is always done."""
    eval_steps: int = 500
    """Steps between evaluations."""
    eval_on_start: bool = False
    """Evaluate before the first step."""
    metric_for_best_model: str = "f1_macro"
    """accuracy, f1_macro, f1_micro, f1_weighted or loss, on the dev split."""
    load_best_model_at_end: bool = False
    """Keep the weights of the best evaluation, not of the last step."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Fields):
    """Checkpoints"""

    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to write a checkpoint; one is also written at the last step and when the run is asked to stop."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int | None = 2
    """Checkpoints to keep; null = all."""
    resume_from_checkpoint: str = "auto"
    """auto = go on with the unfinished run in output_dir; none = never; or a checkpoint's or a run's folder."""
    preemption_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
    """Signals at which the run saves and stops, with exit code 85."""
    skip_nonfinite: int = 0
    """Steps with a non-finite gradient that may be skipped; then each step waits for the device. Not for deepspeed."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Fields):
    """Logging"""

    logging_steps: int = 100
    """Steps between log lines; the loss is the mean over them."""
    report_to: list[str] = field(default_factory=list)
    """Trackers beside metrics.jsonl: `tensorboard`, `wandb`; each is an extra, as in pip install crossrank[wandb]."""
    track_emissions: bool = True
    """Measure energy and emissions of every node with codecarbon."""
    country_iso_code: str | None = None
    """Where the electricity comes from, as three letters such as FRA; None = from this machine's address, and without
    network the world's average."""
    write_report: bool = True
    """Write model card, pictures and report.html at the end; `crossrank report RUN` writes them at any time."""


@dataclass(frozen=True, kw_only=True)
class HubConfig(Fields):
    """Hub"""

    push_to_hub: bool = False
    """Upload the model folder when the run is done; needs write_report, and a login by `hf auth login` or HF_TOKEN."""
    hub_model_id: str | None = None
    """Repository, as name or owner/name; None = the run folder's name."""
    hub_private_repo: bool = False
    """Make the repository private if it does not exist."""


GROUPS: tuple[type, ...] = (
    ModelConfig,
    DataConfig,
    BatchConfig,
    OptimisationConfig,
    RunConfig,
    ParallelConfig,
    EvaluationConfig,
    CheckpointConfig,
    LoggingConfig,
    HubConfig,
)


@dataclass(frozen=True, kw_only=True)
class Config(
    HubConfig,
    LoggingConfig,
    CheckpointConfig,
    EvaluationConfig,
    ParallelConfig,
    RunConfig,
    OptimisationConfig,
    BatchConfig,
    DataConfig,
    ModelConfig,
):
    """All fields of a training run, validated. Raises UserError naming the field."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run_name is not None and Path(self.run_name).name != self.run_name:
            raise UserError(f"run_name {self.run_name!r} must be a plain name; a path goes into output_dir")
        if self.max_steps == 0:
            raise UserError("max_steps must be positive, or -1 for num_train_epochs")
        if max(self.seed, self.data_seed or 0) >= 2**63:
            raise UserError("seed and data_seed must be below 2**63")
        if self.train_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise UserError("gradient_accumulation_steps follows from train_batch_size; give one of them")
        if self.metric_for_best_model not in METRICS:
            raise UserError(unknown("metric_for_best_model", self.metric_for_best_model, METRICS))
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise UserError("load_best_model_at_end needs eval_strategy steps or epoch")
        if self.deepspeed is not None and self.backend not in ("auto", "deepspeed"):
            raise UserError(f"deepspeed is set, but backend is {self.backend}; leave one of them out")
        for name in self.preemption_signals:
            if name not in SIGNALS:
                raise UserError(unknown("preemption signal", name, SIGNALS))
        if self.skip_nonfinite and (self.backend == "deepspeed" or self.deepspeed):
            raise UserError("skip_nonfinite does not work with DeepSpeed, which steps by itself")
        for name in self.report_to:
            if name not in TRACKERS:
                raise UserError(unknown("tracker", name, TRACKERS))
        if self.country_iso_code and not (len(self.country_iso_code) == 3 and self.country_iso_code.isupper()):
            raise UserError(f"country_iso_code {self.country_iso_code!r} must be three capital letters, such as FRA")
        if self.push_to_hub and not self.write_report:
            raise UserError("push_to_hub needs write_report, since a model goes there with its card")
        if self.dataset_name is None and self.train_file is None:
            raise UserError("no data: give --train_file FILE, --dataset_name NAME, or a --recipe that names a data set")
        if self.label_names is not None and len(set(self.label_names)) != len(self.label_names):
            raise UserError(f"label_names holds a name twice: {self.label_names}")


SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
TRACKERS = ("tensorboard", "wandb")
# What a resumed run may change: it decides where and how fast, not what is computed. Files are compared by content.
HARMLESS = (
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "preemption_signals",
    "logging_steps",
    "train_file",
    "validation_file",
    "test_file",
    "dataset_name",
    "dataset_config_name",
    "dataset_revision",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "backend",
    "deepspeed",
    "ddp_timeout",
    "gradient_checkpointing",
    "torch_compile",
    "unpad",
    "skip_nonfinite",
    "report_to",
    "track_emissions",
    "country_iso_code",
    "write_report",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
)
METRICS = ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "loss")
POSITIVE = (
    "max_length",
    "max_train_samples",
    "max_eval_samples",
    "max_test_samples",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "train_batch_size",
    "adam_epsilon",
    "num_train_epochs",
    "ddp_timeout",
    "ranks",
    "nproc",
    "nnodes",
    "nodes",
    "gpus_per_node",
    "cpus_per_task",
    "warning_seconds",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "logging_steps",
)
NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed", "data_seed", "skip_nonfinite")
PATHS = (
    "model_name_or_path",
    "dataset_name",
    "train_file",
    "validation_file",
    "test_file",
    "output_dir",
    "deepspeed",
    "input",
    "output",
)
PROBABILITIES = ("dropout", "adam_beta1", "adam_beta2", "warmup_ratio", "label_smoothing_factor")


def first_line(error: Exception) -> str:
    """A library's error, cut to what fits into a line of ours."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def unknown(kind: str, name: str, valid: Any) -> str:
    """Error text for a name that does not exist: with the nearest valid one, or all of them."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(valid))}"
    return f"unknown {kind} {name!r}; {hint}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields that a recipe or config file sets, names checked. Raises UserError naming the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `field: value` lines, found a {type(values).__name__}")
    fields = {own.name for own in dataclasses.fields(Config)}
    for name in values:
        if name not in fields:
            raise UserError(f"{path}: {unknown('field', str(name), fields)}")
    return values


def recipe_path(name: str) -> Path:
    """The file of a recipe that is shipped with the package. Raises UserError for an unknown name."""
    valid = [path.stem for path in RECIPES.glob("*.yaml")]
    if name not in valid:
        raise UserError(unknown("recipe", name, valid))
    return RECIPES / f"{name}.yaml"


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """The fields in which a run's saved config differs from `config`, so that it would be another run."""
    now = dataclasses.asdict(config)
    return [
        f"{name}: saved {saved[name]!r}, now {now[name]!r}"
        for name in now
        if name not in HARMLESS and name in saved and saved[name] != now[name]
    ]


def write_yaml(config: Config, path: Path) -> None:
    """Writes the resolved config in a form that --config reads back."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def global_batch_size(config: BatchConfig, world_size: int) -> int:
    """Pairs in one optimizer step over all ranks."""
    per_forward = config.per_device_train_batch_size * world_size
    return config.train_batch_size or per_forward * config.gradient_accumulation_steps


def num_forwards(per_device: int, num_pairs: int, world_size: int) -> int:
    """Forwards of each rank in an optimizer step of `num_pairs`: the fewest that hold `per_device` pairs at most."""
    return math.ceil(num_pairs / (per_device * world_size))


def total_steps(config: OptimisationConfig, num_samples: int, batch_size: int) -> int:
    """Optimizer steps of the whole run; the short last batch of an epoch counts as one."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * math.ceil(num_samples / batch_size)))
