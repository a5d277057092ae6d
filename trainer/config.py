"""Every setting of a run: frozen dataclasses, each field with its help, its constraint and what it decides.

Fields are flat and carry the names that transformers' TrainingArguments and run_glue.py made standard, so a model
card's hyperparameter list can be pasted into a config file. Nothing here imports torch: a login node can check a run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trainer import rules
from trainer.base.errors import UserError
from trainer.base.fields import Fields, checked, option
from trainer.base.yaml_files import read_mapping

Metric = Literal["accuracy", "f1_macro", "f1_micro", "f1_weighted", "loss"]
METRICS = get_args(Metric)
StepForm = Literal["auto", "plain", "static", "captured"]
Signal = Literal["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Fields):
    """Model"""

    model_name_or_path: str = option("distilbert/distilroberta-base", path=True)
    """Encoder to start from: a hub name, a local folder, or `builtin` (a tiny BERT made from scratch)."""
    model_revision: str | None = None
    """Branch, tag or commit on the hub."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the architecture and the tokenizer, and draws the weights from `seed`."""
    max_length: int | None = option(None, above=0)
    """Longest pair in tokens, longest text cut first; None = the tokenizer's own limit."""
    dropout: float | None = option(None, at_least=0, below=1)
    """Every dropout probability of the model; None = the model's own."""
    attn_implementation: str | None = None
    """Attention kernel of transformers (sdpa, eager, flash_attention_2 ...); None = crossrank's own where it knows
    the family, whose dropout masks do not depend on the number of ranks."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Fields):
    """Data"""

    dataset_name: str | None = option(None, path=True, kind="source")
    """Hub name, a folder of `save_to_disk`, or `builtin`; only a name in reports where *_file fields are given."""
    dataset_config_name: str | None = option(None, kind="source")
    """Configuration of the hub data set, such as `pair-class`."""
    dataset_revision: str | None = option(None, kind="source")
    """Branch, tag or commit on the hub."""
    train_file: str | None = option(None, path=True, kind="source")
    """Training pairs: parquet, csv, tsv, jsonl (each also .gz), SNLI's or MultiNLI's own txt, jsonl or tsv, or a
    `save_to_disk` folder. Where any *_file is given, nothing comes from the hub."""
    validation_file: str | None = option(None, path=True, kind="source")
    """Pairs of the dev split."""
    test_file: str | None = option(None, path=True, kind="source")
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
    max_train_samples: int | None = option(None, above=0)
    """Use the first N pairs of the training split."""
    max_eval_samples: int | None = option(None, above=0)
    """Use the first N pairs of the dev split."""
    max_test_samples: int | None = option(None, above=0)
    """Use the first N pairs of the test split."""

    def file(self, role: str) -> str | None:
        """Of the role train, dev or test."""
        return {"train": self.train_file, "dev": self.validation_file, "test": self.test_file}[role]

    @property
    def has_files(self) -> bool:
        return any((self.train_file, self.validation_file, self.test_file))


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Fields):
    """Batch"""

    per_device_train_batch_size: int = option(64, above=0, kind="method")
    """Largest number of pairs in one forward of one rank."""
    per_device_eval_batch_size: int = option(64, above=0, kind="method")
    """Pairs in one forward of evaluation and prediction."""
    gradient_accumulation_steps: int = option(1, above=0, kind="method")
    """Forwards of a rank before an optimizer step."""
    train_batch_size: int | None = option(None, above=0)
    """Pairs in one optimizer step, over all ranks. When given, gradient_accumulation_steps is derived, and the run is
    the same on any number of ranks; None = per_device_train_batch_size * gradient_accumulation_steps * ranks."""


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig(Fields):
    """Optimisation"""

    learning_rate: float = option(5e-5, at_least=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = option(0.0, at_least=0)
    """Decoupled weight decay; never on biases and norms."""
    adam_beta1: float = option(0.9, at_least=0, below=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = option(0.999, at_least=0, below=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: float = option(1e-8, above=0)
    """AdamW's epsilon."""
    max_grad_norm: float = option(1.0, at_least=0)
    """Clip the global gradient norm to this; 0 = do not clip."""
    num_train_epochs: float = option(1.0, above=0)
    """Passes over the training data."""
    max_steps: int = -1
    """Optimizer steps; overrides num_train_epochs when positive."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Course of the learning rate after warmup."""
    warmup_ratio: float = option(0.0, at_least=0, below=1)
    """Part of all steps over which the learning rate rises from 0."""
    warmup_steps: int = option(0, at_least=0)
    """The same in steps; overrides warmup_ratio when positive."""
    label_smoothing_factor: float = option(0.0, at_least=0, below=1)
    """Probability mass spread evenly over all classes."""
    lora_r: int = option(0, at_least=0)
    """LoRA, by peft: rank of the adapters that are trained, with the head, in the model's place; 0 = no LoRA."""
    lora_alpha: int | None = option(None, above=0)
    """What the adapters add is scaled by lora_alpha / lora_r; None = 2 * lora_r."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get an adapter, such as `q_proj,v_proj`; None = every linear layer but the head's."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Fields):
    """Run"""

    output_dir: str | None = option(None, path=True, kind="local")
    """Run folder; None = runs/<run_name>-<date>-<time>. A folder that holds a run is never overwritten."""
    run_name: str | None = option(None, kind="local")
    """Name in reports; None = the recipe's name."""
    seed: int = option(42, at_least=0, below=2**63)
    """Seed of weights, dropout and (without data_seed) of the data's order."""
    data_seed: int | None = option(None, at_least=0, below=2**63)
    """Seed of the data order only; None = seed."""
    bf16: bool = False
    """Forward in bfloat16 autocast; weights, gradients' sums and optimizer stay in fp32."""
    tf32: bool = False
    """Allow TF32 in fp32 matrix products on CUDA."""
    unpad: bool = option(True, kind="method")
    """Compute only real tokens, and only first tokens in the last layer, in the families of docs/models.md. Exact."""
    step_form: StepForm = option("auto", kind="method")
    """plain; static = few shapes and fused kernels; captured = the same as CUDA graphs; auto = captured on a GPU, plain
    on a CPU. A form that fails its check against plain is not used."""
    torch_compile: bool = option(False, kind="method")
    """Compile the model's layers; the first steps take a minute or more."""
    gradient_checkpointing: bool = option(False, kind="method")
    """Recompute activations in the backward: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Fields):
    """Parallel"""

    backend: Literal["auto", "single", "ddp", "deepspeed", "fsdp"] = option("auto", kind="method")
    """How ranks are wired; auto = single on one rank, ddp on several, deepspeed where that field is set."""
    deepspeed: str | None = option(None, path=True, kind="method")
    """A config of DeepSpeed: zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, or a JSON file of your own."""
    ddp_comm_hook: Literal["none", "bf16"] = "none"
    """ddp: what travels between ranks; bf16 = gradients rounded to bfloat16, half the bytes, no longer the same run."""
    exact_shards: int | None = option(None, above=0)
    """Shards of a batch, a power of two such as 8: the same weights to the last bit on any number of ranks that divides
    it, by sums in one order; None = the same to rounding. single and ddp; one kind of device, one version of torch."""
    exact_threads: int = option(1, above=0)
    """CPU threads of each rank under exact_shards: their number decides bits."""
    ddp_timeout: int = option(1800, above=0, below=10**7, kind="upkeep")
    """Seconds until a collective that not every rank reached is an error."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Fields):
    """Evaluation"""

    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to evaluate on the dev split while training; the final evaluation on dev and test is always done."""
    eval_steps: int = option(500, above=0)
    """Steps between evaluations."""
    eval_on_start: bool = False
    """Evaluate before the first step."""
    metric_for_best_model: Metric = "f1_macro"
    """accuracy, f1_macro, f1_micro, f1_weighted or loss, on the dev split."""
    load_best_model_at_end: bool = False
    """Keep the weights of the best evaluation, not of the last step."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Fields):
    """Checkpoints"""

    save_strategy: Literal["no", "steps", "epoch"] = option("steps", kind="upkeep")
    """When to write a checkpoint; one is also written at the last step and when the run is asked to stop."""
    save_steps: int = option(500, above=0, kind="upkeep")
    """Steps between checkpoints."""
    save_total_limit: int | None = option(2, above=0, kind="upkeep")
    """Checkpoints to keep; null = all."""
    resume_from_checkpoint: str = option("auto", kind="local")
    """auto = resume the unfinished run in output_dir; none = never; or a checkpoint's or a run's folder."""
    preemption_signals: list[Signal] = option(
        factory=lambda: ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"], kind="upkeep"
    )
    """Signals at which the run saves and stops, with exit code 85; SIGHUP, as of a closed terminal, not under nohup."""
    skip_nonfinite: int = option(0, at_least=0, kind="method")
    """Steps with a non-finite gradient that may be skipped; then each step waits for the device. Not for deepspeed."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Fields):
    """Logging"""

    logging_steps: int = option(100, above=0, kind="upkeep")
    """Steps between log lines; the loss is the mean over them."""
    report_to: list[Literal["tensorboard", "wandb"]] = option(factory=list, kind="upkeep")
    """Trackers beside metrics.jsonl: `tensorboard`, `wandb`; each is an extra, as in pip install crossrank[wandb]."""
    track_emissions: bool = option(True, kind="upkeep")
    """Measure energy and emissions of every node with codecarbon."""
    country_iso_code: str | None = option(None, kind="upkeep")
    """Where the electricity comes from, as three letters such as FRA; None = from this machine's address, and without
    network the world's average."""
    write_report: bool = option(True, kind="upkeep")
    """Write model card, pictures and report.html at the end; `crossrank report RUN` writes them at any time."""


@dataclass(frozen=True, kw_only=True)
class HubConfig(Fields):
    """Hub"""

    push_to_hub: bool = option(False, kind="local")
    """Upload the model folder when the run is done; needs write_report, and a login by `hf auth login` or HF_TOKEN."""
    hub_model_id: str | None = option(None, kind="local")
    """Repository, as name or owner/name; None = the run folder's name."""
    hub_private_repo: bool = option(False, kind="local")
    """Make the repository private if it does not exist."""


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

    @property
    def order_seed(self) -> int:
        """Of the data's order."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self) -> None:
        super().__post_init__()
        rules.check(self)


GROUPS: tuple[type, ...] = Config.__bases__[::-1]


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields that a recipe or config file sets. Raises UserError naming the file."""
    return checked(read_mapping(path), Config, place=path)


def read_run_config(path: Path) -> dict[str, Any]:
    """The fields of a run's own config.yaml. Raises UserError where it holds none: no run has written such a file."""
    if not (values := read_yaml(path)):
        raise UserError(f"{path} is damaged: it holds no field; take it from a copy of the run")
    return values
