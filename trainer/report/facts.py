"""What card, page and comparison say alike of a run: its scores' sizes and intervals, its fields, its command."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from trainer.base.fields import default, rule
from trainer.config import Config
from trainer.metrics import fixed
from trainer.report.read import Run


def from_scratch(run: Run) -> bool:
    return run.config["init"] == "random" or run.config["model_name_or_path"] == "builtin"


def ends(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{fixed(interval[0])} to {fixed(interval[1])}"


def warnings(run: Run) -> list[str]:
    """What a reader has to know before anything else."""
    made = []
    if not run.results:
        step = max((event["step"] for event in run.events), default=0)
        made.append(f"Unfinished run. It stands at step {step:,}; its scores, where there are any, are not final, and "
                    "there may be no model yet.")  # fmt: skip
    if run.damaged:
        made.append(f"{run.damaged} damaged line{'s' * (run.damaged > 1)} of metrics.jsonl "
                    f"{'are' if run.damaged > 1 else 'is'} left out.")  # fmt: skip
    if skipped := run.results.get("train", {}).get("skipped_steps"):
        made.append(f"{skipped:,} step{'s' * (skipped > 1)} with a gradient that was not finite were skipped.")
    return made


def padding(run: Run) -> str:
    """How much of a batch it is, or would be."""
    own = run.about["padding"]
    share = own["padding"] / max(1, own["tokens"] + own["padding"])
    computed = ", none of which was computed outside attention" if run.config["unpad"] else ""
    return f"{share:.0%} of a batch padded to its longest pair would be padding{computed}"


def loss_note(run: Run) -> str:
    """What sets the training loss apart from the validation loss; empty where nothing does."""
    fields = {"weighted": ("class_weights", "pos_weight"), "smoothed": ("label_smoothing_factor",)}
    made = [f"{how} ({name})" for how, names in fields.items() for name in names if run.config[name]]
    return (f"The training loss is {' and '.join(made)}, the validation loss is not: compare each with itself only."
            if made else "")  # fmt: skip


def versions(run: Run) -> list[tuple[str, str]]:
    """Packages by the names that they call themselves."""
    names = {"torch": "PyTorch", "numpy": "NumPy"}
    return [(names.get(name, name.capitalize()), version) for name, version in run.about["versions"].items()]


def hyperparameters(run: Run, changed_only: bool) -> dict[str, Any]:
    """Fields and values; of local paths only the last part, the rest is nobody else's business."""
    chosen = {}
    for own in dataclasses.fields(Config):
        name, value = own.name, run.config[own.name]
        if rule(own).kind == "local" or (changed_only and value == default(own)):
            continue
        if rule(own).path and value is not None:
            shown = [bare(name, path) for path in (value if isinstance(value, list) else [value])]
            value = shown if isinstance(value, list) else shown[0]
        chosen[name] = ",".join(value) if isinstance(value, list) else value
    return chosen


def bare(name: str, path: str) -> str:
    """The last part of a local path, the value of the field `name`; behind NAME= if it has one."""
    title, path = titled(path)
    return title + (Path(path).name if path.startswith(("/", ".", "~")) or "_file" in name else path)


def titled(path: str) -> tuple[str, str]:
    """`NAME=` and the path behind it."""
    title, equals, rest = path.partition("=")
    return (title + equals, rest) if equals and "/" not in title else ("", path)


def command(run: Run) -> str:
    """What starts the same run from the same folder; the paths outside it are nobody else's business."""
    num_nodes, here = run.about.get("num_nodes", 1), run.about.get("working_folder", "/nowhere")
    words = ["crossrank", "train"]
    if run.about["world_size"] > 1:
        meeting = ["--nnodes", str(num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT"]
        words = ["torchrun", *(meeting if num_nodes > 1 else []), "--nproc-per-node",
                 str(run.about["world_size"] // num_nodes), "-m", *words]  # fmt: skip
    paths = {own.name for own in dataclasses.fields(Config) if rule(own).path}
    for name in hyperparameters(run, changed_only=True):
        value = run.config[name]
        if name in paths:
            value = [foreign(path, here) for path in value] if isinstance(value, list) else foreign(value, here)
        if isinstance(value, list) and not any("," in item for item in value):
            value = ",".join(value)
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def foreign(path: str, here: str) -> str:
    """`path` as others may see it, from the folder `here`."""
    title, path = titled(path)
    if not Path(path).is_absolute():
        return title + path
    inside = Path(path).is_relative_to(here)
    return title + str(Path(path).relative_to(here) if inside else Path("/path/to", Path(path).name))


def fields(run: Run, changed_only: bool) -> list[list[str]]:
    """Name, value and default of hyperparameters, as text."""
    defaults = {own.name: default(own) for own in dataclasses.fields(Config)}
    shown = hyperparameters(run, changed_only)
    return [[name, *("-" if value in (None, "", []) else str(value) for value in (shown[name], defaults[name]))]
            for name in shown]  # fmt: skip
