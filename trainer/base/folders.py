"""Folders beside the run's that libraries write to, looked at at the start: at the end of a run it is too late.

Libraries read the variables that name them when they are imported, so this comes before, and imports none. A folder
that cannot be written, as in many a container, is replaced by a private one among the temporary files.
"""

import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainer.base.environment import read_place
from trainer.base.errors import UserError
from trainer.base.files import obstacle


def caches(env: Mapping[str, str]) -> dict[str, Path]:
    """The folder behind each variable, where it lies by default if that is not set."""
    cache = Path(env.get("XDG_CACHE_HOME") or "~/.cache")
    hub = Path(env.get("HF_HOME") or cache / "huggingface")
    default = {
        "HF_HUB_CACHE": Path(env.get("HUGGINGFACE_HUB_CACHE") or hub / "hub"),
        "HF_XET_CACHE": hub / "xet",
        "HF_DATASETS_CACHE": hub / "datasets",
        "HF_MODULES_CACHE": hub / "modules",
        "HF_EVALUATE_CACHE": hub / "evaluate",
        "HF_METRICS_CACHE": hub / "metrics",
        "CROSSRANK_CACHE": cache / "crossrank",
        "MPLCONFIGDIR": Path(env.get("XDG_CONFIG_HOME") or "~/.config") / "matplotlib",
        "TORCH_EXTENSIONS_DIR": cache / "torch_extensions",
        "TRITON_CACHE_DIR": Path(env.get("TRITON_HOME") or "~") / ".triton" / "cache",
    }
    return {name: Path(os.path.expanduser(env.get(name) or place)) for name, place in default.items()}


def unwritable(env: Mapping[str, str]) -> Iterator[tuple[str, Path, str]]:
    """(variable, folder, why) of each that cannot be written."""
    for name, folder in caches(env).items():
        why = f"there is no home folder for {folder}" if str(folder).startswith("~") else obstacle(folder)
        if why is not None:
            yield name, folder, why


def only_read(name: str, folder: Path) -> bool:
    """Whether it is of use as it is: models that were downloaded into a container's image lie there."""
    return name == "HF_HUB_CACHE" and folder.is_dir()


def provide() -> None:
    """Puts a folder that can be written behind every variable, and says so in one line, on rank 0. Raises UserError."""
    moved = [found for found in unwritable(os.environ) if not only_read(*found[:2])]
    temporary = temporary_folder()
    said = []
    if wanted := os.environ.get("TMPDIR"):
        os.environ["TMPDIR"] = str(temporary)
        if os.path.realpath(wanted) != os.path.realpath(temporary):
            said.append(f"TMPDIR={wanted} cannot be written: temporary files are in {temporary}")
    if moved:
        instead = private(temporary)
        for name, _, _ in moved:
            os.environ[name] = str(instead / name.lower())
        names = ", ".join(name for name, *_ in moved)
        said.append(f"{moved[0][2]}: {names} are in {instead}; set them to folders that you may write, to keep them")
    if said and read_place(os.environ).rank == 0:
        print(f"warning: {'; '.join(said)}", file=sys.stderr, flush=True)


def temporary_folder() -> Path:
    """Raises UserError where there is none."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise UserError("no folder for temporary files can be written; set TMPDIR to one") from None


def private(temporary: Path) -> Path:
    """Nobody else may write there: code is loaded from some caches. The next run finds the same one."""
    place = temporary / f"crossrank-{os.geteuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
            return place
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="crossrank-", dir=temporary))
