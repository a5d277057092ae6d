"""The run folder: what a run writes beside its model, and what it says on the way."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from trainer.config import Config, UserError, differences, read_yaml, write_yaml

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "evaluate", "numpy", "safetensors")


def say(text: str) -> None:
    """A line for the person who watches, above any progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def open_run(config: Config) -> tuple[Path, bool]:
    """The run's folder, and whether an unfinished run is in it that this one goes on with.

    Raises UserError if a finished run is there, or another one, or where nothing can be written.
    """
    folder = Path(config.output_dir or f"runs/{config.run_name or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}")
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write the run folder {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write the run folder {folder}: {nearest} may not be written to")
    if not (folder / "config.yaml").exists():
        if (folder / "model").exists():
            raise UserError(f"{folder} holds a model, which is never overwritten; choose another --output_dir")
        return folder, False
    if (folder / "results.json").exists():
        raise UserError(f"{folder} holds a finished run, which is never overwritten; choose another --output_dir")
    if config.resume_from_checkpoint == "none":
        raise UserError(f"{folder} holds an unfinished run; choose another --output_dir, or leave out "
                        "--resume_from_checkpoint none to go on with it")  # fmt: skip
    if differing := differences(read_yaml(folder / "config.yaml"), config):
        raise UserError(f"{folder} holds an unfinished run of another config ({'; '.join(differing)}); use its config "
                        "to go on with it, or choose another --output_dir")  # fmt: skip
    return folder, True


def claim(folder: Path, config: Config) -> FileLock:
    """Creates the run folder, with its config. The lock that it returns dies with this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        write_yaml(config, folder / ".config.yaml")
        (folder / ".config.yaml").replace(folder / "config.yaml")
        old, model = folder / ".model.old", folder / "model"
        if old.exists() and not model.exists():  # killed between two renames
            old.rename(model)
        for remains in folder.glob(".model.*"):
            shutil.rmtree(remains, ignore_errors=True)
    except Timeout:
        raise UserError(f"another run is writing {folder}; choose another --output_dir") from None
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror}") from None
    return lock


def rewind(path: Path, state: dict[str, Any] | None) -> None:
    """Cuts metrics.jsonl back to what had been written when the checkpoint of `state` was: the rest comes again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = lines[: state["num_events"]] if state else []
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


class Journal:
    """metrics.jsonl, trackers, log lines and the progress bar. Silent without a folder, as on every rank but 0."""

    def __init__(self, folder: Path | None, num_steps: int, step: int = 0, trackers: Sequence[Any] = ()) -> None:
        self.trackers = trackers
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8") if folder else None
        self.num_events = len((folder / "metrics.jsonl").read_bytes().splitlines()) if folder else 0
        self.bar = tqdm(
            total=num_steps, initial=step, unit="step", disable=None if folder else True, dynamic_ncols=True
        )

    def train(self, values: dict[str, Any]) -> None:
        self._write("train", values)
        shown = {"loss": f"{values['loss']:.4f}", "pairs/s": f"{values['samples_per_second']:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable:
            self._say(f"step {values['step']}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))

    def eval(self, values: dict[str, Any]) -> None:
        self._write("eval", values)
        scores = ", ".join(f"{name} {values[name]:.4f}" for name in ("loss", "f1_macro", "f1_micro"))
        self._say(f"step {values['step']}: {values['split']} {scores}")

    def close(self) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        if self.file:
            self.file.close()

    def _say(self, text: str) -> None:
        if self.file:
            say(text)

    def _write(self, event: str, values: dict[str, Any]) -> None:
        if self.file:
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


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a run's numbers."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether it has changes; None outside one."""
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", __file__):
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None
