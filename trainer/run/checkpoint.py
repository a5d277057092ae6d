"""Checkpoints that are complete or invisible.

A checkpoint is a folder `step-000500` of three files: `tensors.safetensors` (weights and the optimizer's moments, in
full, in fp32), `state.json` (where the run is) and `manifest.json` (size and SHA-256 of the others). Where a backend
shards, each rank writes its own part, `tensors-00001-of-00004.safetensors`, and `index.json` says which run of each
flattened tensor lies in which; any backend on any number of ranks reads either. It is written under another name, every
file is flushed to the disk, and hashed on its way there; then rank 0 writes the manifest, and the folder gets its name.
Nothing in it is ever executed. What does not match its manifest is not loaded; what else lies in the folder is not
looked at.

Why not torch.distributed.checkpoint: its `.metadata` is a pickle, which could run any code, nothing in it tells a
damaged file from a sound one, and where there is no shared file system it leaves a part on each machine.

Damaged is what is proven to be: a file that is missing, or is not what the manifest says. What cannot be read today, or
not by this version, or not without following a link, may be sound: it ends the run, and nothing is touched.
"""

import errno
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from trainer.backends.share import Share, collected
from trainer.base import tensor_files
from trainer.base.errors import TrainingFailed, UserError, first_line, named
from trainer.base.files import remove_remains, replacing
from trainer.base.log import log
from trainer.ranks import ALONE, World
from trainer.run.parts import INDEX, TENSORS, Damaged, all_see, describe, index_of, part_name
from trainer.run.post import Abandoned, Post
from trainer.run.verified import DIVIDED, FORMAT, MANIFEST, STATE, Checkpoint, load
from trainer.together import together

NAME = r"step-\d{6,}"


class Checkpoints:
    """The checkpoints of one run, written by a thread of each rank that has something to write, while training
    continues. Every rank takes part in each call, but for `close`.

    Args:
        folder: where they lie.
        keep: how many to keep; None = all. An older one goes only when a newer one is on the disk.
        patience: how many seconds rank 0 waits for the others' parts, when its own is written.
    """

    def __init__(self, folder: Path, keep: int | None, world: World = ALONE, patience: float = 1800) -> None:
        self.folder, self.keep, self.world, self.patience = folder, keep, world, patience
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        self.shared: bool | None = None  # whether all ranks see the folder, once that is known
        self.post: Post | None = None

    def save(self, step: int, share: Share, state: Mapping[str, Any]) -> None:
        """Begins to write; what `share` holds must no longer change, `state` counts on rank 0. Raises TrainingFailed
        if the one before failed."""
        self.wait()
        if share.divided and self.shared is None:
            self.shared = all_see(self.folder, self.world)
            if not self.shared:
                log.warning(f"not all ranks see {self.folder}: rank 0 gathers whole checkpoints, and needs memory for "
                            "12 bytes a parameter; give an --output_dir that all nodes share")  # fmt: skip
        if not share.divided or not self.shared:
            whole = collected(share, self.world) if share.divided else share
            work = (lambda: self._write(step, whole, state)) if self.world.is_main else lambda: None
            self.pending = self.thread.submit(work)
            return
        places = self.world.gather(share.places()[None])
        self.post = post = Post.new(self.world, self.patience)
        if places is None:
            self.pending = self.thread.submit(self._write_part, share, post)
        else:
            self.pending = self.thread.submit(self._write, step, share, state, places, post)

    def wait(self) -> None:
        """Until everything is on the disk. Raises TrainingFailed, on every rank, if it could not be written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            failure = _failure(pending, self.folder)
            # A part that could not be written has told rank 0, and whoever found no folder has nothing to say.
            if failure := self.world.broadcast(failure):
                raise TrainingFailed(failure)

    def close(self, gone: bool = False) -> None:
        """The same of this rank alone, at the end: where another one is `gone`, its part is not waited for."""
        pending, self.pending = self.pending, None
        if self.post is not None and gone:
            self.post.hurry()
        if pending is not None and (failure := _failure(pending, self.folder)):
            raise TrainingFailed(failure)

    def newest(self) -> Checkpoint | None:
        """The newest one that is complete; None where none was ever saved. Says which ones it skips, and why.

        Removes what a killed save left, and puts damaged ones aside. Raises TrainingFailed, and touches none, where one
        cannot be read, or where all are damaged: the run would begin anew, and its log would be cut.
        """
        found = self.search()
        if self.world.is_main:
            for path in self._named(rf"\.{NAME}\..+"):
                remove_remains(path.with_name(path.name.split(".")[1]))
            for path in self._all():
                if found and _step(path) > _step(found.path):
                    _put_aside(path)  # it must not count among those that are kept
        return found

    def search(self) -> Checkpoint | None:
        """The same, and everything is left as it is."""
        world = self.world
        try:
            names = together(world, lambda: [str(path) for path in self._all()] if world.is_main else [])
            for name in reversed(self.world.broadcast(names)):
                try:
                    return load(Path(name), self.world)
                except Damaged as damage:
                    log.warning(f"skipping the checkpoint {name}: {damage}")
            rejected = together(world, lambda: world.is_main and bool(self._named(rf"{NAME}(\.damaged-\d+)?")))
        except OSError as error:
            raise TrainingFailed(
                f"cannot read the checkpoints in {self.folder}: {named(error)}; nothing was changed. Fix that and "
                "start the same command again, or start over with another --output_dir"
            ) from None
        if self.world.broadcast(rejected):
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

    def _write(
        self, step: int, share: Share, state: Mapping[str, Any], places: np.ndarray | None = None,
        post: Post | None = None,
    ) -> None:  # fmt: skip
        """On rank 0: its file, what goes with it, and the name, when all is there. `places` (ranks, keys, 2) of what
        each rank has, and the `post` to the others, where they write too."""
        final = self.folder / f"step-{step:06d}"
        with Post.answering(post):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(final) as temporary:
                temporary.mkdir()
                if post:
                    post.tell("folder", {"path": str(temporary)})
                own = TENSORS if places is None else part_name(0, len(places))
                files = {own: tensor_files.write(temporary / own, share.arrays())}
                texts = {STATE: json.dumps(state)}
                if post and places is not None:
                    files |= post.collect()
                    texts[INDEX] = json.dumps(index_of(share.shapes, places))
                for name, text in texts.items():
                    (temporary / name).write_text(text, encoding="utf-8")
                    files[name] = describe(temporary / name)
                manifest = {
                    "format": DIVIDED if post else FORMAT,
                    "files": {name: files[name] for name in sorted(files)},
                }
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for old in self._all()[: -self.keep if self.keep else 0]:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)

    def _write_part(self, share: Share, post: Post) -> None:
        """On the other ranks."""
        with suppress(Abandoned):
            folder = Path(post.hear("folder")["path"])
            name = part_name(self.world.rank, self.world.size)
            try:
                written = tensor_files.write(folder / name, share.arrays())
            except BaseException as error:  # memory too: rank 0 would wait for a part that never comes
                told = f"rank {self.world.rank} could not write its part of a checkpoint: {first_line(error)}"
                if isinstance(error, OSError):
                    told = str(cannot_write(self.folder, error))
                post.tell(self.world.rank, {"error": told})
                raise
            post.tell(self.world.rank, {"file": name, "described": written})
            post.see_out()


def _failure(pending: Future[None], folder: Path) -> str | None:
    """What to tell the user of a save that failed, when it has ended."""
    try:
        pending.result()
    except OSError as error:
        return str(cannot_write(folder, error))
    except TrainingFailed as error:  # another rank's
        return str(error)
    except Abandoned as missing:
        if str(missing):
            log.warning(f"a checkpoint is given up: {missing}; those before it are whole")
    return None


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


def load_given(path: Path, world: World = ALONE) -> Checkpoint:
    """The checkpoint, or the newest of the run folder, that a user names; it is somebody else's, and left as it is.

    Every rank takes part. Raises UserError.
    """
    try:
        if world.broadcast((path / "checkpoints").is_dir()):
            newest = Checkpoints(path / "checkpoints", None, world).search()
            if newest is None:
                raise Damaged("it holds no checkpoint that is complete")
            return newest
        return load(path, world)
    except (Damaged, TrainingFailed) as damage:
        raise UserError(f"cannot resume from {path}: {damage}") from None
    except OSError as error:
        raise UserError(f"cannot resume from {path}: {named(error)}") from None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _put_aside(path: Path) -> None:
    """Gives a damaged checkpoint another name, for whoever wants to look at it."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
