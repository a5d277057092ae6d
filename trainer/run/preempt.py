"""Being asked to stop: a signal sets a flag, ranks agree at a step boundary, save, and exit together.

The trainer knows nothing of Slurm or of any other scheduler: exit code 85 says "preempted, start me again".
"""

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from trainer.base.environment import heard
from trainer.base.errors import Preempted
from trainer.ranks import World


class Preemption:
    """Whether this run has been asked to stop, and whether all ranks know.

    A second Ctrl-C exits at once.
    """

    def __init__(self, world: World, signals: Sequence[str]) -> None:
        self.world = world
        self.requested: str | None = None
        self.ballot = torch.zeros(1)
        self.work: dist.Work | None = None
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

    def check(self) -> None:
        """Raises Preempted where some rank had been asked to stop when this was last called; every rank calls it
        equally often, between steps or between an evaluation's batches.

        The vote travels while the next step computes, so that asking costs no wait.
        """
        agreed = self.world.size == 1 and self.requested is not None
        if self.world.size > 1:
            if self.work is not None:
                self.work.wait()
                agreed = float(self.ballot) > 0
            self.ballot = torch.tensor([float(self.requested is not None)])
            self.work = dist.all_reduce(self.ballot, async_op=True)
        if agreed:
            raise Preempted

    def check_this_rank(self) -> None:
        """The same for this rank only, where there is nothing to save and nobody to agree with."""
        if self.requested:
            raise Preempted(f"stopped by {self.requested} before the first step" if self.world.is_main else "")
