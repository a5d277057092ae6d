"""Files that are complete or absent, whatever becomes of the process that writes them."""

import difflib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder, which takes its name when the block ends without error.

    What had the name before is there until then. With `durable`, the content is on the disk before the name is, and
    the name before this returns. A process that is killed leaves `.NAME.PID` behind; see remove_remains.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def remove_remains(path: Path) -> None:
    """Clears what processes killed inside `replacing(path)` left: an old folder without a successor gets its name."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    for remains in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(remains, ignore_errors=True)


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


def lost_folder(name: str, hub: bool = True) -> str | None:
    """What to say of a name that can only be a folder, and is none; None where it exists, or the hub may have it.

    `hub`: it is as likely to be OWNER/NAME on the hub as a folder in one that exists.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # False also for what can be no path
        return None
    near = difflib.get_close_matches(path.name, _folders(path.parent), 1)
    outside = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    inside = "/" in name and path.parent.is_dir() and (near or not hub)
    if not (outside or inside):
        return None
    return f"{name}: no such folder; " + (f"did you mean {path.parent / near[0]}?" if near else "check its name")


def _folders(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.iterdir() if entry.is_dir()]
    except OSError:
        return []


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
