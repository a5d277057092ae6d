"""A run folder, read: finished or not, with damaged lines counted. Needs no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.base.errors import UserError, first_line, unknown
from trainer.base.fields import default
from trainer.base.files import json_object
from trainer.config import SCORES, TITLES, Config, read_run_config
from trainer.report.intervals import interval_of
from trainer.report.predictions import read_predictions

# What a report takes from about.json and results.json, of any version.
ABOUT: dict[str, tuple[str, ...] | None] = {
    "dataset": ("name", "hub_id", "from_files", "revision", "language"),
    "data": ("train",),
    "padding": ("tokens", "padding"),
    "model": ("base", "hub_id", "revision", "max_length", "label_names", "num_parameters"),
    "hardware": ("cpu", "gpu", "gpus", "ram_gb", "on_cloud"),
    "versions": (),
    **dict.fromkeys(("world_size", "backend", "global_batch_size", "git")),
}
RESULTS: dict[str, tuple[str, ...] | None] = {
    "metrics": (),
    "train": ("samples_per_second", "tokens_per_second", "seconds", "steps", "interruptions"),
}


@dataclass(frozen=True)
class Run:
    """What a run folder says; `results` is empty while the run is unfinished, `damaged` counts unreadable events."""

    folder: Path
    config: dict[str, Any]
    about: dict[str, Any]
    results: dict[str, Any]
    events: list[dict[str, Any]]
    damaged: int

    @property
    def objective(self) -> str:
        return str(self.about["model"].get("objective", "cross_entropy"))

    @property
    def scores(self) -> dict[str, str]:
        """Names and titles of the objective's scores, the main one first."""
        return {name: TITLES[name] for name in SCORES[self.objective]}

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """The 95 % interval of each set's main score, where it has one."""
        metrics = self.results.get("metrics", {})
        of_pairs = self.objective != "cross_entropy"
        return {split: interval_of(own, read_predictions(self.folder, split) if of_pairs else None)
                for split, own in metrics.items()}  # fmt: skip

    @property
    def name(self) -> str:
        return str(self.config["run_name"] or self.folder.resolve().name)

    @property
    def seeds(self) -> tuple[int, int]:
        """Of weights and dropout, and of the data's order."""
        seed, of_data = self.config["seed"], self.config["data_seed"]
        return seed, seed if of_data is None else of_data

    def role(self, split: str) -> str:
        """Of a set that was scored: dev, test, test 2 ..."""
        return next((role for role, own in self.about["data"].items() if own.get("name") == split), "test")

    def headline(self) -> str | None:
        """The set whose score comes first: the first test set, or the dev split; None where nothing was scored."""
        scored = list(self.results.get("metrics", {}))
        return next((split for split in scored if self.role(split) != "dev"), next(iter(scored), None))

    def classes(self, scores: dict[str, Any]) -> list[str]:
        """Names of the rows of a set's confusion matrix: its own classes, where it has others than the model."""
        names = [str(name) for name in scores.get("label_names") or self.about["model"]["label_names"]]
        kept = scores.get("confusion_classes")
        return [*(names[number] for number in kept), "all others"] if kept else names

    def of(self, kind: str, split: str | None = None) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == kind and split in (None, e.get("split"))]


def read_run(folder: Path) -> Run:
    """Raises UserError where `folder` is no run's."""
    if not (folder / "config.yaml").is_file():
        hint = "; give the run folder, one above" if (folder / "model.safetensors").is_file() else ""
        raise UserError(f"{folder} is not a run folder: it has no config.yaml{hint}")
    about = _read_json(folder / "about.json", ABOUT)
    if about is None:
        raise UserError(f"{folder} has no about.json; the run has not got as far as its first step, or is of an older "
                        "version of crossrank")  # fmt: skip
    if (objective := about["model"].get("objective", "cross_entropy")) not in SCORES:
        raise UserError(f"{folder / 'about.json'}: {unknown('objective', str(objective), SCORES)}")
    events, damaged = _read_events(folder / "metrics.jsonl", [*SCORES[objective]])
    config = {own.name: default(own) for own in dataclasses.fields(Config)}
    return Run(
        folder=folder,
        config=config | read_run_config(folder / "config.yaml"),
        about=about,
        results=_read_json(folder / "results.json", RESULTS) or {},
        events=events,
        damaged=damaged,
    )


def _read_json(path: Path, needed: Mapping[str, tuple[str, ...] | None]) -> dict[str, Any] | None:
    """An object with the `needed` entries: each anything (None), or an object that has these."""
    if not path.is_file():
        return None
    try:
        value = json_object(path.read_bytes())
        for name, inner in needed.items():
            own = value[name]
            if inner is not None and not (isinstance(own, dict) and own.keys() >= {*inner}):
                raise ValueError(f"{name} lacks {', '.join(inner) or 'its entries'}")
        return value
    except KeyError as error:
        why = f"it lacks {error.args[0]}"
    except (ValueError, TypeError, RecursionError) as error:
        why = first_line(error)
    raise UserError(f"{path} is damaged: {why}; take it from a copy of the run")


def _read_events(path: Path, scores: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The lines that can be read, and how many can't."""
    if not path.is_file():
        return [], 0
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    events = [event for text in lines if (event := _event(text, scores)) is not None]
    return events, len(lines) - len(events)


def _event(line: str, scores: list[str]) -> dict[str, Any] | None:
    try:
        event = json_object(line)
        numbers = [event["step"], event["epoch"]]
        if event["event"] == "train":
            numbers += [event[name] for name in ("loss", "learning_rate", "samples_per_second", "tokens_per_second")]
        else:
            # None is a score that is not defined on this data.
            numbers += [event["loss"], *(event[name] for name in scores if event[name] is not None)]
            str(event["split"])
    except (ValueError, KeyError, TypeError):
        return None
    return event if all(isinstance(number, (int, float)) for number in numbers) else None
