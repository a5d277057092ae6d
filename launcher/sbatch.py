"""A batch script from the ones in `slurm/`, with the user's choices written into it, and its submission.

Those scripts work by themselves, and they are the templates: their #SBATCH lines are replaced or added to, the part
that they share takes the place of its `source` line, and the user's values are set in front of it; how to submit them
by hand is left out. So what --dry_run prints is complete. Every value is either quoted for the shell or, in an #SBATCH
line, refused where it could be anything but a value.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.sweep import MAX_RUNS, SweepConfig, Task
from trainer.base.errors import UserError
from trainer.base.fields import option

SCRIPTS = Path(__file__).parent.parent / "slurm"
TIMES = (
    re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+))?"),
    re.compile(r"(?P<minutes>\d+)(?::(?P<seconds>\d+))?"),
)
UNITS = {"days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(SweepConfig):
    """Slurm"""

    nodes: int = option(1, above=0)
    """Nodes of the job."""
    gpus_per_node: int | None = option(None, above=0)
    """GPUs of each node; None = no GPUs: compute on the CPU."""
    nproc: int | None = option(None, above=0)
    """Ranks on each node; None = one for each GPU, or one."""
    ranks_by: Literal["torchrun", "srun"] = "torchrun"
    """What starts the ranks: one torchrun on each node (slurm/train.sbatch), or one task of Slurm for each rank
    (slurm/train_srun.sbatch)."""
    time: str = "24:00:00"
    """Time limit as Slurm writes it: minutes, hours:minutes:seconds, days-hours; a job that reaches it is queued
    again, and resumes."""
    warning_seconds: int = option(120, above=0, below=65536)
    """How long before the time limit the ranks are told to save."""
    warning_signal: Literal["USR1", "USR2"] = "USR1"
    """With which signal; another one where NCCL or a tool uses it."""
    cpus_per_task: int | None = option(None, above=0)
    """CPU cores of each task; None = one for each rank."""
    partition: str | None = None
    """Slurm's partition."""
    account: str | None = None
    """Slurm's account."""
    qos: str | None = None
    """Slurm's quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    sbatch: list[str] | None = None
    """More options of sbatch without their dashes, as mem=64G,exclusive."""
    job_name: str | None = None
    """Job's name; None = run_name, which is the recipe's name by itself."""
    log_dir: str = option("logs", path=True)
    """Folder of the job's log, made where it is missing."""
    venv: str | None = option(None, path=True)
    """Virtual environment to use; None = the one that crossrank runs in."""
    container: str | None = None
    """Image in which apptainer runs the ranks; then no virtual environment is used."""
    wait: bool = False
    """Follow the job and its log, and end with its exit code."""
    dry_run: bool = False
    """Print the script, and submit nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus_per_node is not None and self.num_ranks > self.gpus_per_node:
            raise UserError(
                f"nproc {self.nproc} is more than gpus_per_node {self.gpus_per_node}; each rank needs a GPU"
            )
        limit = seconds(self.time)
        if limit is not None and limit <= self.warning_seconds:
            raise UserError(f"the time limit {self.time} is {limit} s, and the warning comes "
                            f"{self.warning_seconds} s before; raise --time, or lower --warning_seconds")  # fmt: skip
        if self.job_name is not None and not re.fullmatch(r"[\w.+=:@%-]+", self.job_name):
            raise UserError(f"job_name {self.job_name!r} may hold only letters, digits and ._+=:@%-")
        if self.is_sweep and (self.nodes > 1 or self.num_ranks > 1) and self.ranks_by == "torchrun":
            raise UserError("the runs of an array are started by srun; add --ranks_by srun for more than one rank")
        if self.venv is not None and self.container is not None:
            raise UserError("venv and container exclude each other; give one of them")
        if self.venv is not None and not (Path(self.venv) / "bin" / "activate").exists():
            raise UserError(f"venv {self.venv} is not a virtual environment: it has no bin/activate")

    @property
    def num_ranks(self) -> int:
        """Of a node."""
        return self.nproc or self.gpus_per_node or 1


def seconds(time: str) -> int | None:
    """A time limit of Slurm in seconds; None where there is none."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    for pattern in TIMES:
        if match := pattern.fullmatch(time):
            return sum(int(number or 0) * UNITS[unit] for unit, number in match.groupdict().items())
    raise UserError(f"time {time!r} must look like 90 (minutes), 12:00:00 or 2-12")


def directives(config: SlurmConfig, num_runs: int) -> dict[str, object]:
    """The #SBATCH options that `config` stands for; None = as in the script."""
    by_torchrun = config.ranks_by == "torchrun" and not config.is_sweep
    own = {
        "job-name": config.job_name,
        "array": f"0-{num_runs - 1}{config.at_a_time}" if config.grid else config.seeds,
        "nodes": config.nodes,
        "gpus-per-node": config.gpus_per_node,
        "ntasks-per-node": 1 if by_torchrun else config.num_ranks,
        "cpus-per-task": config.cpus_per_task or (config.num_ranks if by_torchrun else None),
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "output": f"{config.log_dir}/%x-{'%A_%a' if config.is_sweep else '%j'}.out",
        "signal": f"B:{config.warning_signal}@{config.warning_seconds}",
    }
    for given in config.sbatch or []:
        name, _, value = given.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise UserError(f"sbatch option {given!r} must look like mem=64G or exclusive, without dashes")
        own[name] = value
    return {name: value for name, value in own.items() if value is not None}


def directive(name: str, value: object) -> str:
    """One #SBATCH line. Raises UserError where `value` could end the line, its quotes, or begin a comment."""
    text = str(value)
    if not text.isprintable() or set(text) & set("\"'\\`$;#"):
        raise UserError(f"{name} {text!r} holds a character that has no place in an #SBATCH line")
    text = f'"{text}"' if " " in text else text
    return f"#SBATCH --{name}={text}" if text else f"#SBATCH --{name}"


def render(config: SlurmConfig, arguments: list[str], runs: Sequence[Task] = ()) -> str:
    """The batch script for `crossrank train ARGUMENTS`; a function of these and of the files in slurm/ only.

    `runs` are those of a grid. Without one the array's index is the seed.
    """
    name = "train" if config.ranks_by == "torchrun" else "train_srun"
    if config.is_sweep:
        name = "sweep" if config.grid else "seeds"
    head, _, body = (SCRIPTS / f"{name}.sbatch").read_text(encoding="utf-8").partition("set -euo pipefail\n")
    comments, options = [], {}
    for line in head.splitlines():
        if match := re.fullmatch(r"#SBATCH --([\w-]+)(?:=(.*))?", line):
            options[match[1]] = match[2] or ""
        else:
            comments.append(line)
    options |= directives(config, len(runs))
    _, _, library = (SCRIPTS / "job.sh").read_text(encoding="utf-8").partition("\n")
    _, _, rest = body.partition('job.sh"\n')
    if config.grid:
        before, start, after = rest.partition(" in\n")
        rest = before + start + table(runs) + after[after.index("*) fail") :]
    return "\n".join(
        [*comments[: comments.index("#")], *(directive(*option) for option in options.items()), "set -euo pipefail", "",
         *settings(config), shlex.join(["set", "--", *arguments]), "", library + rest]
    )  # fmt: skip


def table(runs: Sequence[Task]) -> str:
    """An arm of the script's `case` for each run: its folder and its options."""
    return "".join(f"{number}) own=({shlex.join([run.folder, *run.options])}) ;;\n" for number, run in enumerate(runs))


def settings(config: SlurmConfig) -> list[str]:
    """The shell's variables of slurm/job.sh, where they are not to be as by themselves."""
    values = {
        "VENV": config.venv and str(Path(config.venv).absolute()),
        "CONTAINER": config.container,
        "NPROC": config.nproc,
    }
    return [f"CROSSRANK_{name}={shlex.quote(str(value))}" for name, value in values.items() if value is not None]


def max_runs() -> int:
    """Of one array, as Slurm is set up here."""
    with suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=20).stdout
        if found := re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE):
            return int(found[1])
    return MAX_RUNS


def submit(script: str, config: SlurmConfig) -> str:
    """Queues the script. Returns the job's id."""
    logs = Path(config.log_dir)
    is_new = not logs.exists()
    logs.mkdir(parents=True, exist_ok=True)  # before the job begins: Slurm makes none
    try:
        job = _queue(script)
    except UserError:
        if is_new:
            logs.rmdir()
        raise
    print(f"submitted job {job}, log in {config.log_dir}/", file=sys.stderr, flush=True)
    return job


def _queue(script: str) -> str:
    try:
        result = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    except FileNotFoundError:
        print(script, end="", flush=True)
        raise UserError("sbatch is not installed here: nothing was submitted. The script is above; hand it to sbatch "
                        "on a login node of the cluster, in this folder") from None  # fmt: skip
    if result.returncode != 0:
        raise UserError(f"Slurm refused the job: {result.stderr.strip()}")
    return result.stdout.strip().partition(";")[0]
