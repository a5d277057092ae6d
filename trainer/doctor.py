"""Is this machine ready? Each part of the environment with its value, and with the fix where something is wrong.

With --ranks N, `crossrank meet` is started by torchrun: one real collective.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.base.environment import offline
from trainer.base.errors import UserError
from trainer.base.fields import Fields, option
from trainer.base.files import obstacle
from trainer.base.folders import caches, only_read, temporary_folder, unwritable
from trainer.run.versions import ROOT

NEEDED = ("transformers", "tokenizers", "datasets", "evaluate", "safetensors", "pyarrow")
OPTIONAL = {"deepspeed": 'pip install "crossrank[deepspeed]" for --backend deepspeed', "codecarbon": ""}
LITTLE_SPACE = 5 * 2**30  # bytes; a few checkpoints of a base model with its optimizer


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Fields):
    """Doctor"""

    json: bool = False
    """Print one JSON object a check."""
    ranks: int = option(1, above=0)
    """Start this many processes, and run one real collective."""
    output_dir: str = option("runs", path=True)
    """Where runs are to be written."""


@dataclass(frozen=True)
class Check:
    """`ok` None: nothing is wrong, but something is not there. `fix` says what to do where ok is not True."""

    name: str
    value: str
    ok: bool | None = True
    fix: str = ""


def diagnose(config: DoctorConfig) -> bool:
    """Prints every check. Returns whether all that is needed is there."""
    fine = True
    for check in _checks(config):
        fine &= check.ok is not False
        if config.json:
            print(json.dumps(dataclasses.asdict(check)), flush=True)
        else:
            mark = {True: "ok", False: "WRONG", None: "-"}[check.ok]
            print(f"{mark:>5}  {check.name}: {check.value}" + (f"  ({check.fix})" if check.fix else ""), flush=True)
    return fine


def _checks(config: DoctorConfig) -> Iterator[Check]:
    new_enough = sys.version_info >= (3, 10)
    yield Check("Python", platform.python_version(), new_enough, "" if new_enough else "install Python 3.10 or later")
    yield from _torch()
    for package in NEEDED:
        yield _package(package, False, f"pip install {package}")
    for package, fix in OPTIONAL.items():
        yield _package(package, None, fix)
    yield from _deepspeed_ops()
    yield _disk(Path(config.output_dir))
    yield from _caches()
    yield _slurm()
    yield Check("hub", "offline (HF_HUB_OFFLINE is set)" if offline() else "online", None if offline() else True)
    if config.ranks > 1:
        yield _meeting(config.ranks)


def _torch() -> Iterator[Check]:
    import torch

    from trainer.model.precision import has_bf16

    yield Check("torch", torch.__version__)
    if not torch.cuda.is_available():
        fix = "install a CUDA build of torch, and check nvidia-smi" if shutil.which("nvidia-smi") else ""
        yield Check("GPU", "none", False if fix else None, fix)
        fast = has_bf16(torch.device("cpu"))
        yield Check("bf16", "by the CPU" if fast else "computed in fp32", None if not fast else True)
        return
    yield Check("CUDA", str(torch.version.cuda))
    yield Check("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        yield Check(f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    fast = has_bf16(torch.device("cuda"))
    yield Check("bf16", "by the GPU" if fast else "no", fast, "" if fast else "use --bf16 false")


def _package(name: str, absent: bool | None, fix: str) -> Check:
    try:
        return Check(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "not installed", absent, fix)


def _deepspeed_ops() -> Iterator[Check]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if shutil.which("nvidia-smi") is None else "cuda")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where it talks, there may be a reader of JSON
            from deepspeed.ops.op_builder.all_ops import ALL_OPS
    except ImportError:
        return
    compiler = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    for name in ("cpu_adam", "fused_adam"):
        builder = ALL_OPS.get(name)
        if builder is None:
            continue
        buildable = not compiler and bool(builder.is_compatible(verbose=False))
        fix = f"install {' and '.join(compiler)}" if compiler else "" if buildable else "see ds_report"
        yield Check(f"DeepSpeed's {name}", "buildable" if buildable else "not buildable", buildable or None, fix)


def _disk(folder: Path) -> Check:
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    why = obstacle(folder)
    fix = f"{why}; choose an --output_dir that you may write" if why else ""
    if why is None and free < LITTLE_SPACE:
        fix = "make space, or choose another --output_dir"
    return Check(f"disk at {folder}", f"{free / 2**30:.0f} GiB free", not fix, fix)


def _caches() -> Iterator[Check]:
    """A run does without those that can't be written, and downloads, compiles and tokenises anew each time."""
    wrong = {name: (folder, why) for name, folder, why in unwritable(os.environ)}
    for name, folder in caches(os.environ).items():
        if name not in wrong:
            continue
        readable = only_read(name, folder)
        value = f"{folder} can only be read" if readable else f"{folder} cannot be written: {wrong[name][1]}"
        yield Check(name, value, None if readable else False, f"set {name} to a folder that you may write")
    if not wrong:
        yield Check("caches", "can be written")
    try:
        yield Check("temporary files", str(temporary_folder()))
    except UserError as error:
        yield Check("temporary files", "none", False, str(error))


def _slurm() -> Check:
    if shutil.which("sbatch") is None:
        return Check("Slurm", "not here", None)
    try:
        version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return Check("Slurm", "sbatch does not answer", False, "look at SLURM_CONF and at slurmctld")
    if version.returncode != 0:  # only the programs; a cluster is reached from its login node
        return Check("Slurm", "sbatch is here, but knows of no cluster", None)
    return Check("Slurm", version.stdout.strip())


def _meeting(ranks: int) -> Check:
    front_door = str(ROOT / "crossrank.py")  # by its path, so that nothing of the working folder is imported
    command = [sys.executable, front_door, "agent", "--standalone", f"--nproc-per-node={ranks}", front_door, "meet"]
    result = subprocess.run(command, capture_output=True, text=True)
    said = result.stdout.strip().splitlines()
    if result.returncode == 0 and said:
        return Check(f"{ranks} ranks", said[-1])
    lines = result.stderr.splitlines()
    reason = next((line for line in lines if "Error" in line or line.startswith("crossrank:")), "no answer")
    return Check(f"{ranks} ranks", reason.strip(), False, "check MASTER_ADDR, the network interface and the firewall")


def meet(argv: list[str]) -> int:
    """One collective on the device and one on the CPU, whose results are checked."""
    import torch

    from trainer import ranks

    world = ranks.start(120)
    total = float(world.sum(torch.tensor([float(world.rank)], device=world.device)))
    if total != world.size * (world.size - 1) / 2 or world.broadcast("hello") != "hello":
        raise UserError(f"rank {world.rank} received wrong numbers")
    if world.is_main:
        print(f"met on {world.device.type}, and their sum is right")
    ranks.stop()
    return 0
