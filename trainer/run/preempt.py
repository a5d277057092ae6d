"""Being asked to stop: a signal sets a flag, ranks agree at a step boundary, save, and exit together.

The trainer knows nothing of Slurm or of any other scheduler: exit code 85 says "preempted, start me again".
"""

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from trainer.base.environment import heard
from trainer.base.errors import Preempted
from trainer.ranks import World

SECONDS = 0.25  # between two votes, where steps are shorter
MOST = 64  # steps between two votes: what were short steps may become long ones


class Preemption:
    """Whether this run has been asked to stop, and whether all ranks know.

    A rank that was asked says so in the store. Rank 0 looks there every few steps, and tells all ranks at the same step
    whether to stop, and in how many steps it will tell them again: a broadcast, which is a tree, so that a rank sends
    and receives one or two messages a vote whatever the number of ranks. A barrier goes along, of log2(ranks) messages
    a rank, that is waited for at the next vote: on a GPU nothing else in the loop would say that a rank has not come.

    A second Ctrl-C exits at once.
    """

    def __init__(self, world: World, signals: Sequence[str]) -> None:
        self.world = world
        self.requested: str | None = None
        self.told = False
        self.phase = ""
        self.calls = self.due = self.since = 0  # calls of `check`: so far, when the next vote is, when the last one was
        self.every = 1  # calls from one vote to the next; 0: the next step is so long that its vote is read at once
        self.started = 0.0
        self.ballot = torch.zeros(2, dtype=torch.int64)  # whether to stop, and the next `every`
        self.work: dist.Work | None = None
        self.barrier: dist.Work | None = None
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for name in filter(heard, signals):
                number = getattr(signal, name)
                self.before[number] = signal.signal(number, self._handle)

    def close(self) -> None:
        """Signals mean again what they meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            os._exit(130)
        self.requested = self.requested or signal.Signals(number).name

    def check(self, phase: str = "training") -> None:
        """Raises Preempted, on every rank at the same call, where some rank had been asked to stop a few calls ago.

        Every rank calls it equally often, between steps or between an evaluation's batches. A vote is read at the next
        one, so that nobody waits for it: within half a second, or two steps where steps are as long as that, or the
        step that is under way where they are longer than a second. Another phase has steps of another length.
        """
        if self.world.size == 1:
            if self.requested:
                raise Preempted
            return
        if self.requested and not self.told:
            self.world.say("stop", self.requested)
            self.told = True
        self.calls += 1
        new = phase != self.phase
        if self.calls < self.due and not new:
            return
        self._read()
        self._begin(new)
        self.phase = phase
        if self.every == 0:
            self._read()
        self.due = self.calls + max(1, self.every)

    def _begin(self, new: bool) -> None:
        """A vote; rank 0's is that of all."""
        if new:
            self.every = 1
        if self.world.is_main:
            now = time.monotonic()
            each = SECONDS if new else (now - self.started) / (self.calls - self.since)
            every = 0 if each > 1 else max(1, min(MOST, int(SECONDS / max(each, 1e-6))))
            stop = self.requested is not None or self.world.said("stop")
            self.ballot = torch.tensor([int(stop), every])
            self.started, self.since = now, self.calls
        else:
            self.ballot = torch.zeros(2, dtype=torch.int64)
        if self.barrier is not None:
            self.barrier.wait()
        self.work = dist.broadcast(self.ballot, 0, async_op=True)
        self.barrier = self.world.begin_barrier()

    def _read(self) -> None:
        """The vote that has begun, if one has."""
        if self.work is None:
            return
        self.work.wait()
        self.work = None
        stop, self.every = self.ballot.tolist()
        if stop:
            raise Preempted

    def check_this_rank(self) -> None:
        """The same for this rank only, where there is nothing to save and nobody to agree with."""
        if self.requested:
            raise Preempted(f"stopped by {self.requested} before the first step" if self.world.is_main else "")
