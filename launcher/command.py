"""`crossrank launch local|torchrun|slurm [options] -- train ...`: one run, started in three ways.

Nothing here imports torch, and the arguments of `train` are checked before anything starts or is queued.
"""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launcher.devices import num_present, num_visible
from launcher.sbatch import SlurmConfig, render, submit
from trainer.base.environment import heard
from trainer.base.errors import UserError, unknown
from trainer.base.fields import Fields, option
from trainer.cli import asks_for_help, grouped, make_parser, parse, parse_train
from trainer.config import Config
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
class LocalConfig(Fields):
    """Local"""

    nproc: int | None = option(None, above=0)
    """Processes; None = one for each GPU, or one on the CPU."""
    dry_run: bool = False
    """Print the command, and start nothing."""


@dataclass(frozen=True, kw_only=True)
class TorchrunConfig(LocalConfig):
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
    start(options, parse_train(arguments[1:]), arguments[1:])


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first `--`."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


def launch_local(options: LocalConfig, config: Config, arguments: list[str]) -> None:
    nproc = num_processes(options.nproc, num_visible(os.environ, num_present()))
    command = [sys.executable] if nproc == 1 else torchrun(TorchrunConfig(), nproc)
    run([*command, FRONT_DOOR, "train", *arguments], options.dry_run)


def launch_torchrun(options: TorchrunConfig, config: Config, arguments: list[str]) -> None:
    nproc = num_processes(options.nproc, num_visible(os.environ, num_present()))
    run([*torchrun(options, nproc), FRONT_DOOR, "train", *arguments], options.dry_run)


def launch_slurm(options: SlurmConfig, config: Config, arguments: list[str]) -> None:
    if options.job_name is None:
        options = replace(options, job_name=config.run_name or "crossrank")
    if options.venv is None and options.container is None and sys.prefix != sys.base_prefix:
        options = replace(options, venv=sys.prefix)
    script = render(options, arguments)
    if options.dry_run:
        print(script, end="")
        return
    job = submit(script, options)
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
        if TORCHRUN in command and "--nproc-per-node=1" not in command:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a banner
        if command[1:3] == ["-m", TORCHRUN]:  # the same torchrun, with an exit code and an end that are the ranks' own
            command[1:3] = [FRONT_DOOR, "agent"]
        os.execv(command[0], command)  # noqa: S606


WAYS: dict[str, tuple[type, Callable[[Any, Config, list[str]], None]]] = {
    "local": (LocalConfig, launch_local),
    "torchrun": (TorchrunConfig, launch_torchrun),
    "slurm": (SlurmConfig, launch_slurm),
}
