"""What card, page and comparison say alike of a run: its scores' sizes and intervals, its fields, its command."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from trainer.base.fields import default, rule
from trainer.config import Config
from trainer.metrics import interval
from trainer.report.read import Run


def from_scratch(run: Run) -> bool:
    return run.config["init"] == "random" or run.config["model_name_or_path"] == "builtin"


def rounded(value: float | None) -> str:
    return "-" if value is None else str(round(value, 4))


def fixed(value: float | None) -> str:
    """A score in a column of scores."""
    return "-" if value is None else f"{value:.4f}"


def size_of(scores: dict[str, Any]) -> int:
    """Pairs that were scored."""
    return int(scores["num_samples"] if "num_samples" in scores else sum(map(sum, scores["confusion_matrix"])))


def interval_of(scores: dict[str, Any]) -> tuple[float, float] | None:
    """Of F1 macro; None of other scores, and where the matrix does not have all classes."""
    whole = "f1_macro" in scores and "confusion_classes" not in scores and size_of(scores) > 0
    return interval(scores["confusion_matrix"]) if whole else None


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
