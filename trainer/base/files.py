"""Files that are complete or absent, whatever becomes of the process that writes them."""

import difflib
import errno
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.base.errors import reason


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the operating system names its file: `path`, where it says none, as a write to a full disk does."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from None
    except Exception as error:  # libraries in Rust have errors of their own, with the number in their text
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder, which takes its name when the block ends without error.

    What had the name before is there until then. With `durable`, the content is on the disk before the name is, and
    the name before this returns. Who may read the files is for the umask to say, whatever library has written them. A
    process that is killed leaves `.NAME.HOST.PID` behind; see remove_remains.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with naming(path):
            yield temporary
            parts = [*temporary.rglob("*"), temporary]
            _share([part for part in parts if part.is_file()], temporary.with_name(f"{temporary.name}.mode"))
            if durable:
                for part in parts:
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


def obstacle(folder: Path) -> str | None:
    """Why nothing can be written into `folder`, which need not be there yet; None if something can.

    Permissions do not tell: a file system may be read-only, and root of another machine nobody.
    """
    nearest = folder
    try:
        nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except NotADirectoryError:
        return f"{nearest} is a file"
    except OSError as error:
        return f"{nearest} may not be written to ({reason(error)})"


def _share(files: list[Path], probe: Path) -> None:
    """Gives files the permissions that any new file gets in their folder, by umask or access list.

    Libraries that write through a temporary file of their own leave it private. To ask for the umask one has to change
    it, for all threads; so an empty file is made, and looked at.
    """
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in files:
        if stat.S_IMODE(file.stat().st_mode) != mode:
            with suppress(PermissionError):  # a file system without permissions
                file.chmod(mode)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def remove_remains(path: Path) -> None:
    """Clears what processes killed inside `replacing(path)` left: an old folder without a successor gets its name.

    Nobody else may be writing it.
    """
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    remains = re.compile(rf"\.{re.escape(path.name)}\.(old|(.+\.)?\d+(\.mode)?)")
    for beside in path.parent.iterdir():
        if remains.fullmatch(beside.name):
            _remove(beside)


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

    `hub`: it is as likely to be on the hub as a folder in one that exists.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # False also for what can be no path
        return None
    near = difflib.get_close_matches(path.name, _folders(path.parent), 1)
    outside = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    inside = path.parent.is_dir() and bool(near) + ("/" in name) + (not hub) > 1  # two things speak for a folder
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
