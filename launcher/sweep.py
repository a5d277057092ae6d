"""Many runs of one command: every point of a grid of fields, with every seed.

Each is a run by itself, in a folder of its own whose name says its values: learning_rate-1e-5,bf16-true/seed-0. All are
checked before the first one starts or is queued.
"""

import dataclasses
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.environment import heard
from trainer.base.errors import UserError, unknown
from trainer.base.fields import Fields, checked, items, kinds, option, rule
from trainer.base.record import recorded
from trainer.cli import parse, parse_train, train_parser
from trainer.config import Config, differences, read_run_config

MAX_RUNS = 1001  # of one sweep: what an array of Slurm holds by itself
SEEDS = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Fields):
    """Sweep"""

    seeds: str | None = None
    """A run for each of these seeds, such as 0-4 or 1,7,42; under Slurm 0-4%2 for two at a time."""
    grid: list[str] | None = option(None, repeats=True)
    """A run for each value of a field: `--grid learning_rate=1e-5,5e-5`. Several: each combination, with each seed.
    Values that hold commas: as JSON, `'lora_target_modules=["query","query,value"]'`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds is None:
            return
        if not SEEDS.fullmatch(self.seeds):
            raise UserError(f"seeds {self.seeds!r} must look like 0-4 or 1,7,42, with %N for at most N at a time")
        if not all(self.ranges()):
            raise UserError(f"seeds {self.seeds} holds a range that ends before it begins, or goes by steps of 0")

    @property
    def is_sweep(self) -> bool:
        return self.seeds is not None or self.grid is not None

    @property
    def at_a_time(self) -> str:
        """As Slurm writes it; nothing where all may run."""
        _, sign, number = (self.seeds or "").partition("%")
        return sign + number

    def ranges(self) -> list[range]:
        """Of the seeds; not yet the seeds, which may be billions."""
        found = re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", (self.seeds or "").partition("%")[0])
        whole = [(int(first), int(last or first), int(step or 1)) for first, last, step in found]
        return [range(first, last + 1, step) if step else range(0) for first, last, step in whole]


@dataclass(frozen=True)
class Task:
    """One run: its folder in the sweep's, the options that are its own, and all that it then is."""

    folder: str
    options: tuple[str, ...]
    config: Config


def tasks(options: SweepConfig, arguments: list[str], most: int = MAX_RUNS) -> list[Task]:
    """The runs of `train ARGUMENTS`, all of them checked: the seeds of a point are neighbours. One that is no sweep has
    one run, without a folder or options of its own. Raises UserError naming the combination."""
    if not options.is_sweep:
        return [Task("", (), parse_train(arguments))]
    given = parse(train_parser(explained=False), arguments)
    folder = folder_of(arguments)
    if folder is not None and (Path(folder) / "about.json").exists():
        raise UserError(f"{folder} is a run's folder; the sweep needs one of its own: choose another --output_dir")
    axes = [axis(text, given) for text in options.grid or ()]
    names = [name for name, _ in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is in the grid twice; give it once, with all its values")
    if options.seeds is not None:
        if "seed" in given:
            raise UserError("the sweep has seeds of its own; leave out --seed")
        axes.append(("seed", [str(seed) for seed in itertools.islice(itertools.chain(*options.ranges()), most + 1)]))
        _check_values(*axes[-1])
    number = len(list(itertools.islice(itertools.product(*(values for _, values in axes)), most + 1)))
    if number > most:
        raise UserError(f"the sweep has more than {most} runs, which is what one array of jobs can hold (Slurm's "
                        "MaxArraySize); give fewer values or seeds, or submit it in parts")  # fmt: skip
    runs = list(_checked(axes, arguments))
    if folder is not None:
        recorded(Path(folder))  # a damaged list is found here, before anything is queued
        for run in runs:
            check_run(Path(folder) / run.folder, run.config)
    return runs


def is_finished(folder: Path | str) -> bool:
    return (Path(folder) / "results.json").exists()


def check_run(folder: Path, config: Config) -> None:
    """Raises UserError where `folder` holds a run, finished or not, that is not the one of `config`.

    One that is resumed asks what is in its data, not how they are called; a finished one asks nothing any more, so
    their names must be the same, too.
    """
    finished = is_finished(folder)
    if absent := [name for name in ("about.json", "config.yaml") if not (folder / name).is_file()]:
        if finished:
            raise UserError(f"{folder} holds results.json, but no {absent[0]}, and so no finished run; move it, or "
                            "choose another --output_dir")  # fmt: skip
        return  # whatever it is, the run itself will see
    saved = read_run_config(folder / "config.yaml")
    if differing := differences(saved, config, ("run", "source") if finished else ("run",)):
        raise UserError(f"{folder} holds {'a finished' if finished else 'an unfinished'} run of another config "
                        f"({'; '.join(differing)}); use its config, or choose another --output_dir")  # fmt: skip


def _checked(axes: list[tuple[str, list[str]]], arguments: list[str]) -> Iterator[Task]:
    """Each combination, the last axis fastest."""
    slugs = {name: _slugs(values) for name, values in axes}
    try:
        for values in itertools.product(*(values for _, values in axes)):
            own = dict(zip(slugs, values, strict=True))
            options = tuple(f"--{name}={value}" for name, value in own.items())
            try:
                config = parse_train([*arguments, *options])
            except UserError as error:
                raise UserError(f"of the sweep, {' '.join(options)}: {error}") from None
            logging.disable(logging.INFO)  # what the config leaves out is said once
            parts = [f"{name}-{slugs[name][value]}" for name, value in own.items()]
            seed = [parts.pop()] if "seed" in own else []
            folder = "/".join(filter(None, [",".join(parts), *seed]))
            if len(folder) > 240:
                raise UserError(f"{folder} is too long for a folder's name; give fewer fields, or shorter values")
            yield Task(folder, options, config)
    finally:
        logging.disable(logging.NOTSET)


# Fields that a sweep has in another way.
OTHERWISE = {
    "seed": "seeds have an option of their own: --seeds 0-4",
    "output_dir": "each run has its own folder in --output_dir, named by its values",
    "run_name": "the runs' folders are named by their values; --job_name names the job",
    "resume_from_checkpoint": "each run resumes by itself from its own folder",
}


def axis(text: str, given: dict[str, Any]) -> tuple[str, list[str]]:
    """A field of the grid and its values, as text. `given`: what the arguments have. Raises UserError."""
    name, equals, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name:
        raise UserError(f"grid {text!r} must look like learning_rate=1e-5,5e-5; of several fields each has a --grid")
    if name not in kinds(Config):
        raise UserError(unknown("field of the grid", name, kinds(Config)))
    if name in OTHERWISE:
        raise UserError(f"{name} cannot be in the grid: {OTHERWISE[name]}")
    (own,) = (rule(field) for field in dataclasses.fields(Config) if field.name == name)
    if own.kind in ("local", "upkeep"):
        raise UserError(f"{name} cannot be in the grid: runs that differ only in it learn the same")
    if name in given:
        raise UserError(f"{name} is in the grid and among the arguments of train; leave it out of one of them")
    values = [value if isinstance(value, str) else json.dumps(value) for value in items(rest.strip(), own.path)]
    if further := [value for value in values if re.search(r"[\s;]\w+=", value)]:
        raise UserError(f"grid {name} has the value {further[0]!r}; of several fields each has a --grid of its own")
    _check_values(name, values)
    return name, values


def _check_values(name: str, values: list[str]) -> None:
    """Raises UserError for a value of the wrong type, and for one that comes twice, also in other words."""
    seen: dict[str, str] = {}
    for value in values:
        meant = repr(checked({name: value}, Config)[name])
        if meant in seen:
            again = f"{value}" if seen[meant] == value else f"{seen[meant]} and {value}, which are the same"
            raise UserError(f"{name} has the value {again}, twice in the sweep; give it once")
        seen[meant] = value


def _slugs(values: list[str]) -> dict[str, str]:
    """Each value in characters that are safe in a folder's name; their ends, since paths differ there."""
    slugs: dict[str, str] = {}
    for value in values:
        plain = re.sub(r"[^A-Za-z0-9.+_-]+", "-", value)[-60:].strip("-.") or "value"
        slug, number = plain, 1
        while slug in slugs.values():
            number += 1
            slug = f"{plain}-{number}"
        slugs[value] = slug
    return slugs


def folder_of(arguments: list[str]) -> str | None:
    """The sweep's, where the arguments of train name it."""
    folder = parse(train_parser(explained=False), arguments).get("output_dir")
    return folder and os.path.expanduser(folder)


def in_turn(commands: dict[str, list[str]]) -> int:
    """Runs each command, by the folder of its run, after the one before; returns an exit code.

    A run that is finished is left as it is, and one that fails does not keep the others from theirs. A request to stop
    is handed on, and no run follows the one that it has stopped; the code is that run's own, or the signal's where the
    run has ended well, but others are left.
    """
    asked: list[int] = []
    told = 0  # so many of them, since one may come while the process starts
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int = 0, frame: object = None) -> None:
        nonlocal told
        if number:
            asked.append(number)
        while process is not None and told < len(asked):
            told += 1
            process.send_signal(asked[told - 1])

    for name in filter(heard, ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")):
        signal.signal(getattr(signal, name), hand_on)
    failed = {}
    for place, (folder, command) in enumerate(commands.items(), 1):
        if is_finished(folder):
            print(f"run {place} of {len(commands)} is finished: {folder}", file=sys.stderr, flush=True)
            continue
        if asked:
            return 128 + asked[0]
        print(f"run {place} of {len(commands)}: {folder}", file=sys.stderr, flush=True)
        # In a session of its own: a terminal's Ctrl-C would come twice, and twice means at once.
        process = subprocess.Popen(command, start_new_session=True)
        hand_on()
        code = process.wait()
        process = None  # what is asked from now on is for the next one
        if asked and code:
            return code if code > 0 else 128 - code
        if code:
            failed[folder] = code
    for folder, code in failed.items():
        print(f"crossrank: {folder} ended with exit code {code}", file=sys.stderr)
    return 1 if failed else 0
