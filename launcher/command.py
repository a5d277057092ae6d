"""`crossrank launch local|torchrun|slurm [options] -- train ...`: one run, started in three ways.

Nothing here imports torch, and the arguments of `train` are checked before anything starts or is queued.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.devices import num_present, num_visible
from launcher.sbatch import SlurmConfig, max_runs, render, submit
from launcher.sweep import SweepConfig, folder_of, in_turn, tasks
from trainer.base.environment import heard
from trainer.base.errors import UserError, unknown
from trainer.base.fields import Fields, option
from trainer.base.record import record
from trainer.cli import asks_for_help, grouped, make_parser, parse, parse_train
from trainer.run.versions import ROOT

USAGE = """usage: crossrank launch HOW [options] -- train [--recipe NAME] [--field value ...]

  local      on this machine: one process, or one for each GPU
  torchrun   on this machine as one of several: the same command on each
  slurm      as a batch job

`crossrank launch HOW --help` shows the options. --dry_run shows what would be started.
"""
TORCHRUN = "torch.distributed.run"
# By its path: `python -m crossrank` would start a crossrank.py of the working folder.
FRONT_DOOR = str(ROOT / "crossrank.py")
# Slurm warns with USR1 or USR2; without a handler torchrun would die of them, and leave its ranks behind.
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True, kw_only=True)
class HereConfig(Fields):
    """On this machine"""

    nproc: int | None = option(None, above=0)
    """Processes; None = one for each GPU, or one on the CPU."""
    dry_run: bool = False
    """Print the command, and start nothing."""


@dataclass(frozen=True, kw_only=True)
class LocalConfig(HereConfig, SweepConfig):
    """Local"""


@dataclass(frozen=True, kw_only=True)
class TorchrunConfig(HereConfig):
    """Torchrun"""

    nnodes: int = option(1, above=0)
    """Machines that take part; the same command is to be started on each."""
    rdzv_endpoint: str | None = None
    """HOST:PORT where they meet; HOST is one of them."""
    rdzv_id: str = "crossrank"
    """Name of the meeting; another one for each run at the same place and time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise UserError(f"{self.nnodes} machines need --rdzv_endpoint HOST:PORT, where HOST is one of them")
        port = (self.rdzv_endpoint or "host:1").rpartition(":")[2]
        if not (port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"rdzv_endpoint {self.rdzv_endpoint!r} must be HOST:PORT, such as node1:29500")


def launch(argv: list[str]) -> None:
    """Raises UserError; with --wait, SystemExit with the job's exit code."""
    how, *rest = argv or ["--help"]
    if how in ("-h", "--help"):
        print(USAGE, end="")
        return
    if how not in WAYS:
        raise UserError(unknown("way to launch", how, WAYS))
    group, start = WAYS[how]
    own, arguments = split(rest)
    if not arguments and "train" in own:
        raise UserError(f"put -- before train: crossrank launch {how} [options] -- train ...")
    usage = f"crossrank launch {how} [options] -- train ..."
    parser = make_parser(f"crossrank launch {how}", (group,), asks_for_help(own), usage=usage)
    (options,) = grouped(parse(parser, own), group)
    if not arguments:
        raise UserError("nothing to launch: end the command with -- train and its options")
    if arguments[0] != "train":
        raise UserError(f"only `train` is launched, not {arguments[0]!r}")
    start(options, arguments[1:])


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first `--`."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


def launch_local(options: LocalConfig, arguments: list[str]) -> None:
    """Of a sweep, one run after the other."""
    runs = tasks(options, arguments)
    nproc = num_processes(options.nproc, num_visible(os.environ, num_present()))
    command = [sys.executable] if nproc == 1 else torchrun(TorchrunConfig(), nproc)
    command += [FRONT_DOOR, "train", *arguments]
    if not options.is_sweep:
        run(command, options.dry_run)
        return
    name = runs[0].config.run_name or "sweep"
    folder = Path(folder_of(arguments) or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    commands = {f"{folder}/{own.folder}": [*command, *own.options, "--output_dir"] for own in runs}
    if options.dry_run:
        print(*(shlex.join([*own, place]) for place, own in commands.items()), sep="\n")
        return
    record(folder, [own.folder for own in runs])
    sys.exit(in_turn({place: settled([*own, place]) for place, own in commands.items()}))


def launch_torchrun(options: TorchrunConfig, arguments: list[str]) -> None:
    parse_train(arguments)
    nproc = num_processes(options.nproc, num_visible(os.environ, num_present()))
    run([*torchrun(options, nproc), FRONT_DOOR, "train", *arguments], options.dry_run)


def launch_slurm(options: SlurmConfig, arguments: list[str]) -> None:
    runs = tasks(options, arguments, max_runs() if options.is_sweep else 1)
    name = options.job_name or runs[0].config.run_name or "crossrank"
    options = replace(options, job_name=name)
    if options.venv is None and options.container is None and sys.prefix != sys.base_prefix:
        options = replace(options, venv=sys.prefix)
    script = render(options, arguments, runs)
    if options.dry_run:
        print(script, end="")
        return
    job = submit(script, options)
    if options.is_sweep:
        record(Path(folder_of(arguments) or f"runs/{name}-{job}"), [own.folder for own in runs])
    if options.wait:
        from launcher.follow import follow

        sys.exit(follow(job))


def num_processes(nproc: int | None, num_gpus: int) -> int:
    if nproc is not None and 0 < num_gpus < nproc:
        raise UserError(f"nproc {nproc} is more than the {num_gpus} GPU(s) here; lower it, or set CUDA_VISIBLE_DEVICES="
                        " (nothing) to compute on the CPU")  # fmt: skip
    return nproc or max(1, num_gpus)


def torchrun(options: TorchrunConfig, nproc: int) -> list[str]:
    """torchrun's command up to the script."""
    meeting = ["--standalone"]
    if options.rdzv_endpoint is not None:
        meeting = [f"--nnodes={options.nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={options.rdzv_endpoint}",
                   f"--rdzv-id={options.rdzv_id}"]  # fmt: skip
    start = [sys.executable, "-m", TORCHRUN]
    return [*start, *meeting, f"--nproc-per-node={nproc}", f"--signals-to-handle={','.join(filter(heard, SIGNALS))}"]


def run(command: list[str], dry_run: bool) -> None:
    """Becomes `command`, so that signals and the exit code are its own."""
    print(shlex.join(command), file=sys.stdout if dry_run else sys.stderr, flush=True)
    if not dry_run:
        command = settled(command)
        os.execv(command[0], command)  # noqa: S606


def settled(command: list[str]) -> list[str]:
    """What really is started, with the environment that it needs."""
    if TORCHRUN in command and "--nproc-per-node=1" not in command:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a banner
    if command[1:3] == ["-m", TORCHRUN]:  # the same torchrun, with an exit code and an end that are the ranks' own
        return [command[0], FRONT_DOOR, "agent", *command[3:]]
    return command


WAYS: dict[str, tuple[type, Callable[[Any, list[str]], None]]] = {
    "local": (LocalConfig, launch_local),
    "torchrun": (TorchrunConfig, launch_torchrun),
    "slurm": (SlurmConfig, launch_slurm),
}
