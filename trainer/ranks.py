"""Ranks: who am I, and the few collectives that the trainer needs.

Ranks come from torchrun's variables, or Slurm's where those are absent. Every collective works at world size 1 and on
the CPU, so that callers never ask whether the run is distributed. Control data travels over gloo, gradients over the
device's own library; a process group therefore carries both.
"""

import ctypes
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from trainer.base.environment import check_host, number, read_place
from trainer.base.errors import TrainingFailed, UserError, first_line
from trainer.base.log import start_log


@dataclass(frozen=True)
class World:
    """This process among all ranks, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on every rank; `tensor` itself is overwritten."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows: np.ndarray) -> np.ndarray | None:
        """Concatenates (n_rank, ...) arrays of any n_rank by rank on rank 0; None elsewhere."""
        if self.size == 1:
            return rows
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)]))
        longest = max(int(count) for count in counts)
        padded = np.zeros((longest, *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        parts = [torch.empty(padded.shape, dtype=torch.from_numpy(padded).dtype) for _ in counts]
        dist.gather(torch.from_numpy(padded), parts if self.is_main else None)
        if not self.is_main:
            return None
        return np.concatenate([part[: int(count)].numpy() for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-serialisable value, on every rank."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(buffer, 0)
        return json.loads(bytes(buffer.numpy()))

    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Overwrites `tensor` with rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def agree(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Raises UserError, on every rank, where a JSON-serialisable fact is not the same on all of them.

        One rank agrees with itself, and computes none.
        """
        if self.size == 1:
            return
        line = json.dumps({"host": socket.gethostname(), "facts": facts()}).encode() + b"\n"
        gathered = self.gather(np.frombuffer(line, np.uint8))
        lines = [] if gathered is None else gathered.tobytes().splitlines()
        if differing := self.broadcast(_differences(list(map(json.loads, lines)))):
            fix = "start all with the same command, files and versions"
            raise UserError(f"the ranks do not agree: {differing}; {fix}")

    def all(self, condition: bool) -> bool:
        """Whether it holds on every rank."""
        return int(self.sum(torch.tensor([int(condition)]))) == self.size

    def num_nodes(self) -> int:
        """Every rank takes part."""
        return int(self.sum(torch.tensor([int(self.local_rank == 0)])))

    def barrier(self) -> None:
        self.sum(torch.zeros(1))


def _differences(ranks: list[dict[str, Any]]) -> str:
    """The first rank of each host whose facts are not rank 0's, with both values."""
    found: dict[tuple[str, str, str], str] = {}
    for rank, own in enumerate(ranks):
        for name in ranks[0]["facts"] | own["facts"]:  # ranks of other versions have other facts
            theirs, value = (facts.get(name, "nothing") for facts in (ranks[0]["facts"], own["facts"]))
            place = f"rank {rank} ({own['host']})"
            if value != theirs:
                theirs, value = (str(v)[:80] for v in (theirs, value))
                text = f"{name} is {theirs} on rank 0 ({ranks[0]['host']}) and {value} on {place}"
                found.setdefault((name, own["host"], str(value)), text)
    return ", ".join(found.values())


def start(timeout_seconds: int) -> World:
    """Joins the other ranks, picks the device, and starts the log, which rank 0 writes."""
    place = read_place(os.environ)
    rank, size, local_rank = place.rank, place.size, place.local_rank
    start_log(rank == 0)
    device, index = torch.device("cpu"), local_rank
    if torch.cuda.is_available():
        # A task of srun --gpus-per-task=1 sees only one GPU, at index 0, whatever its local rank.
        if torch.cuda.device_count() == 1 and place.launcher == "srun":
            index = 0
        if index >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU, there are {torch.cuda.device_count()}; start fewer ranks, or "
                "set CUDA_VISIBLE_DEVICES= (nothing) to compute on the CPU"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    if size > 1 and not dist.is_initialized():  # a program may train and then evaluate
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            _meet_through_slurm(os.environ)
        check_host(os.environ["MASTER_ADDR"])
        port = number(os.environ, "MASTER_PORT")
        if not 0 < port < 2**16:
            raise UserError(f"MASTER_PORT is {port}; a port is a number from 1 to 65535")
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(index)}
        _meet(rank, size, device, timedelta(seconds=timeout_seconds))
    return World(rank, size, local_rank, device)


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


def _meet(rank: int, size: int, device: torch.device, patience: timedelta) -> None:
    """Makes the process group. Raises TrainingFailed where the ranks do not find each other.

    A thread waits for the others, since a wait inside torch lets no handler of a signal run; this one hears signals.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def work() -> None:
        try:
            store = _store(address, port, rank, size, patience)
            dist.init_process_group(_wiring(device), timeout=patience, store=store, rank=rank, world_size=size)
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
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return TCPStore(address, port, size, is_master=rank == 0, timeout=patience, multi_tenant=True)
    store = TCPStore(address, port, is_master=False, timeout=patience)
    return PrefixStore(f"crossrank/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _wiring(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def form_group(world: World) -> None:
    """A process group even of one rank, for backends that cannot do without."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed asks for
        dist.init_process_group(_wiring(world.device), store=HashStore(), rank=0, world_size=1)


def _meet_through_slurm(env: MutableMapping[str, str]) -> None:
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


def explain(error: RuntimeError, world: World, timeout_seconds: int) -> str | None:
    """What a collective's error means for the user, with the ranks that are missing; None if it is another error."""
    text = str(error)
    if world.size == 1:
        return None
    if "onnection closed" in text or "onnection reset" in text or "roken pipe" in text:
        return "the connection to another rank broke off; look for what ended that one"
    if "imed out" not in text and "pplication timeout" not in text:  # the second one where another call timed out first
        return None
    # Whoever waits comes here, sooner or later; the others are those that were waited for.
    store = dist.distributed_c10d._get_default_store()
    store.set(f"crossrank/waited/{world.rank}", "1")
    time.sleep(2)
    missing = [rank for rank in range(world.size) if not store.check([f"crossrank/waited/{rank}"])]
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing)) or '?'}"
    return f"{ranks} did not arrive within {timeout_seconds} s (ddp_timeout)"


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def may_report_failure(patience: float) -> bool:
    """Whether this rank is the one to print its error: the first that fails. The others fail as a consequence.

    Before the ranks have met, it is each node's first one: a file may be missing on one node only. The others wait,
    `patience` seconds, because the launcher kills all ranks as soon as one is gone, and that one must have printed.
    """
    if dist.is_initialized():
        try:
            first = dist.distributed_c10d._get_default_store().add("crossrank/failures", 1) == 1
        except (RuntimeError, ValueError):  # the store went away with rank 0: that one has reported
            first = False
        if not first:
            time.sleep(min(patience, 3.0))  # it is at its message already
        return first
    if read_place(os.environ).local_rank != 0:
        time.sleep(patience)  # who is alive after that fails by itself
    return True
