"""The run folder: who may write into it, and what lies there when a run begins."""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer.base.errors import UserError, reason
from trainer.base.fields import rule
from trainer.base.files import remove_remains, write_text
from trainer.base.yaml_files import dump
from trainer.config import Config, read_yaml
from trainer.ranks import World


@dataclass(frozen=True)
class RunFolder:
    """`resuming`: an unfinished run is there, which this one resumes."""

    path: Path
    resuming: bool


def open_run(config: Config, world: World) -> RunFolder:
    """The run's folder, the same on every rank. Raises UserError; see find_run."""
    found = find_run(config) if world.is_main else None
    path, resuming = world.broadcast([str(found.path), found.resuming] if found else None)
    return RunFolder(Path(path), resuming)


def find_run(config: Config) -> RunFolder:
    """The folder that `config` names, or a new one, still untouched.

    Raises UserError if a finished run is there, or another one, or where nothing can be written.
    """
    folder = Path(config.output_dir or f"runs/{config.run_name or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}")
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write the run folder {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write the run folder {folder}: {nearest} may not be written to")
    if not (folder / "config.yaml").exists():
        if (folder / "model").exists():
            raise UserError(f"{folder} holds a model, which is never overwritten; choose another --output_dir")
        return RunFolder(folder, resuming=False)
    if (folder / "results.json").exists():
        raise UserError(f"{folder} holds a finished run, which is never overwritten; choose another --output_dir")
    if config.resume_from_checkpoint == "none":
        raise UserError(f"{folder} holds an unfinished run; choose another --output_dir, or leave out "
                        "--resume_from_checkpoint none to resume it")  # fmt: skip
    if differing := differences(read_yaml(folder / "config.yaml"), config):
        raise UserError(f"{folder} holds an unfinished run of another config ({'; '.join(differing)}); use its config "
                        "to resume it, or choose another --output_dir")  # fmt: skip
    return RunFolder(folder, resuming=True)


def claim(folder: Path, config: Config) -> FileLock:
    """Creates the run folder, with its config. The lock that it returns dies with this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        write_text(folder / "config.yaml", dump(dataclasses.asdict(config)))
        remove_remains(folder)
        remove_remains(folder / "checkpoints")
    except Timeout:
        raise UserError(f"another run is writing {folder}; choose another --output_dir") from None
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {reason(error)}") from None
    return lock


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """The fields in which a run's saved config differs from `config`, so that it would be another run."""
    now = {own.name: getattr(config, own.name) for own in dataclasses.fields(config) if rule(own).kind == "run"}
    return [
        f"{name}: saved {saved[name]!r}, now {value!r}"
        for name, value in now.items()
        if name in saved and saved[name] != value
    ]
