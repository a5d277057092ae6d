"""The run folder: what a run writes beside its model, and what it says on the way."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config import Config, UserError, write_yaml

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "evaluate", "numpy", "safetensors")


def say(text: str) -> None:
    """A line for the person who watches, above any progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def folder_of(config: Config) -> Path:
    """Where the run is to be written. Raises UserError if a run is there, which is never overwritten."""
    folder = Path(config.output_dir or f"runs/{config.run_name or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "config.yaml").exists() or (folder / "model").exists():
        raise UserError(f"{folder} holds a run, which is never overwritten; choose another --output_dir")
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write the run folder {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write the run folder {folder}: permission denied")
    return folder


def claim(folder: Path, config: Config) -> None:
    """Creates the run folder, with its config."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").touch(exist_ok=False)
        write_yaml(config, folder / "config.yaml")
    except FileExistsError:
        raise UserError(f"another run took {folder} in the meantime; choose another --output_dir") from None
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror}") from None


class Journal:
    """metrics.jsonl, log lines and the progress bar. Silent without a folder, as on every rank but 0."""

    def __init__(self, folder: Path | None, num_steps: int) -> None:
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8") if folder else None
        self.bar = tqdm(total=num_steps, unit="step", disable=None if folder else True, dynamic_ncols=True)

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
        if self.file:
            self.file.close()

    def _say(self, text: str) -> None:
        if self.file:
            say(text)

    def _write(self, event: str, values: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps({"event": event, **values}) + "\n")
            self.file.flush()


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


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
