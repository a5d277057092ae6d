"""Arrays in a folder that every process of a node maps: complete or absent, and never trusted where they are damaged.

A folder holds NAME.bin for each array, as plain little-endian numbers, and facts.json, which says what they are. So
many processes share one copy in the system's memory, and none reads what it does not use.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from trainer.base.errors import UserError
from trainer.base.files import json_object, replacing, sync
from trainer.base.log import log

FACTS = "facts.json"
# Bytes of a folder up to which every start reads all of it to look for damage: a fifth of a second.
SMALL = 1 << 28
BLOCK = 1 << 24
Check = Callable[[], None]


def nothing() -> None:
    """What is called while work goes on, where nobody may stop it."""


@dataclass(frozen=True)
class Stored:
    """What a folder holds: its arrays, mapped, and what facts.json says beside."""

    path: Path
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def store(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
    files: Mapping[str, tuple[Any, Iterable[Path]]] | None = None,
) -> Stored:
    """Writes the folder `path`; one that is there is replaced.

    Args:
        files: arrays that are in files already: their type, and the files that make one array, one after the other.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=False) as folder:
        folder.mkdir()
        listed = {name: _write_array(folder, name, array) for name, array in arrays.items()}
        for name, (kind, parts) in (files or {}).items():
            listed[name] = _write_parts(folder, name, np.dtype(kind), parts)
        (folder / FACTS).write_text(json.dumps({**facts, "arrays": listed}), encoding="utf-8")
    made = stored(path)
    if made is None:
        raise OSError(None, "what was written there cannot be read again", str(path))
    return made


def _write_array(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    array = np.ascontiguousarray(array)
    data: Any = array.reshape(-1).view(np.uint8).data if array.size else b""
    path = folder / f"{name}.bin"
    path.write_bytes(data)
    return _fact(path, array.dtype, list(array.shape), hashlib.sha256(data).hexdigest())


def _write_parts(folder: Path, name: str, kind: np.dtype, parts: Iterable[Path]) -> dict[str, Any]:
    """The first part becomes the array, and the others go once they are in it: nothing takes its room twice."""
    path, digest = folder / f"{name}.bin", hashlib.sha256()
    first, *others = parts
    first.replace(path)
    for block in blocks(path):
        digest.update(block)
    with path.open("ab") as whole:
        for part in others:
            for block in blocks(part):
                digest.update(block)
                whole.write(block)
            part.unlink()
    return _fact(path, kind, [path.stat().st_size // kind.itemsize], digest.hexdigest())


def _fact(path: Path, kind: np.dtype, shape: list[int], sha256: str) -> dict[str, Any]:
    if path.stat().st_size > SMALL:  # a checksum tells of smaller ones what a crash has left half written
        sync(path)
    return {"dtype": kind.str, "shape": shape, "sha256": sha256, "mtime_ns": path.stat().st_mtime_ns}


def blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def reopened(path: Path) -> Stored:
    """A folder that this process or another one of the node has just written or looked at. Raises UserError."""
    found = stored(path, verify=None)
    if found is None:
        raise UserError(f"the cache {path} went away while it was used; start the same command again")
    return found


def stored(path: Path, verify: bool | None = False, quiet: bool = False, unread: Collection[str] = ()) -> Stored | None:
    """The folder, None where it is not there or is damaged, which is said unless that is `quiet`.

    Sizes are always looked at. The bytes are where there are few, where `verify` asks for it, and where a file has
    another modification time than it was written with, as copies have; with `verify` None they are not, since another
    process of this node has just done so. Those of arrays that are `unread` are only where `verify` asks for it.

    Raises OSError where it may not be read.
    """
    if not path.exists():
        return None
    try:
        facts = json_object((path / FACTS).read_bytes())
        listed = facts.pop("arrays")
        total = sum(_size(own) for name, own in listed.items() if name not in unread)
        for name, own in listed.items():
            file = path / f"{name}.bin"
            found = file.stat()
            if found.st_size != _size(own):
                raise ValueError(f"{file.name} has {found.st_size} bytes, not {_size(own)}")
            doubtful = total <= SMALL or found.st_mtime_ns != own["mtime_ns"]
            if verify or (doubtful and verify is not None and name not in unread):
                _check(file, own["sha256"])
        if verify is not None:
            with suppress(OSError):  # it was used today: see prune
                os.utime(path)
        return Stored(path, {name: _mapped(path / f"{name}.bin", own) for name, own in listed.items()}, facts)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        if not quiet:
            log.warning(f"the cache {path} is damaged ({error}); it is built again")
        return None


def _size(fact: dict[str, Any]) -> int:
    return int(np.prod(fact["shape"], dtype=np.int64)) * np.dtype(fact["dtype"]).itemsize


def _check(file: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    for block in blocks(file):
        digest.update(block)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{file.name} has another checksum than it was written with")


def _mapped(path: Path, fact: dict[str, Any]) -> np.ndarray:
    shape = tuple(fact["shape"])
    if 0 in shape:  # nothing cannot be mapped
        return np.empty(shape, fact["dtype"])
    return np.memmap(path, fact["dtype"], "r", shape=shape).view(np.ndarray)


@contextmanager
def locked(path: Path, check: Check) -> Iterator[None]:
    """Nobody else builds `path` meanwhile; `check` is called while this waits, and may raise. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            check()
    try:
        yield
    finally:
        lock.release()


def prune(folder: Path, days: float = 30, beginning: str = "") -> None:
    """Removes what nobody has used for so many days, of the folders in it whose names begin so."""
    for path in folder.glob(f"{beginning}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < days * 86400:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".safetensors":  # of an older version
                path.unlink()


def no_room(path: Path, error: OSError) -> UserError:
    """What to say where a cache cannot be written, or what was written there is not there any more."""
    place, reason = error.filename or path, error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        return UserError(f"the cache of the data has lost a file: {place}: {reason}; let nothing clear it while a run "
                         "begins, or set CROSSRANK_CACHE to another folder")  # fmt: skip
    return UserError(f"the cache of the data cannot be written: {place}: {reason}; it takes about as "
                     "much room as the text, and half of that again for its tokens: set CROSSRANK_CACHE to a folder "
                     "that has it")  # fmt: skip
