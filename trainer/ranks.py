"""Ranks: who am I, and the few collectives that the trainer needs.

Ranks come from torchrun's variables, or Slurm's where those are absent. Every collective works at world size 1 and on
the CPU, so that callers never ask whether the run is distributed.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from trainer.base.environment import check_host, number, read_place
from trainer.base.errors import RankGone, TrainingFailed, UserError, cut_off
from trainer.base.log import start_log
from trainer.meeting import keep_freed_memory, leave, meet, meet_through_slurm, wiring

_run = 0  # how often this process has started: all ranks do so equally often


@dataclass(frozen=True)
class World:
    """This process among all ranks, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    run: int = 0  # a program may train and then evaluate: what is said in one of them is not of the other

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
        own = np.frombuffer(rows.tobytes(), np.uint8)
        longest = torch.tensor([len(own)])
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        sent = torch.zeros(8 + int(longest), dtype=torch.uint8)  # how many bytes there are, and the bytes
        sent[:8] = torch.tensor([len(own)]).view(torch.uint8)
        sent[8 : 8 + len(own)] = torch.tensor(own)
        parts = [torch.empty_like(sent) for _ in range(self.size)] if self.is_main else None
        dist.gather(sent, parts)
        if parts is None:
            return None
        whole = np.concatenate([part[8:].numpy()[: int(part[:8].view(torch.int64))] for part in parts])
        return whole.view(rows.dtype).reshape(-1, *rows.shape[1:])

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
        told = self.gather_values({"host": socket.gethostname(), "facts": facts()})
        if differing := self.broadcast(_differences(told or [])):
            fix = "start all with the same command, files and versions"
            raise UserError(f"the ranks do not agree: {differing}; {fix}")

    def all(self, condition: bool) -> bool:
        """Whether it holds on every rank."""
        return int(self.sum(torch.tensor([int(condition)]))) == self.size

    def gather_values(self, value: Any) -> list[Any] | None:
        """Every rank's JSON-serialisable value, by rank, on rank 0; None elsewhere."""
        gathered = self.gather(np.frombuffer(json.dumps(value).encode() + b"\n", np.uint8))
        return None if gathered is None else [json.loads(line) for line in gathered.tobytes().splitlines()]

    def say(self, name: str, value: Any) -> None:
        """Leaves a JSON-serialisable value where any rank can find it; each name once in a run."""
        with _connected():
            self._board.set(self._key(name), json.dumps(value))

    def said(self, name: str) -> bool:
        """Whether some rank has said something under this name."""
        with _connected():
            return bool(self._board.check([self._key(name)]))

    def wait_for(self, name: str, check: Callable[[], None] = lambda: None) -> Any:
        """What some rank says under this name, however long that takes: it may have to tokenise for an hour.

        Calls `check` while it waits, which may raise. Raises TrainingFailed where a rank has reported a failure, or
        rank 0 is gone.
        """
        pause = 0.001
        while not self.said(name):
            assert self.size > 1, f"nobody has said {name}"
            check()
            with _connected():
                if self._board.check([_failures(self.run)]):
                    raise TrainingFailed(f"another rank has failed, and says why; this one waited for {name}")
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        return json.loads(self._board.get(self._key(name)))

    def _key(self, name: str) -> str:
        return f"crossrank/{self.run}/said/{name}"

    @cached_property
    def _board(self) -> Any:
        """The process group's store."""
        return dist.distributed_c10d._get_default_store() if self.size > 1 else HashStore()

    def nodes(self) -> list[list[int]]:
        """The ranks of each host, on every rank; every rank takes part when it is first asked for."""
        return self._nodes

    @cached_property
    def _nodes(self) -> list[list[int]]:
        told = self.gather_values([socket.gethostname(), _boot(), self.local_rank])
        return list(self.broadcast(_by_host(told or [])))

    def num_nodes(self) -> int:
        """Every rank takes part when it, or `nodes`, is first asked for."""
        return len(self.nodes())

    def begin_barrier(self) -> Any:
        """One among the hosts, not their GPUs, to be waited for later."""
        gloo: Any = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        return gloo.barrier()

    def barrier(self) -> None:
        self.sum(torch.zeros(1))


@contextmanager
def _connected() -> Iterator[None]:
    """Raises RankGone where the store is gone, and with it rank 0."""
    try:
        yield
    except dist.DistError:
        raise RankGone("the connection to rank 0 broke off; look for what ended that one") from None


ALONE = World(0, 1, 0, torch.device("cpu"))  # a process that has no others


def _boot() -> str:
    """What tells hosts of one name apart: the running kernel's own number."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _by_host(told: list[tuple[str, str, int]]) -> list[list[int]]:
    """The ranks of each host, of (name, kernel, local rank) by rank.

    Two containers may have one name and one kernel, and share no files: a local rank that a host has already is of the
    next one.
    """
    hosts: dict[tuple[str, str], list[dict[int, int]]] = {}
    for rank, (name, kernel, local_rank) in enumerate(told):
        alike = hosts.setdefault((name, kernel), [])
        host = next((host for host in alike if local_rank not in host), None)
        if host is None:
            alike.append(host := {})
        host[local_rank] = rank
    return sorted(sorted(host.values()) for alike in hosts.values() for host in alike)


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
            meet_through_slurm(os.environ)
        check_host(os.environ["MASTER_ADDR"])
        port = number(os.environ, "MASTER_PORT")
        if not 0 < port < 2**16:
            raise UserError(f"MASTER_PORT is {port}; a port is a number from 1 to 65535")
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(index)}
        meet(rank, size, device, timedelta(seconds=timeout_seconds))
    global _run
    _run += 1
    return World(rank, size, local_rank, device, _run)


def form_group(world: World) -> None:
    """A process group even of one rank, for backends that cannot do without."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed asks for
        dist.init_process_group(wiring(world.device), store=HashStore(), rank=0, world_size=1)


def explain(error: RuntimeError, world: World, timeout_seconds: int) -> str | None:
    """What a collective's error means for the user, with the ranks that are missing; None if it is another error."""
    text = str(error)
    if world.size == 1:
        return None
    if reason := cut_off(error):
        return reason
    if "imed out" not in text and "pplication timeout" not in text:  # the second one where another call timed out first
        return None
    # Whoever waits comes here, sooner or later; the others are those that were waited for.
    store = dist.distributed_c10d._get_default_store()
    store.set(f"crossrank/waited/{world.rank}", "1")
    time.sleep(2)
    missing = [rank for rank in range(world.size) if not store.check([f"crossrank/waited/{rank}"])]
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing)) or '?'}"
    return f"{ranks} did not arrive within {timeout_seconds} s (ddp_timeout)"


def _failures(run: int) -> str:
    """The store's counter of the ranks that have failed."""
    return f"crossrank/{run}/failures"


def stop() -> None:
    if dist.is_initialized():
        leave()


def may_report_failure(patience: float) -> bool:
    """Whether this rank is the one to print its error: the first that fails. The others fail as a consequence.

    Before the ranks have met, it is each node's first one: a file may be missing on one node only. The others wait,
    `patience` seconds, because the launcher kills all ranks as soon as one is gone, and that one must have printed.
    """
    if dist.is_initialized():
        try:
            first = dist.distributed_c10d._get_default_store().add(_failures(_run), 1) == 1
        except (RuntimeError, ValueError):  # the store went away with rank 0: that one has reported
            first = False
        if not first:
            time.sleep(min(patience, 3.0))  # it is at its message already
        return first
    if read_place(os.environ).local_rank != 0:
        time.sleep(patience)  # who is alive after that fails by itself
    return True
