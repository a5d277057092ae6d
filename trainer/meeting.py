"""Where ranks meet: the address, the store, and the connections between all of them.

Control data travels over gloo, gradients over the device's own library; a process group therefore carries both.
"""

import atexit
import ctypes
import os
import resource
import subprocess
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from trainer.base.environment import number
from trainer.base.errors import TrainingFailed, UserError, first_line

SPARE = 64  # open files beside those that connect ranks: data, checkpoints, libraries


def meet(rank: int, size: int, device: torch.device, patience: timedelta) -> None:
    """Makes the process group. Raises TrainingFailed where the ranks do not find each other, and see `allow_files`.

    A thread waits for the others, since a wait inside torch lets no handler of a signal run; this one hears signals.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    allow_files(rank, size)

    def work() -> None:
        try:
            store = _store(address, port, rank, size, patience)
            dist.init_process_group(wiring(device), timeout=patience, store=store, rank=rank, world_size=size)
            if device.type == "cuda":
                outlast_gloo(device, patience)
        except Exception as error:  # torch's, and the operating system's
            failures.append(error)

    failures: list[Exception] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if not failures:
        return
    said = first_line(failures[0])
    if "EADDRINUSE" in str(failures[0]) or "ddress already in use" in str(failures[0]):
        raise TrainingFailed(f"cannot listen on {address}:{port}: another program does; set another MASTER_PORT")
    raise TrainingFailed(
        f"the {size} ranks did not meet at {address}:{port} ({said}); check that all were started, that MASTER_ADDR is "
        "rank 0's host, and that no other program listens there"
    ) from failures[0]


_left: list[Any] = []
atexit.register(_left.clear)  # while Python still gives its lock to threads


def leave() -> None:
    """Ends the process group.

    It outlives that until the next one ends, or the program: DistributedDataParallel holds it too, and as the last to
    let go of it would wait, with Python's lock, for a thread of gloo's that waits for that lock. As Python's object it
    is let go of without the lock.
    """
    _left[:] = [dist.group.WORLD]
    dist.destroy_process_group()


def more_connections(rank: int, size: int, patience: timedelta) -> Any:
    """A group of all ranks with connections of its own, over gloo: for a thread that talks beside the main one.

    Every rank takes part. Raises UserError, see `allow_files`.
    """
    allow_files(rank, size, met=True)
    return dist.new_group(backend="gloo", timeout=patience)


def allow_files(rank: int, size: int, met: bool = False) -> None:
    """Lets this process open what it takes to connect `size` ranks, which have `met` already, or have not.

    Raises UserError where it may not.

    gloo connects all pairs of ranks: it has an option to connect only those that talk (TORCH_GLOO_LAZY_INIT), but there
    ranks may wait for ever for one that has died. Whoever has the store is connected to all once more: rank 0, or the
    torchrun beside it, whose limit is the one that it has handed down.
    """
    store = rank == 0 and not met
    mine = store and not _torchrun_has_store()
    needed = (size - 1) + (size if mine else 0) + len(os.listdir("/dev/fd")) + SPARE
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in limits)
    who = "rank 0" if rank == 0 else "a rank"
    if store and _torchrun_has_store() and soft < size + SPARE:
        who, needed, hard = "torchrun", size + SPARE, soft
    if hard < needed:
        raise UserError(
            f"among {size:,} ranks {who} needs {needed:,} open files, and {hard:,} are allowed; say ulimit -n {needed} "
            "before the start, or where that is refused raise the limit on every node: nofile in "
            "/etc/security/limits.conf, LimitNOFILE= of slurmd's service, --ulimit nofile of a container"
        )
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, needed + 1024), limits[1]))


def outlast_gloo(device: torch.device, patience: timedelta) -> None:
    """Gives NCCL, of `device`, a minute more than the `patience` of gloo.

    Its watchdog ends the process; gloo raises an error, and whoever catches it says which rank did not come.
    """
    longer = patience + timedelta(minutes=1)
    group = dist.distributed_c10d._get_default_group()
    group._get_backend(device)._set_default_timeout(longer)  # type: ignore[attr-defined]
    # Of the groups that DeepSpeed makes.
    dist.distributed_c10d.default_pg_nccl_timeout = longer  # type: ignore[attr-defined]


def _store(address: str, port: int, rank: int, size: int, patience: timedelta) -> Any:
    """Under torchrun, a part of its store for this attempt only; else rank 0's.

    A restarted rank would otherwise find the addresses of the dead.
    """
    if not _torchrun_has_store():
        return TCPStore(address, port, size, is_master=rank == 0, timeout=patience, multi_tenant=True)
    store = TCPStore(address, port, is_master=False, timeout=patience)
    return PrefixStore(f"crossrank/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _torchrun_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def wiring(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def meet_through_slurm(env: MutableMapping[str, str]) -> None:
    """Every rank of an srun step derives the same address and port from the step's own variables."""
    nodes = env.get("SLURM_STEP_NODELIST")
    if nodes is None:
        raise UserError("MASTER_ADDR or MASTER_PORT is not set; start ranks with torchrun or srun")
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"no scontrol here that names the nodes {nodes}; set MASTER_ADDR and MASTER_PORT") from None
    env["MASTER_ADDR"] = listing.stdout.split()[0]
    env["MASTER_PORT"] = str(20000 + (number(env, "SLURM_JOB_ID") + number(env, "SLURM_STEP_ID")) % 10000)


def keep_freed_memory() -> None:
    """Lets the next step have the memory that the last one freed, where the C library is glibc.

    By default glibc gives large blocks back to the kernel, which clears them page by page when they are asked for
    again: 54,000 page faults in a step of distilroberta's shape. See mallopt(3).
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which would go when it is freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 2**26)  # M_TOP_PAD: it grows in steps of 64 MiB
