"""What many ranks cost beside computing: meeting, votes, dealing, looking through the orders; and a model of it.

    python -m benchmarks.ranks [--ranks 2 4 8 16 32 64 128] [--pairs 1000000]

Ranks are forked on this machine, one thread each, and do nothing else. What one rank does by itself (dealing, looking
through orders) is measured at the sizes that are predicted. What takes several is extrapolated: the time of a hop from
ring sums of one number, whose 2 (ranks - 1) hops come one after the other, and the processor's time to meet from a line
fitted over ranks. "Before" is how ranks voted (a ring sum every step), dealt (all parts, by two sorts) and looked
through the orders (three times, on every rank).
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import common
from trainer import ranks
from trainer.data.sampler import Deal, GlobalBatchSampler
from trainer.run.preempt import SECONDS, Preemption

PREDICTED = (128, 1024, 4096)  # ranks
EACH = 64  # pairs of a rank in a step


def seconds_of(work: Callable[[], object], times: int = 5) -> float:
    """Median of the processor's time of a call."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def parts(rank: int, size: int) -> dict[str, float]:
    """One rank's figures: seconds of the clock and of its processor for each thing that ranks do together."""
    files, started, used = len(os.listdir("/dev/fd")), time.perf_counter(), time.process_time()
    world = ranks.start(600)
    world.barrier()
    found = {
        "meet": time.perf_counter() - started,
        "meet_cpu": time.process_time() - used,
        "files": len(os.listdir("/dev/fd")) - files,
    }
    number, ballot = torch.zeros(1), torch.zeros(2, dtype=torch.int64)
    preemption = Preemption(world, [])
    works: dict[str, tuple[Callable[[], object], int]] = {
        "sum": (lambda: dist.all_reduce(number), 20),
        "broadcast": (lambda: dist.broadcast(ballot, 0), 20),
        "gather_1kB": (lambda: world.gather_values("x" * 1000), 3),
        "store": (lambda: world.said("nothing"), 20),
        "check": (preemption.check, 2000),
    }
    for name, (work, times) in works.items():
        work()
        world.barrier()
        started, used = time.perf_counter(), time.process_time()
        for _ in range(times):
            work()
        found[name] = (time.perf_counter() - started) / times
        found[f"{name}_cpu"] = (time.process_time() - used) / times
        world.barrier()
    told = world.gather_values(found)
    mean = {name: statistics.mean(own[name] for own in told) for name in found} if told else {}
    return mean | {"files_rank_0": found["files"]}


def together(size: int) -> dict[str, float]:
    """The mean over `size` forked ranks."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        children = []
        for rank in range(size):
            if (child := os.fork()) == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                found = parts(rank, size)
                if rank == 0:
                    (Path(folder) / "found").write_text(json.dumps(found))
                dist.barrier()
                os._exit(0)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            sys.exit(f"a rank of {size} failed")
        return dict(json.loads((Path(folder) / "found").read_text()))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def deal_all(lengths: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """As ranks dealt before: two sorts, and the parts of all."""
    by_length = np.argsort(-lengths, kind="stable")
    row, column = np.divmod(np.arange(len(lengths)), num_parts)
    part = np.empty(len(lengths), dtype=np.int64)
    part[by_length] = np.where(row % 2 == 0, column, num_parts - 1 - column)
    return np.split(np.argsort(part, kind="stable"), np.bincount(part, minlength=num_parts)[:-1].cumsum())


def alone(pairs: int) -> dict[str, Any]:
    """What a rank does by itself."""
    lengths = np.random.default_rng(0).poisson(27, pairs).clip(3)
    deals = {}
    for size in PREDICTED:
        own = lengths[np.arange(size * EACH) % pairs]
        deals[size] = {
            "before": seconds_of(lambda own=own, size=size: deal_all(own, size)),  # type: ignore[misc]
            "after": seconds_of(lambda own=own, size=size: Deal(own, size).part(size // 2)),  # type: ignore[misc]
        }
    steps = math.ceil(pairs / 1024)

    def look() -> None:
        sampler = GlobalBatchSampler(pairs, 1024, 42, steps, "")
        sampler.extremes(lengths)
        list(sampler.measure(lengths, 0))

    def look_before() -> None:
        for over in (np.add, np.maximum, np.maximum):
            order = torch.randperm(pairs, generator=torch.Generator().manual_seed(42)).numpy()
            over.reduceat(lengths[order], np.arange(0, pairs, 1024))

    return {"deal": deals, "look_before": seconds_of(look_before, 3), "look_after": seconds_of(look, 3)}


def line(measured: dict[int, dict[str, float]], name: str) -> tuple[float, float]:
    """(at no rank, a rank more) of the straight line through a figure."""
    slope, start = np.polyfit([*measured], [own[name] for own in measured.values()], 1)
    return float(start), float(slope)


def predict(measured: dict[int, dict[str, float]], own: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Milliseconds, unless it says otherwise, at each of PREDICTED; see the module."""
    hop = np.polyfit([2 * (size - 1) for size in measured], [found["sum"] for found in measured.values()], 1)[0]
    meet = line(measured, "meet_cpu")
    store = measured[min(measured)]["store_cpu"]
    check = statistics.median(found["check_cpu"] for found in measured.values())
    table = {}
    for size in PREDICTED:
        tree = math.ceil(math.log2(size)) * hop
        table[size] = {
            "vote_before": 2 * (size - 1) * hop * 1e3,
            "vote_after": tree * 1e3,
            "votes_a_second_at_most_after": 1 / SECONDS,
            "check_a_step_cpu_after": check * 1e3,
            "store_cpu_of_rank_0_a_vote": store * 1e3,
            "deal_before": own["deal"][size]["before"] * 1e3,
            "deal_after": own["deal"][size]["after"] * 1e3,
            "look_through_an_epoch_before": own["look_before"] * 1e3,  # of every rank
            "look_through_an_epoch_after": own["look_after"] * 1e3,  # of rank 0
            "meet_cpu": (meet[0] + meet[1] * size) * 1e3,
            "files_of_a_rank": size - 1,
            "files_of_rank_0": 2 * size - 1,
        }
    return table


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128])
    options.add_argument("--pairs", type=int, default=1_000_000)
    chosen = options.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    measured = {}
    for size in chosen.ranks:
        measured[size] = together(size)
        print(size, {name: float(f"{value:.3g}") for name, value in measured[size].items()}, flush=True)
    own = alone(chosen.pairs)
    print(own)
    table = predict(measured, own)
    print(f"{'milliseconds':>30}", *(f"{size:>10,}" for size in table))
    for name in table[PREDICTED[0]]:
        print(f"{name:>30}", *(f"{column[name]:>10.3g}" for column in table.values()))
    common.save("ranks", chosen, {"measured": measured, "alone": own, "predicted": table, "load": os.getloadavg()})


if __name__ == "__main__":
    main()
