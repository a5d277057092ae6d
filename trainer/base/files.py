"""Files that are complete or absent, whatever becomes of the process that writes them."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder, which takes its name when the block ends without error.

    What had the name before is there until then. With `durable`, the content is on the disk before the name is, and
    the name before this returns. A process that is killed leaves `.NAME.HOST.PID` behind; see remove_remains.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield temporary
        if durable:
            for part in (*temporary.rglob("*"), temporary):
                sync(part)
        if temporary.is_dir() and path.exists():
            old = path.with_name(f".{path.name}.old")
            path.rename(old)  # between these two lines there is none by that name: see remove_remains
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        _remove(temporary)


def remove_remains(folder: Path) -> None:
    """Clears what killed processes left in `folder`, which no other may be writing.

    An old folder whose successor has not got its name takes it back.
    """
    for old in folder.glob(".*.old"):
        path = old.with_name(old.name[1:].removesuffix(".old"))
        if not path.exists():
            old.rename(path)
    for remains in folder.glob(".*"):
        if re.fullmatch(r"\..+\.(\d+|old)", remains.name):
            _remove(remains)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    with replacing(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def json_object(line: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError saying what it is instead."""
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
