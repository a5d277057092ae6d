"""Orders of long data sets: each is drawn once a node, into a file that the node's ranks map.

The files lie among the node's temporary files, and not in a cache that nodes may share: what a host removes from a
network's file system is gone for those that have it mapped.
"""

from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
from filelock import FileLock

from trainer.base.errors import named
from trainer.base.files import replacing
from trainer.base.folders import private, temporary_folder
from trainer.base.log import log

KEPT = 4  # files, those of killed runs included: whoever writes one more removes the oldest


def mapped(identity: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """What `draw` returns, read-only, from the file of that identity; one process writes it, the node's others wait.

    Without room for a file it is drawn into this process's own memory, with a warning.
    """
    path = None
    try:
        path = _path(identity)
        path.parent.mkdir(exist_ok=True)
        with FileLock(path.parent / "lock"):
            order = _read(path)
            if order is None:
                with replacing(path, durable=False) as temporary, temporary.open("wb") as file:
                    np.save(file, draw())
                order = np.load(path, mmap_mode="r")
                _remove_old(path)
        return order
    except OSError as error:
        log.warning(f"no file for the order of the samples, each rank holds it in memory: {named(error)}")
        return draw()


def remove(identity: str) -> None:
    """Once it has been used: who has it mapped keeps it."""
    with suppress(OSError):
        _path(identity).unlink()


def _path(identity: str) -> Path:
    folder = private(temporary_folder()) / "orders"
    return folder / f"{sha256(identity.encode()).hexdigest()[:32]}.npy"


def _read(path: Path) -> np.ndarray | None:
    """None where there is none, or a damaged one."""
    try:
        return np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None


def _remove_old(newest: Path) -> None:
    """All but the newest, and what killed writers left; only who holds the lock may."""
    files = [path for path in newest.parent.iterdir() if path.name != "lock" and path != newest]
    orders = sorted((path for path in files if path.suffix == ".npy"), key=lambda path: path.stat().st_mtime)
    for path in {*files} - {*orders[1 - KEPT :]}:
        path.unlink(missing_ok=True)
