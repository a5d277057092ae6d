"""The run folder: who may write into it, and what lies there when a run begins."""

import dataclasses
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.base.errors import UserError, named, reason
from trainer.base.files import json_object, obstacle, remove_remains, write_text
from trainer.base.yaml_files import dump, read_mapping
from trainer.config import Config, differences, read_run_config
from trainer.ranks import World

WRITTEN = ("about.json", "adapter", "checkpoints", "config.yaml", "emissions.csv", "metrics.jsonl", "model",
           "predictions", "report.html", "results.json", "tensorboard", "wandb")  # fmt: skip


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
    given = config.resume_from_checkpoint
    if given not in ("auto", "none") and not os.path.isdir(os.path.expanduser(given)):
        raise UserError(f"resume_from_checkpoint {given!r} is no folder here; it is auto, none, or a checkpoint's or a "
                        "run's folder")  # fmt: skip
    folder = Path(config.output_dir or f"runs/{config.run_name or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}")
    if why := obstacle(folder):
        raise UserError(f"cannot write the run folder {folder}: {why}")
    if config.output_dir is None:
        return RunFolder(folder, resuming=False)
    if not holds_run(folder):
        if stranger := next((name for name in WRITTEN if os.path.lexists(folder / name)), None):
            raise UserError(f"{folder} holds {stranger}, which is of no run of crossrank that lies there, and is never "
                            "overwritten; move it, or choose another --output_dir")  # fmt: skip
        return RunFolder(folder, resuming=False)
    if (folder / "results.json").exists():
        raise UserError(f"{folder} holds a finished run, which is never overwritten; choose another --output_dir")
    if config.resume_from_checkpoint == "none":
        raise UserError(f"{folder} holds an unfinished run; choose another --output_dir, or leave out "
                        "--resume_from_checkpoint none to resume it")  # fmt: skip
    if differing := differences(read_run_config(folder / "config.yaml"), config):
        raise UserError(f"{folder} holds an unfinished run of another config ({'; '.join(differing)}); use its config "
                        "to resume it, or choose another --output_dir")  # fmt: skip
    return RunFolder(folder, resuming=True)


def holds_run(folder: Path) -> bool:
    """Whether config.yaml is a run's own: about.json is beside it, or it has what only write_config writes.

    A user's own config file may have the same name. It names some fields, or has comments, or another order.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return False
    try:
        about = json_object((folder / "about.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        about = {}
    if about.keys() >= {"padding", "hardware", "global_batch_size"}:
        return True
    values = read_mapping(path)
    every = len(values) > len(dataclasses.fields(Config)) / 2  # an older version had fewer
    return every and path.read_text(encoding="utf-8") == dump(values)


def claim(opened: RunFolder, config: Config, world: World) -> tuple[RunFolder, FileLock | None]:
    """Creates the run folder and takes its lock, on rank 0; the lock dies with its process.

    A folder that the run names itself is a new one. Every rank takes part.
    """
    lock = None
    if world.is_main:
        path = opened.path if config.output_dir else new_folder(opened.path)
        opened, lock = RunFolder(path, opened.resuming), _take(path)
    return RunFolder(Path(world.broadcast(str(opened.path))), opened.resuming), lock


def new_folder(path: Path) -> Path:
    """Creates `path`; where another run was faster, which began in the same second, PATH-2 and so on."""
    for number in itertools.count(1):
        mine = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            mine.mkdir(parents=True)
            return mine
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot write the run folder {mine}: {reason(error)}") from None
    raise AssertionError


def _take(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        for name in WRITTEN:
            remove_remains(folder / name)
    except Timeout:
        raise UserError(f"another run is writing {folder}; choose another --output_dir") from None
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {named(error)}") from None
    return lock


def write_config(folder: Path, config: Config) -> None:
    """Once it is certain that the run goes on: from now on an unfinished one is there."""
    write_text(folder / "config.yaml", dump(dataclasses.asdict(config)))
