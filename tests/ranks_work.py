"""What a rank does in test_ranks.py: each part by itself, on as many ranks as there are, two to a host.

Arguments: the soft limit of open files to start with, and a folder: for temporary files, and for one that tells which
orders were drawn.
"""

import errno
import os
import resource
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from trainer import ranks
from trainer.backends.share import Share
from trainer.base.errors import Preempted, TrainingFailed
from trainer.data import sampler
from trainer.data.team import team_of
from trainer.meeting import more_connections
from trainer.run import preempt, verified
from trainer.run.checkpoint import Checkpoints
from trainer.run.preempt import MOST, Preemption


def stopped_at(asked: int, pace: float, phases: int = 1, long: bool = False) -> list[int] | None:
    """At which call each rank is stopped; rank `asked` gets a signal at the 100th, the phase changes every 40 calls.

    `pace`: seconds of a call; `long`: a clock that says two for each.
    """
    again = ranks.start(600)  # of a program that trains twice
    preemption = Preemption(again, ["SIGTERM"])
    calls = 0
    preempt.time = SimpleNamespace(monotonic=lambda: 2.0 * calls) if long else time
    try:
        while True:
            calls += 1
            if again.rank == asked and calls == 100:
                os.kill(os.getpid(), signal.SIGTERM)
            if again.is_main:
                time.sleep(pace)
            preemption.check(f"phase {calls // 40 % phases}")
    except Preempted:
        pass
    preemption.close()
    again.barrier()
    return again.gather_values(calls)


rank = int(os.environ["RANK"])
tempfile.tempdir = sys.argv[2]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.environ["LOCAL_RANK"] = str(rank % 2)  # hosts of one name, as containers have
world = ranks.start(600)
size = world.size
expected = [[rank, rank + 1] if rank + 1 < size else [rank] for rank in range(0, size, 2)]
assert world.nodes() == expected, world.nodes()
assert world.num_nodes() == len(expected)

# Connections of their own, with fewer open files than they need.
resource.setrlimit(
    resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
)
group = more_connections(rank, size, timedelta(seconds=600))
ones = torch.ones(1)
dist.all_reduce(ones, group=group)
assert ones == size

# Teams: one folder of several hosts, two whose ranks have file systems of their own, and one that nobody can make.
half, last = size // 2, size - 2
folders = ["all" if other < half else f"own{other % 2}" if other < last else "none" for other in range(size)]
place = Path("/dev/null") if rank >= last else Path(sys.argv[2])
members = team_of(world, place / "teams" / folders[rank]).members
assert members == [other for other in range(size) if folders[other] == folders[rank]], (rank, members)
world.barrier()
assert rank >= last or not os.listdir(place / "teams" / folders[rank])

# A checkpoint's manifest that one of the ranks cannot read, when it comes to that.
content = verified.content


def unreadable(path: Path) -> bytes:
    asked.append(path)
    if world.rank == 3 and len(asked) == 2:
        raise OSError(errno.EIO, "Input/output error", str(path))
    return content(path)


checkpoints = Checkpoints(Path(sys.argv[2]) / "checkpoints", None, world)
checkpoints.save(1, Share.of({"a": torch.ones(2)}), {})
checkpoints.wait()
asked, verified.content = [], unreadable
try:
    verified.load(checkpoints.folder / "step-000001", world)
except OSError as error:
    if error.errno != errno.EIO:
        raise
else:
    sys.exit("rank 3 could not read it")
verified.content = content

# A deal and an order, of which the ranks take their shares.
sampler.MAPPED = 1000
draw = sampler.epoch_order


def watched(*args: int) -> np.ndarray:
    with open(Path(sys.argv[2]) / "draws", "a") as file:
        file.write(f"{args[-1]}\n")
    return draw(*args)


sampler.epoch_order = watched
made = sampler.GlobalBatchSampler(5000, 999, 42, 8, "")
lengths = np.arange(5000) % 300 + 3
for step in made.steps():
    own = step.rows[sampler.Deal(lengths[step.rows], size).part(rank)]
    shares = world.gather(own)
    assert shares is None or sorted(shares) == sorted(step.rows)
    tokens = world.gather(lengths[own].sum(keepdims=True))
    assert tokens is None or np.ptp(tokens) <= 2 * 302

told = world.gather_values({"rank": rank, "text": "ä\n" * rank})
assert told is None if rank else told == [{"rank": r, "text": "ä\n" * r} for r in range(size)]
rows = world.gather(np.full((rank % 3, 2), rank, np.float32))
assert rows is None if rank else np.array_equal(rows[:, 1], np.repeat(np.arange(size), np.arange(size) % 3))
world.say(f"of {rank}", [rank])
assert world.wait_for(f"of {(rank + 1) % size}") == [(rank + 1) % size]

for asked, pace, phases in ((0, 0.0, 1), (size - 1, 0.0, 2), (size // 2, 0.01, 1)):
    stopped = stopped_at(asked, pace, phases)
    if stopped:
        assert len({*stopped}) == 1, stopped
        assert 100 < stopped[0] <= 101 + 2 * MOST, stopped

stopped = stopped_at(size - 1, 0.0, long=True)
assert not stopped or ({*stopped} <= {100, 101} and len({*stopped}) == 1), stopped

world = ranks.start(600)
if rank == 1:
    assert ranks.may_report_failure(0)
try:
    world.wait_for("what rank 1 would have said")
except TrainingFailed as error:
    if "another rank has failed" not in str(error):
        raise
    assert rank == 1 or not ranks.may_report_failure(0)
else:
    sys.exit("nobody had said it")
world.barrier()
ranks.stop()
