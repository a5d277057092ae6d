"""The files of a checkpoint, one by one: what may be opened, and which tensors lie where."""

import errno
import math
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from trainer.base import tensor_files
from trainer.base.errors import TrainingFailed
from trainer.base.files import naming
from trainer.ranks import World
from trainer.together import together

TENSORS, INDEX = "tensors.safetensors", "index.json"
Run = tuple[int, int, str]  # from where to where in the flattened tensor, and in which file


class Damaged(Exception):
    """Why a folder is no checkpoint that can be loaded."""


def part_name(rank: int, size: int) -> str:
    return f"tensors-{rank:05d}-of-{size:05d}.safetensors"


def part_names(size: int) -> list[str]:
    return [part_name(rank, size) for rank in range(size)]


def index_of(shapes: dict[str, tuple[int, ...]], places: np.ndarray) -> dict[str, Any]:
    """index.json: by key the shape, and [start, stop, rank] of each run that is not empty; see Share.places.

    Raises TrainingFailed where the runs do not make up a tensor: nobody could load that.
    """
    tensors = {}
    for number, (key, shape) in enumerate(shapes.items()):
        own = places[:, number]
        runs = [[int(own[rank, 0]), int(own[rank].sum()), int(rank)] for rank in np.flatnonzero(own[:, 1])]
        if not make_up(runs, shape):
            raise TrainingFailed(f"the ranks' runs do not make up {key}: no checkpoint was written of this step")
        tensors[key] = {"shape": list(shape), "runs": runs}
    return {"files": part_names(len(places)), "tensors": tensors}


def make_up(runs: Sequence[Sequence[Any]], shape: Sequence[int]) -> bool:
    """Whether each of the runs, which begin with start and stop, follows on the one before, up to the last number."""
    ends = [0, *(run[1] for run in runs)]
    return [run[0] for run in runs] == ends[:-1] and ends[-1] == math.prod(shape)


class Tensors:
    """The fp32 tensors of a checkpoint, of which a rank reads what it needs.

    Attributes:
        shapes: by key; empty on a rank that does not see the files.
        shared: whether every rank sees them.
    """

    def __init__(self, path: Path, runs: dict[str, list[Run]], shapes: Any = None, shared: bool = True) -> None:
        self.path, self.runs, self.shared = path, runs, shared
        self.shapes: dict[str, tuple[int, ...]] = shapes or {}
        self.headers: dict[str, tensor_files.Header] = {}

    @classmethod
    def of(cls, path: Path, index: dict[str, Any] | None, shared: bool) -> "Tensors":
        """Of a checkpoint whose files are as they were written. Raises ValueError, KeyError, TypeError or OSError."""
        if index is None:
            with naming(path / TENSORS), open_plain(path / TENSORS) as file:
                shapes = tensor_files.read_header(file).shapes
            return cls(path, {key: [(0, math.prod(s), TENSORS)] for key, s in shapes.items()}, shapes, shared)
        files, found = index["files"], index["tensors"]
        if files != part_names(len(files)):
            raise ValueError("its index names other files than ranks write")
        shapes = {key: tuple(own["shape"]) for key, own in found.items()}
        runs = {key: [(start, stop, files[rank]) for start, stop, rank in own["runs"]] for key, own in found.items()}
        for key, own in runs.items():
            if not make_up(own, shapes[key]):
                raise ValueError(f"its runs do not make up {key}")
        return cls(path, runs, shapes, shared)

    def run(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Numbers `start` to `stop` of the flattened tensor. Raises TrainingFailed where they are not there."""
        out = np.empty(stop - start, np.float32)
        for first, last, name in self.runs[key]:
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                self._read(name, key, begin - first, out[begin - start : end - start])
        return torch.from_numpy(out)

    def _read(self, name: str, key: str, start: int, out: np.ndarray) -> None:
        path = self.path / name
        try:
            with naming(path), open_plain(path) as file:
                if name not in self.headers:
                    self.headers[name] = tensor_files.read_header(file)
                self.headers[name].read(file, key, start, out)
        except (Damaged, ValueError, KeyError, TypeError) as error:
            raise TrainingFailed(f"{path} has changed since the run began to read it: {error}") from None


def open_plain(path: Path) -> BinaryIO:
    """Raises OSError for a link, and Damaged for what else is no file of crossrank's, before it is opened."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise unread(path, "a symbolic link, which is not followed; put the file itself in its place")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder says what is wrong
        raise Damaged(f"{path.name} is not a plain file")
    return path.open("rb")


def unread(path: Path, what: str) -> OSError:
    """For what is not proven to be damaged."""
    return OSError(errno.EINVAL, what, str(path))


def content(path: Path) -> bytes:
    with naming(path), open_plain(path) as file:
        return file.read()


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256."""
    with naming(path), open_plain(path) as file:
        return tensor_files.describe(file)


def all_see(folder: Path, world: World) -> bool:
    """Whether every rank sees what rank 0 writes into the folder. Every rank takes part. Raises OSError."""
    probe = folder / f".step-{0:06d}.{socket.gethostname()}.{os.getpid()}"  # a name that a later start would clear

    def touch() -> None:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()

    together(world, touch)
    seen = world.all(Path(world.broadcast(str(probe))).exists())
    if world.is_main:
        probe.unlink()
    return seen
