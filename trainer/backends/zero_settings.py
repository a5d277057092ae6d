"""DeepSpeed's JSON files, with the numbers that crossrank decides filled in; what contradicts them is refused."""

import json
import os
from pathlib import Path
from typing import Any

from trainer.base.errors import UserError, unknown
from trainer.config import Config
from trainer.data.sampler import global_batch_size, num_forwards

CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
NO_CLIPPING = 1e30  # a limit that no norm reaches: with 0, DeepSpeed does not compute the norm
Settings = dict[str, Any]


def read_settings(name: str) -> Settings:
    """A file of ds_configs by its name, or the user's own by its path. Raises UserError."""
    shipped = CONFIGS / f"{name}.json"
    path = shipped if shipped.is_file() else Path(os.path.expanduser(name))
    if not path.is_file():
        valid = [p.stem for p in CONFIGS.glob("*.json")]
        raise UserError(f"{unknown('DeepSpeed config', name, valid)}; or give the path of a JSON file")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object")
    return settings


def fill(settings: Settings, place: str, config: Config, world_size: int) -> Settings:
    """`settings` with the numbers that crossrank's fields decide, as DeepSpeed wants them. Raises UserError."""
    refuse_contradictions(settings, place, config, world_size)
    stage = _at(settings, "zero_optimization.stage") or 0
    dropped = ("optimizer", "fp16", "bf16", "train_batch_size")
    filled = _without_auto({key: value for key, value in settings.items() if key not in dropped})
    filled["zero_optimization"] = (filled.get("zero_optimization") or {}) | {"stage": stage}
    # crossrank's own loop accumulates, and tells DeepSpeed which forward is a step's last.
    return filled | {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if stage == 0 else config.max_grad_norm or NO_CLIPPING,
        # No module is safe for lower precision in what travels between ranks: gradients are summed in fp32.
        "torch_autocast": {"enabled": config.bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def refuse_contradictions(settings: Settings, place: str, config: Config, world_size: int) -> None:
    """Raises UserError, naming both, where a key contradicts a field; "auto" never does."""
    batch = global_batch_size(config, world_size)
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch, "train_batch_size"),
        "train_micro_batch_size_per_gpu": (config.per_device_train_batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (
            num_forwards(config.per_device_train_batch_size, batch, world_size),
            "gradient_accumulation_steps",
        ),
        "gradient_clipping": (config.max_grad_norm, "max_grad_norm"),
        "torch_autocast.enabled": (config.bf16, "bf16"),
        "torch_autocast.dtype": ("bfloat16", "bf16"),
        "optimizer.type": ("AdamW", "optimizer"),
        "optimizer.params.lr": (config.learning_rate, "learning_rate"),
        "optimizer.params.betas": ([config.adam_beta1, config.adam_beta2], "adam_beta1 and 2"),
        "optimizer.params.eps": (config.adam_epsilon, "adam_epsilon"),
        "optimizer.params.weight_decay": (config.weight_decay, "weight_decay"),
    }
    for key, (value, field) in ours.items():
        theirs = _at(settings, key)
        if theirs not in (None, "auto", value):
            raise UserError(f'{place}: {key} is {theirs}, but {field} is {value}; make them equal, or write "auto"')
    for key, fix in (("fp16", "--bf16"), ("bf16", "--bf16, with torch_autocast in the JSON: the weights stay fp32")):
        if _at(settings, f"{key}.enabled") not in (None, False, "auto"):
            raise UserError(f"{place}: {key}.enabled is set; crossrank computes in bf16 by {fix}")
    if "scheduler" in settings:
        raise UserError(f"{place}: has a scheduler; the schedule is --lr_scheduler_type and --warmup_ratio")
    if (stage := _at(settings, "zero_optimization.stage") or 0) not in (0, 1, 2, 3):
        raise UserError(f"{place}: unknown zero_optimization.stage {stage}; it is 0, 1, 2 or 3")


def _at(settings: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def _without_auto(settings: Settings) -> Settings:
    """What is "auto" and not crossrank's is DeepSpeed's default."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }
