"""Every setting of a run: frozen dataclasses, each field with its help, its constraint and what it decides.

Fields are flat and carry the names that transformers' TrainingArguments and run_glue.py made standard, so a model
card's hyperparameter list can be pasted into a config file. Nothing here imports torch: a login node can check a run.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer import rules
from trainer.base.errors import UserError
from trainer.base.fields import Fields, checked, option, rule
from trainer.base.yaml_files import read_mapping
from trainer.options import MAIN_SCORE, Metric
from trainer.options import SCORES as SCORES
from trainer.options import TITLES as TITLES
from trainer.options import BatchConfig as BatchConfig
from trainer.options import DataConfig as DataConfig
from trainer.options import ModelConfig as ModelConfig
from trainer.options import OptimisationConfig as OptimisationConfig

StepForm = Literal["auto", "plain", "static", "captured"]
Signal = Literal["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]


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
    metric_for_best_model: Metric | None = None
    """By which evaluations on the dev split are compared: one of the objective's scores, or loss; None = f1_macro,
    average_precision or spearman."""
    load_best_model_at_end: bool | None = None
    """End with the weights of the best evaluation, not of the last step; None = where there is a dev split that is
    evaluated."""
    early_stopping_patience: int | None = option(None, above=0)
    """Stop when so many evaluations in a row are no better than the best one before."""
    early_stopping_threshold: float = option(0.0, at_least=0)
    """By how much an evaluation must be better to count."""


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
    def best_metric(self) -> str:
        """By which evaluations are compared."""
        return self.metric_for_best_model or MAIN_SCORE[self.objective]

    def keeps_best(self, has_dev: bool) -> bool:
        """Whether the run ends with its best model: by default, where there are evaluations to tell it by."""
        wanted = self.load_best_model_at_end
        return has_dev and self.eval_strategy != "no" if wanted is None else wanted

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


def differences(saved: dict[str, Any], config: Config, kinds: Collection[str] = ("run",)) -> list[str]:
    """The fields of `kinds` in which a run's saved config differs from `config`, so that it would be another run."""
    now = {own.name: getattr(config, own.name) for own in dataclasses.fields(config) if rule(own).kind in kinds}
    return [
        f"{name}: saved {saved[name]!r}, now {value!r}"
        for name, value in now.items()
        if name in saved and saved[name] != value
    ]
