"""The ways in which a run ends early, and the words in which it says so."""

import difflib
import re
from collections.abc import Iterable

EXIT_CODE = 85  # preempted: start the same command again


class UserError(ValueError):
    """A mistake in the user's input; its message names the place and the fix, and is printed without a traceback."""


class TrainingFailed(RuntimeError):
    """The run cannot continue, through no mistake in the input; printed without a traceback."""


class RankGone(TrainingFailed):
    """Another rank has ended, or does not answer: nothing more will come from it."""


class Preempted(Exception):
    """The ranks have agreed to stop, since one was asked to; the message is for the user."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which asks to end as Ctrl-C does: what is half written goes."""


def cut_off(error: Exception) -> str | None:
    """What it means that a message between ranks was not sent or received; None if it is another error."""
    if re.search("[Cc]onnection (closed|reset)|[Bb]roken pipe", str(error)):
        return "the connection to another rank broke off; look for what ended that one"
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether the GPU's memory is used up. Only torch's own allocator raises torch.OutOfMemoryError."""
    own = type(error).__name__ == "OutOfMemoryError"
    return own or bool(re.search(r"out of memory|CU[A-Z]+_STATUS_\w*ALLOC\w*_FAILED", str(error)))


def first_line(error: BaseException) -> str:
    """A library's error, cut to what fits into a line of ours."""
    first, *others = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}" + (f" {others[0].strip()}" if first.endswith(":") and others else "")


def reason(error: Exception) -> str:
    """What the operating system says, without number and file name; of another error, its text."""
    return getattr(error, "strerror", None) or str(error)


def named(error: Exception) -> str:
    """The same, behind the file that it is about."""
    file = getattr(error, "filename", None)
    return reason(error) if file is None else f"{file}: {reason(error)}"


# What other trainers call a field.
ALIASES = {
    "lr": "learning_rate",
    "batch_size": "train_batch_size",
    "bs": "train_batch_size",
    "train_bs": "train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "warmup": "warmup_ratio",
    "warmup_proportion": "warmup_ratio",
    "wd": "weight_decay",
    "clip": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "grad_accum": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "scheduler": "lr_scheduler_type",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "max_seq_length": "max_length",
    "max_len": "max_length",
    "data": "train_file",
    "dataset": "dataset_name",
    "dev_file": "validation_file",
    "eval_file": "validation_file",
    "out": "output_dir",
    "output": "output_dir",
    "fp16": "bf16",
    "precision": "bf16",
    "resume": "resume_from_checkpoint",
    "gpus": "nproc",
    "num_gpus": "nproc",
    "nproc_per_node": "nproc",
    "world_size": "nproc",
    "label_smoothing": "label_smoothing_factor",
}
# What is no field, and how it is said instead.
RANKS = "ranks are for the launcher: crossrank launch local --nproc N -- train ..."
INSTEAD = {
    "optim": "the optimizer is always AdamW",
    "optimizer": "the optimizer is always AdamW",
    "nproc": RANKS,
    "recipe": "a recipe is no field: say --recipe NAME on the command line of train, or train(recipe=NAME)",
    "config": "a config file is no field: say --config FILE.yaml on the command line of train",
}


FEW = 12  # names that a line of text holds


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """Error text for a name that does not exist: with the nearest valid one, or all of them."""
    names = list(valid)
    dashes, bare = "--" * name.startswith("--"), name.removeprefix("--")
    alias = ALIASES.get(bare, bare)
    near = [dashes + alias] if dashes + alias in names else difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(names))}"
    if not near and len(names) > FEW:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0)
        hint = f"the nearest of {len(names)} are {', '.join(near)}"
        hint += "; --help shows all" if kind in ("option", "field") else ""
    if alias in INSTEAD and dashes + alias not in names:
        hint = INSTEAD[alias]
    return f"unknown {kind} {name!r}; {hint}"
