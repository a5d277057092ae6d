"""Which fields of a run contradict each other. `config.py` says what holds for each of them alone.

That file calls this one, so a Config is anything here.
"""

import math
from pathlib import Path
from typing import Any

from trainer import schedules
from trainer.base.errors import UserError
from trainer.options import SCORES


def check(config: Any) -> None:
    """Raises UserError at the first contradiction, with what to change."""
    _check_run(config)
    _check_parts(config)
    _check_objective(config)
    _check_weights(config)
    schedules.settings(config)
    _check_exact(config)


def _check_run(config: Any) -> None:
    """What a run is named, where its data are, and how long it is."""
    if config.run_name is not None and Path(config.run_name).name != config.run_name:
        raise UserError(f"run_name {config.run_name!r} must be a plain name; a path goes into output_dir")
    if config.max_steps == 0 or config.max_steps < -1:
        raise UserError(f"max_steps must be positive, or -1 for num_train_epochs, got {config.max_steps}")
    if config.train_batch_size is not None and config.gradient_accumulation_steps != 1:
        raise UserError("gradient_accumulation_steps follows from train_batch_size; set only one of them")


def _check_parts(config: Any) -> None:
    """What needs, or forbids, another part of the program."""
    for name in ("lora_alpha", "lora_target_modules"):
        if config.lora_r == 0 and getattr(config, name) is not None:
            raise UserError(f"{name} does nothing while lora_r is 0; give --lora_r, such as 16, or leave it out")
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(config, name) and config.eval_strategy == "no":
            raise UserError(f"{name} needs eval_strategy steps or epoch")
    if config.deepspeed is not None and config.backend not in ("auto", "deepspeed"):
        raise UserError(f"deepspeed is set, but backend is {config.backend}; leave one of them out")
    if config.skip_nonfinite and (config.backend == "deepspeed" or config.deepspeed):
        raise UserError("skip_nonfinite does not work with DeepSpeed, which steps by itself")
    if config.country_iso_code and not (len(config.country_iso_code) == 3 and config.country_iso_code.isupper()):
        raise UserError(f"country_iso_code {config.country_iso_code!r} must be three capital letters, such as FRA")
    if config.push_to_hub and not config.write_report:
        raise UserError("push_to_hub needs write_report, since a model goes there with its card")
    if config.dataset_name is None and config.train_file is None:
        raise UserError("no data: give --train_file FILE, --dataset_name NAME, or a --recipe that names a data set")


def _check_objective(config: Any) -> None:
    """What is learned, and what it is scored by."""
    if config.label_names is not None and len(set(config.label_names)) != len(config.label_names):
        raise UserError(f"label_names holds a name twice: {config.label_names}")
    objective, metric = config.objective, config.metric_for_best_model
    valid = (*SCORES[objective], "loss")
    if metric is not None and metric not in valid:
        raise UserError(f"metric_for_best_model {metric} is no score of objective {objective}; use {', '.join(valid)}")
    of_classes = {"class_weights": None, "label_smoothing_factor": 0, "label_map": None, "eval_label_map": None}
    for name, usual in of_classes.items():
        if objective != "cross_entropy" and getattr(config, name) != usual:
            raise UserError(f"{name} is for classes, and objective {objective} learns one score; leave one of them out")
    if config.pos_weight is not None and objective != "binary_cross_entropy":
        raise UserError(f"pos_weight is for objective binary_cross_entropy, not {objective}; leave one of them out")
    if config.early_stopping_threshold and config.early_stopping_patience is None:
        raise UserError("early_stopping_threshold does nothing without early_stopping_patience; give both")


def _check_weights(config: Any) -> None:
    """How much classes count, and what is left as it is."""
    weights = config.class_weights
    if weights is not None and weights != ["balanced"] and not all(map(_is_weight, weights)):
        raise UserError("class_weights must be balanced, or a number above 0 for each class, such as 1,2,1; got "
                        f"{','.join(weights)}")  # fmt: skip
    for name in ("freeze_embeddings", "freeze_layers"):
        if config.lora_r and getattr(config, name):
            raise UserError(f"{name}: LoRA leaves all but its adapters and the head as it is; leave out {name} or "
                            "lora_r")  # fmt: skip


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _check_exact(config: Any) -> None:
    """What cannot be the same to the last bit on any number of ranks."""
    shards = config.exact_shards
    if shards is None:
        if config.exact_threads != 1:
            raise UserError("exact_threads does nothing without exact_shards; give --exact_shards, such as 8, or leave "
                            "it out")  # fmt: skip
        return
    if shards & (shards - 1):
        lower = 1 << (shards.bit_length() - 1)
        raise UserError(f"exact_shards must be a power of two, got {shards}; the nearest are {lower} and {2 * lower}")
    if config.train_batch_size is None:
        raise UserError("exact_shards needs train_batch_size: without it the batch grows with the number of ranks; "
                        "give --train_batch_size, such as 64")  # fmt: skip
    if shards > config.train_batch_size:
        raise UserError(f"exact_shards {shards} is more than the {config.train_batch_size} pairs of train_batch_size; "
                        "give fewer shards")  # fmt: skip
    if config.backend in ("deepspeed", "fsdp") or config.deepspeed:
        name = "fsdp" if config.backend == "fsdp" else "deepspeed"
        raise UserError(
            f"exact_shards works with the backends single and ddp; {name} adds gradients up in its own order"
        )
    if config.ddp_comm_hook != "none":
        raise UserError(f"exact_shards adds gradients up in fp32; leave out ddp_comm_hook {config.ddp_comm_hook}")
    if config.torch_compile:
        raise UserError(
            "torch_compile chooses kernels by itself, which exact_shards cannot hold; leave one of them out"
        )
    if config.step_form not in ("auto", "plain"):
        raise UserError(f"exact_shards takes plain steps; leave out step_form {config.step_form}")
