"""Functions that are recorded when they are first met, tried, and replayed from then on: CUDA graphs."""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from trainer.base.errors import TrainingFailed, first_line, out_of_memory

Function = Callable[[], None]
Tensors = Callable[[], list[torch.Tensor]]
MOST = 16  # graphs; what is met later runs as it is


class NotAsExpected(Exception):
    """Why a step cannot be trusted, for the user."""


class Recorder:
    """Makes of a function another one that does the same again: here, itself."""

    def aside(self) -> AbstractContextManager[None]:
        """Where functions are tried and recorded."""
        return nullcontext()

    def record(self, function: Function) -> Function:
        return function


class Captured(Recorder):
    """Records CUDA graphs in one pool of memory: what a graph leaves behind, no other one reads."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream that is captured: autograd remembers on which one a parameter was first used."""
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            try:
                yield
            finally:
                outside.wait_stream(self.stream)
                torch.cuda.empty_cache()  # what was tried on this stream is of no use to others

    def record(self, function: Function) -> Function:
        gc.collect()  # what holds an older forward's graph would bring its stream into the capture
        graph = torch.cuda.CUDAGraph()
        # Other threads, as one that writes a checkpoint or NCCL's own, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Graphs:
    """Runs functions that depend on nothing but fixed tensors.

    Args:
        recorder: None = functions run as they are.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        self.replays: dict[Hashable, Function] = {}
        self.tries = 0
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []  # tensors, and what they were

    def run(self, key: Hashable, function: Function, changing: Tensors, check: Function = lambda: None) -> None:
        """What `function` does. `key` says all that its operations depend on; `changing` gives all that it changes.

        Raises NotAsExpected where it is new and `check` does so, where it gives other bits the second time or when it
        is replayed, or fails. Then, or when another rank failed, `undo` is to be called, else `keep`.
        """
        if key in self.replays:
            self.replays[key]()
            return
        try:
            with torch.no_grad(), self.recorder.aside() if self.recorder else nullcontext():
                self.replays[key] = self._tried(function, changing, check)
        except NotAsExpected:
            raise
        except Exception as error:  # of CUDA, of Triton, of ptxas
            reason = "it needs more memory than there is" if _out_of_memory(error) else first_line(error)
            raise NotAsExpected(reason) from error

    def undo(self) -> None:
        """Puts everything back to where it was before what was new. Raises TrainingFailed if the GPU is beyond that."""
        try:
            _put_back(self.before[::-1])
        except RuntimeError as error:
            raise TrainingFailed(
                f"the GPU does not answer after an error ({first_line(error)}); start the same command again with "
                "--step_form plain"
            ) from None
        self.before = []

    def keep(self) -> None:
        self.before = []

    def clear(self) -> None:
        """Gives the memory back."""
        self.replays.clear()
        self.before = []

    def _tried(self, function: Function, changing: Tensors, check: Function) -> Function:
        check()
        start = [(tensor, tensor.detach().clone()) for tensor in changing()]
        self.before += start
        function()
        once = _bits(start)
        self._again(function, start, once, "a second time")
        if self.recorder is None or self.tries == MOST:
            return function
        self.tries += 1
        try:
            replay = self.recorder.record(function)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            replay = function
        self._again(replay, start, once, "as a CUDA graph")
        return replay

    def _again(
        self, function: Function, start: list[tuple[torch.Tensor, torch.Tensor]], once: torch.Tensor, how: str
    ) -> None:
        _put_back(start)
        function()
        if not torch.equal(_bits(start), once):
            raise NotAsExpected(f"computed {how}, it gives other bits")


def _bits(tensors: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """(tensors,) of each one a sum of its bits, which any difference changes, but for odd luck."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    numbers = (tensor.detach().reshape(-1).view(sizes[tensor.element_size()]) for tensor, _ in tensors)
    return torch.stack([number.sum(dtype=torch.int64) for number in numbers]).cpu()


def _put_back(tensors: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, value in tensors:
        tensor.detach().copy_(value)


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what it comes from: the end of a capture that failed raises an error of its own."""
    while error is not None:
        if isinstance(error, Exception) and out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False
