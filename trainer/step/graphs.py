"""Functions that are recorded when they are first met, tried, and replayed from then on: CUDA graphs."""

from collections.abc import Callable, Hashable

import torch

from trainer.base.errors import TrainingFailed, first_line, out_of_memory

Function = Callable[[], None]
Recorder = Callable[[Function], Function]
MOST = 16  # graphs; what is met later runs as it is


class NotAsExpected(Exception):
    """Why a step cannot be trusted, for the user."""


def captured(device: torch.device) -> Recorder:
    """Records CUDA graphs in one pool of memory: what a graph leaves behind, no other one reads."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Function) -> Function:
        graph = torch.cuda.CUDAGraph()
        # Other threads, as one that writes a checkpoint or NCCL's own, may call CUDA meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
        return graph.replay

    return record


class Graphs:
    """Runs functions that change nothing but `changing()`.

    Args:
        record: None = functions run as they are.
        changing: every tensor that they read and change.
    """

    def __init__(self, record: Recorder | None, changing: Callable[[], list[torch.Tensor]]) -> None:
        self.record, self.changing = record, changing
        self.replays: dict[Hashable, Function] = {}
        self.most = MOST
        self.before: list[torch.Tensor] | None = None

    def run(self, key: Hashable, function: Function, check: Function = lambda: None) -> None:
        """What `function` does. `key` says all that its operations depend on.

        Raises NotAsExpected where it is new and `check` does so, where it gives other bits the second time or when it
        is replayed, or fails. Then, or when another rank failed, `undo` is to be called, else `keep`.
        """
        if key not in self.replays:
            self._first(key, function, check)
        else:
            self.replays[key]()

    def undo(self) -> None:
        """Puts everything back to where it was before what was new. Raises TrainingFailed if the GPU is beyond that."""
        try:
            if self.before is not None:
                _put_back(self.changing(), self.before)
        except RuntimeError as error:
            raise TrainingFailed(
                f"the GPU does not answer after an error ({first_line(error)}); start the same command again with "
                "--step_form plain"
            ) from None
        self.before = None

    def keep(self) -> None:
        self.before = None

    def clear(self) -> None:
        """Gives the memory back."""
        self.replays.clear()
        self.before = None

    def _first(self, key: Hashable, function: Function, check: Function) -> None:
        try:
            check()
            start = [tensor.clone() for tensor in self.changing()]
            self.before = self.before or start
            function()
            once = self._bits()
            self._again(start, function, once, "a second time")
            if self.record is not None and len(self.replays) < self.most:
                try:
                    function = self.record(function)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    self.most = len(self.replays)
                else:
                    self._again(start, function, once, "as a CUDA graph")
        except NotAsExpected:
            raise
        except Exception as error:  # of CUDA, of Triton, of ptxas
            lacking = out_of_memory(error)
            raise NotAsExpected("it needs more memory than there is" if lacking else first_line(error)) from error
        self.replays[key] = function

    def _again(self, start: list[torch.Tensor], function: Function, once: torch.Tensor, how: str) -> None:
        _put_back(self.changing(), start)
        function()
        if not torch.equal(self._bits(), once):
            raise NotAsExpected(f"computed {how}, it gives other bits")

    def _bits(self) -> torch.Tensor:
        """(tensors,) of each one a sum of its bits, which any difference changes, but for odd luck."""
        return torch.stack([_as_numbers(tensor).sum(dtype=torch.int64) for tensor in self.changing()]).cpu()


def _as_numbers(tensor: torch.Tensor) -> torch.Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().reshape(-1).view(sizes[tensor.element_size()])


@torch.no_grad()
def _put_back(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
