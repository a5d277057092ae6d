"""Checkpoints as they are read: nothing is taken from one before its every byte has been looked at.

What is in a folder, and what counts as damaged, is said in checkpoint.py.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.files import json_object
from trainer.ranks import ALONE, World
from trainer.run.parts import (
    INDEX,
    TENSORS,
    Damaged,
    Tensors,
    content,
    describe,
    part_names,
    unread,
)
from trainer.together import together

FORMAT, DIVIDED = "crossrank-checkpoint-1", "crossrank-checkpoint-2"
STATE, MANIFEST = "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """`state` is what state.json holds; `tensors` by kind and parameter name, such as `exp_avg/model.bert...`.

    On ranks that do not see its files both are empty.
    """

    path: Path
    state: Mapping[str, Any]
    tensors: Tensors


def load(path: Path, world: World = ALONE) -> Checkpoint:
    """A checkpoint whose every byte matches its manifest; the ranks that see it share the work of looking.

    Every rank takes part. Raises Damaged where it is proven not to be one, OSError where it cannot be read.
    """
    digest, files, divided = together(
        world, lambda: _read_manifest(path) if world.is_main else ("", {}, False), Damaged
    )
    digest = world.broadcast(digest)
    shared = world.all(world.is_main or _digest(path) == digest)
    if shared:
        _, files, divided = together(world, lambda: _read_manifest(path), Damaged)
    order = sorted(files)
    mine = order[world.rank :: world.size] if shared else order
    together(world, lambda: _verify(path, {name: files[name] for name in mine}), Damaged)
    if not shared and not world.is_main:
        return Checkpoint(path, {}, Tensors(path, {}, shared=False))
    return together(world if shared else ALONE, lambda: _opened(path, divided, shared), Damaged)


def _opened(path: Path, divided: bool, shared: bool) -> Checkpoint:
    with _sound():
        state = json_object(content(path / STATE))
        index = json_object(content(path / INDEX)) if divided else None
        return Checkpoint(path, state, Tensors.of(path, index, shared))


def _digest(path: Path) -> str:
    """Of a manifest; of none, where this rank sees none."""
    try:
        return hashlib.sha256(content(path / MANIFEST)).hexdigest()
    except (OSError, Damaged):
        return "none"


def _read_manifest(path: Path) -> tuple[str, dict[str, Any], bool]:
    """Its digest, its files as it describes them, and whether the tensors are divided."""
    with _sound():
        text = content(path / MANIFEST)
        manifest = json_object(text)
        files, kind = manifest["files"], manifest["format"]
        if kind not in (FORMAT, DIVIDED):
            if re.fullmatch(r"crossrank-checkpoint-\d+", kind):
                raise unread(path, f"of the format {kind}, which another version of crossrank has written")
            raise Damaged(f"its format is {kind!r}, not {FORMAT!r} or {DIVIDED!r}")
        expected = {TENSORS, STATE} if kind == FORMAT else {INDEX, STATE, *part_names(len(files) - 2)}
        if set(files) != expected:
            raise Damaged(f"its manifest names {', '.join(sorted(map(repr, files)))}")
        return hashlib.sha256(text).hexdigest(), files, kind == DIVIDED


def _verify(path: Path, files: dict[str, Any]) -> None:
    with _sound():
        for name, expected in files.items():
            if describe(path / name) != expected:
                raise Damaged(f"{name} does not match the manifest")


@contextmanager
def _sound() -> Iterator[None]:
    """What is missing or malformed is damaged."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"it cannot be read: {type(error).__name__}: {error}") from None
