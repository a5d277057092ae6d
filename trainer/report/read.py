"""A run folder, read: finished or not, with damaged lines counted. Needs no torch."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.errors import UserError, first_line
from trainer.base.fields import default
from trainer.base.files import json_object
from trainer.config import Config, read_yaml

SCORES = {"f1_macro": "F1 Macro", "f1_micro": "F1 Micro", "f1_weighted": "F1 Weighted"}


@dataclass(frozen=True)
class Run:
    """What a run folder says; `results` is empty while the run is unfinished, `damaged` counts unreadable events."""

    folder: Path
    config: dict[str, Any]
    about: dict[str, Any]
    results: dict[str, Any]
    events: list[dict[str, Any]]
    damaged: int

    def of(self, kind: str, split: str | None = None) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == kind and split in (None, e.get("split"))]


def read_run(folder: Path) -> Run:
    """Raises UserError where `folder` is no run's."""
    if not (folder / "config.yaml").is_file():
        hint = "; give the run folder, one above" if (folder / "model.safetensors").is_file() else ""
        raise UserError(f"{folder} is not a run folder: it has no config.yaml{hint}")
    about = _read_json(folder / "about.json")
    if about is None:
        raise UserError(f"{folder} has no about.json; the run has not got as far as its first step, or is of an older "
                        "version of crossrank")  # fmt: skip
    events, damaged = _read_events(folder / "metrics.jsonl")
    config = {own.name: default(own) for own in dataclasses.fields(Config)}
    return Run(
        folder=folder,
        config=config | read_yaml(folder / "config.yaml"),
        about=about,
        results=_read_json(folder / "results.json") or {},
        events=events,
        damaged=damaged,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}; take it from a copy of the run") from None


def _read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that can be read, and how many can't."""
    if not path.is_file():
        return [], 0
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    events = [event for event in map(_event, lines) if event is not None]
    return events, len(lines) - len(events)


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json_object(line)
        numbers = [event["step"], event["epoch"]]
        if event["event"] == "train":
            numbers += [event[name] for name in ("loss", "learning_rate", "samples_per_second", "tokens_per_second")]
        else:
            numbers += [event[name] for name in ("loss", *SCORES)]
            str(event["split"])
    except (ValueError, KeyError, TypeError):
        return None
    return event if all(isinstance(number, (int, float)) for number in numbers) else None
