"""What the environment says, without torch: which rank this is, whether to use the network, which hosts there are;
and what this program tells its libraries there."""

import os
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.base.errors import UserError

STARTED_BY = "start ranks with torchrun or srun"


@dataclass(frozen=True)
class Place:
    """This process among those that its launcher has started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = ""  # "torchrun" (or what sets its variables), "srun", or "" for a single process


def read_place(env: Mapping[str, str]) -> Place:
    """From torchrun's variables, else from those of an srun step.

    Raises UserError where half of them are set, or where they are no numbers of ranks.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        names, launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "torchrun"
    elif "RANK" in env or number(env, "WORLD_SIZE", "1") > 1:
        given, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise UserError(f"{given} is set without {missing}; {STARTED_BY}, or unset {given}")
    elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun only: a plain command inside a batch script is one process
        names, launcher = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), "srun"
    else:
        return Place()
    rank, size, local_rank = (number(env, name, "0") for name in names)
    if rank >= size:
        raise UserError(f"{names[0]} is {rank}, but {names[1]} is {size}: ranks are counted from 0; {STARTED_BY}")
    return Place(rank, size, local_rank, launcher)


def number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    """Raises UserError."""
    value = env.get(name, default)
    if value is None or not re.fullmatch(r"\s*[0-9]{1,12}\s*", value):
        found = "not set" if value is None else "empty" if not value.strip() else f"{value!r}, which is no number"
        raise UserError(f"{name} is {found}; {STARTED_BY}, or unset {name}")
    return int(value)


def heard(name: str) -> bool:
    """Whether a signal is to be taken: nohup has SIGHUP ignored, and what is started so outlives its terminal."""
    return name != "SIGHUP" or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def offline() -> bool:
    """Whether the user has forbidden the network, by HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def check_host(name: str) -> None:
    """Raises UserError for a name without an address, for which ranks would wait for minutes."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        raise UserError(f"the host {name} has no address here; fix the nodes' names (/etc/hosts, DNS)") from None


def set_libraries() -> None:
    """What they read from the environment when they are loaded, unless the user has said otherwise: before torch is."""
    # OpenMP's threads wait for each other in a loop: by default so long that one busy neighbour halves the speed of a
    # run on a CPU, and three leave a third of it. libgomp reads this when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # On a CPU oneDNN, and the layer between it and torch, each keep 1,024 kernels with their memory, one for each shape
    # they meet: unpadded steps are of ever new shapes. A step needs a few dozen. See docs/lab-book.md.
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # the older name
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
