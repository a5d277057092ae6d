"""Checkpoints that are complete or invisible.

A checkpoint is a folder `step-000500` of three files: `tensors.safetensors` (weights and the optimizer's moments, in
full, in fp32), `state.json` (where the run is) and `manifest.json` (size and SHA-256 of the others). It is written
under another name, every file is flushed to the disk; then the folder gets its name. Nothing in it
is ever executed. What does not match its manifest is not loaded.
"""

import errno
import hashlib
import json
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.base.errors import TrainingFailed, UserError
from trainer.base.files import replacing
from trainer.base.log import log

FORMAT = "crossrank-checkpoint-1"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
NAME = re.compile(r"step-(\d{6,})")


class Damaged(Exception):
    """Why a folder is no checkpoint that can be loaded."""


@dataclass(frozen=True)
class Checkpoint:
    """`state` is what state.json holds; `tensors` by kind and parameter name, such as `exp_avg/model.bert...`."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Checkpoints:
    """The checkpoints of one run, written by a thread while training continues.

    Args:
        folder: where they lie.
        keep: how many to keep; None = all. An older one goes only when a newer one is on the disk.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder, self.keep = folder, keep
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Begins to write; `tensors` must no longer change. Raises TrainingFailed if the one before failed."""
        self.wait()
        self.pending = self.thread.submit(self._write, step, tensors, state)

    def wait(self) -> None:
        """Until everything is on the disk. Raises TrainingFailed if it could not be written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            try:
                pending.result()
            except (OSError, SafetensorError) as error:
                raise cannot_write(self.folder, error) from None

    def newest(self) -> Checkpoint | None:
        """The newest one that is complete; says which ones it skips, and why."""
        for path in reversed(self._all()):
            try:
                return load(path)
            except Damaged as damage:
                log.warning(f"skipping the checkpoint {path}: {damage}")
                _put_aside(path)  # it must not count among those that are kept
        return None

    def _all(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def _write(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        final = self.folder / f"step-{step:06d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(final) as temporary:
            temporary.mkdir()
            save_file(tensors, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
            files = {name: _describe(temporary / name) for name in (TENSORS, STATE)}
            (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
        for old in self._all()[: -self.keep if self.keep else 0]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)


def cannot_write(folder: Path, error: OSError | SafetensorError) -> TrainingFailed:
    """What to tell the user of a run whose files cannot be written. Nothing that was saved is lost by it."""
    full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return TrainingFailed(
        f"cannot write into {folder}: {error}; {'make space' if full else 'fix that'} and start the same command "
        "again, which resumes from the newest checkpoint"
    )


def load(path: Path) -> Checkpoint:
    """A checkpoint whose every byte matches its manifest. Raises Damaged."""
    try:
        manifest = json.loads(_plain_file(path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise Damaged(f"its format is {manifest['format']!r}, not {FORMAT!r}")
        if set(files) != {TENSORS, STATE}:
            raise Damaged(f"its manifest names {', '.join(sorted(map(repr, files)))}")
        if strange := {entry.name for entry in path.iterdir()} - {TENSORS, STATE, MANIFEST}:
            raise Damaged(f"it holds a file that crossrank does not write: {min(strange)}")
        for name, expected in files.items():
            if _describe(_plain_file(path / name)) != expected:
                raise Damaged(f"{name} does not match the manifest")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, state, load_file(path / TENSORS))
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise Damaged(f"it cannot be read: {type(error).__name__}: {error}") from None


def load_given(path: Path) -> Checkpoint:
    """The checkpoint, or the newest of the run folder, that a user names. Raises UserError."""
    try:
        if (path / "checkpoints").is_dir():
            newest = Checkpoints(path / "checkpoints", None).newest()
            if newest is None:
                raise Damaged("it holds no checkpoint that is complete")
            return newest
        return load(path)
    except Damaged as damage:
        raise UserError(f"cannot resume from {path}: {damage}") from None


def _plain_file(path: Path) -> Path:
    if path.is_symlink():
        raise Damaged(f"{path.name} is a symbolic link")
    return path


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _put_aside(path: Path) -> None:
    """Gives a damaged checkpoint another name, for whoever wants to look at it."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
