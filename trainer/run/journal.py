"""What a run says while it goes: metrics.jsonl, trackers, log lines and the progress bar."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.base.files import naming, write_text
from trainer.base.log import log
from trainer.metrics import fixed, score_line, score_names
from trainer.run.trackers import Tracker

NAME = "metrics.jsonl"


def rewind(folder: Path, num_events: int) -> None:
    """Cuts metrics.jsonl back to its first `num_events` lines: what came after a checkpoint comes again."""
    path = folder / NAME
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()  # the last one may be torn
        write_text(path, "".join(f"{line}\n" for line in lines[:num_events]))


class Journal:
    """metrics.jsonl, trackers, log lines and the progress bar. Silent without a folder, as on every rank but 0."""

    def __init__(self, folder: Path | None, num_steps: int, step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers
        self.file = (folder / NAME).open("a", encoding="utf-8") if folder else None
        self.num_events = len((folder / NAME).read_bytes().splitlines()) if folder else 0
        self.bar = tqdm(
            total=num_steps, initial=step, unit="step", disable=None if folder else True, dynamic_ncols=True
        )

    def log_training(self, values: dict[str, Any]) -> None:
        self._write("train", values)
        shown = {"loss": fixed(values["loss"]), "pairs/s": f"{values['samples_per_second']:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable:
            log.info(f"step {values['step']}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))

    def log_evaluation(self, values: dict[str, Any]) -> None:
        self._write("eval", values)
        scores = score_line(values, ("loss", *score_names(values)[:2]))
        log.info(f"step {values['step']}: {values['split']} {scores}")

    def end_at(self, step: int) -> None:
        """The run has no more than `step` steps."""
        self.bar.total = step
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        if self.file:
            self.file.close()

    def _write(self, event: str, values: dict[str, Any]) -> None:
        if self.file:
            with naming(Path(self.file.name)):
                self.file.write(json.dumps({"event": event, **values}) + "\n")
                self.file.flush()
            self.num_events += 1
        for tracker in self.trackers:
            tracker.log(named(event, values), values["step"])


def named(event: str, values: dict[str, Any]) -> dict[str, float]:
    """An event's numbers as trackers show them: `train/loss`, `AllNLI-dev/f1_macro`."""
    group = values.get("split", event)
    return {
        f"{group}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and name != "step"
    }
