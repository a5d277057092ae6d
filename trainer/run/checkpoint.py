"""Checkpoints that are complete or invisible.

A checkpoint is a folder `step-000500` of three files: `tensors.safetensors` (weights and the optimizer's moments, in
full, in fp32), `state.json` (where the run is) and `manifest.json` (size and SHA-256 of the others). It is written
under another name, every file is flushed to the disk; then the folder gets its name. Nothing in it
is ever executed. What does not match its manifest is not loaded; what else lies in the folder is not looked at.

Damaged is what is proven to be: a file that is missing, or is not what the manifest says. What cannot be read today, or
not by this version, or not without following a link, may be sound: it ends the run, and nothing is touched.
"""

import errno
import hashlib
import json
import re
import shutil
import stat
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.base.errors import TrainingFailed, UserError, named
from trainer.base.files import json_object, naming, remove_remains, replacing
from trainer.base.log import log

FORMAT = "crossrank-checkpoint-1"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
NAME = r"step-\d{6,}"


class Damaged(Exception):
    """Why a folder is no checkpoint that can be loaded."""


@dataclass(frozen=True)
class Checkpoint:
    """`state` is what state.json holds; `tensors` by kind and parameter name, such as `exp_avg/model.bert...`."""

    path: Path
    state: Mapping[str, Any]
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

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> None:
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
        """The newest one that is complete; None where none was ever saved. Says which ones it skips, and why.

        Removes what a killed save left, and puts damaged ones aside. Raises TrainingFailed, and touches none, where one
        cannot be read, or where all are damaged: the run would begin anew, and its log would be cut.
        """
        found = self.search()
        for path in self._named(rf"\.{NAME}\..+"):
            remove_remains(path.with_name(path.name.split(".")[1]))
        for path in self._all():
            if found and _step(path) > _step(found.path):
                _put_aside(path)  # it must not count among those that are kept
        return found

    def search(self) -> Checkpoint | None:
        """The same, and everything is left as it is."""
        try:
            for path in reversed(self._all()):
                try:
                    return load(path)
                except Damaged as damage:
                    log.warning(f"skipping the checkpoint {path}: {damage}")
            rejected = self._named(rf"{NAME}(\.damaged-\d+)?")
        except OSError as error:
            raise TrainingFailed(
                f"cannot read the checkpoints in {self.folder}: {named(error)}; nothing was changed. Fix that and "
                "start the same command again, or start over with another --output_dir"
            ) from None
        if rejected:
            raise TrainingFailed(
                f"all checkpoints in {self.folder} are damaged; put one back from a copy, or start over with another "
                "--output_dir"
            )
        return None

    def _all(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._named(NAME), key=_step)

    def _named(self, pattern: str) -> list[Path]:
        """What lies in the folder under such names; Path.glob would hide what can't be read."""
        if not self.folder.exists() and not self.folder.is_symlink():
            return []
        return [path for path in self.folder.iterdir() if re.fullmatch(pattern, path.name)]

    def _write(self, step: int, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> None:
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
    """What to tell the user of a run that cannot continue for a file. Nothing that was saved is lost by it.

    Only a file of the run's `folder` is blamed on that.
    """
    number, file = getattr(error, "errno", None), getattr(error, "filename", None)
    full = "No space left" in str(error) or number in (errno.ENOSPC, errno.EDQUOT)
    own = file is not None and Path(str(file)).absolute().is_relative_to(folder.absolute())
    what = f"cannot write into {folder}: {named(error)}" if own else named(error)
    return TrainingFailed(
        f"{what}; {'make space' if full else 'fix that'} and start the same command again, which resumes from the "
        "newest checkpoint"
    )


def load(path: Path) -> Checkpoint:
    """A checkpoint whose every byte matches its manifest.

    Raises Damaged where it is proven not to be one, OSError where it cannot be read.
    """
    try:
        manifest = json_object(_content(path / MANIFEST))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            if re.fullmatch(r"crossrank-checkpoint-\d+", manifest["format"]):
                raise _unread(
                    path, f"of the format {manifest['format']}, which another version of crossrank has written"
                )
            raise Damaged(f"its format is {manifest['format']!r}, not {FORMAT!r}")
        if set(files) != {TENSORS, STATE}:
            raise Damaged(f"its manifest names {', '.join(sorted(map(repr, files)))}")
        for name, expected in files.items():
            if _describe(path / name) != expected:
                raise Damaged(f"{name} does not match the manifest")
        state = json_object(_content(path / STATE))
        with naming(path / TENSORS):
            return Checkpoint(path, state, load_file(path / TENSORS))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise Damaged(f"it cannot be read: {type(error).__name__}: {error}") from None


def load_given(path: Path) -> Checkpoint:
    """The checkpoint, or the newest of the run folder, that a user names; it is somebody else's, and left as it is.

    Raises UserError.
    """
    try:
        if (path / "checkpoints").is_dir():
            newest = Checkpoints(path / "checkpoints", None).search()
            if newest is None:
                raise Damaged("it holds no checkpoint that is complete")
            return newest
        return load(path)
    except (Damaged, TrainingFailed) as damage:
        raise UserError(f"cannot resume from {path}: {damage}") from None
    except OSError as error:
        raise UserError(f"cannot resume from {path}: {named(error)}") from None


def _open(path: Path) -> BinaryIO:
    """Raises OSError for a link, and Damaged for what else is no file of crossrank's, before it is opened."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise _unread(path, "a symbolic link, which is not followed; put the file itself in its place")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder says what is wrong
        raise Damaged(f"{path.name} is not a plain file")
    return path.open("rb")


def _unread(path: Path, what: str) -> OSError:
    """For what is not proven to be damaged."""
    return OSError(errno.EINVAL, what, str(path))


def _content(path: Path) -> bytes:
    with naming(path), _open(path) as file:
        return file.read()


def _describe(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with naming(path), _open(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _put_aside(path: Path) -> None:
    """Gives a damaged checkpoint another name, for whoever wants to look at it."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
