"""The static step: an optimizer step whose shapes are few, so that a GPU can replay it as a CUDA graph.

A batch is filled up to a shape by pairs that have no label, and copied into the same place in each step, together with
the few numbers that change. What follows reads nothing but that place, and waits for nothing: forward, loss, backward,
clipping, AdamW and the counters of what was not finite. `graphs.py` records and replays it, and `check.py` compares it
with the plain step before it is trusted.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from trainer.data.sampler import Step
from trainer.model.attention import input_layers
from trainer.model.batch import Batch, Shape, shape_of
from trainer.model.precision import autocast, products
from trainer.model.products import Products
from trainer.step.check import compare
from trainer.step.graphs import Graphs, NotAsExpected, Recorder
from trainer.step.plain import PlainStep

NUMBERS = 3  # of a step: its learning rate, as float64, its pairs, and its place in the run, counted from 1


class StaticStep:
    """The static step of one run.

    Args:
        plain: the step that it takes the place of, with whose weights, optimizer and counters it works.
        record: makes of a function another one that does the same again; None = functions run as they are.

    Attributes:
        loss: () this rank's part of the last step's loss.
        norm: () the last step's gradient norm, over all ranks.
    """

    def __init__(self, plain: PlainStep, record: Recorder | None) -> None:
        self.plain, device = plain, plain.world.device
        assert plain.model.layout is not None
        self.layout, optimizer = plain.model.layout, plain.backend.optimizer
        self.products: Products | None = None
        if plain.config.bf16:
            model = plain.model.model
            self.products = Products(model, self.layout, input_layers(model), torch.bfloat16)
        self.rate, self.loss, self.norm = (torch.zeros((), device=device) for _ in range(3))
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, device.type == "cuda"
        if not optimizer.state:
            plain.backend.make_moments(plain.state.num_updates)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.inputs = torch.zeros(NUMBERS + self._most_numbers(), dtype=torch.int64, device=device)
        self.sums: torch.Tensor | None = None  # of gradients, where a step is more than one forward of one rank
        self.graphs = Graphs(record, self._changing)
        self.shapes: set[Shape] = set()  # that any rank has met

    def __call__(self, current: Step, rate: float) -> torch.Tensor:
        """Takes the step. Returns the gradient's norm, on the device.

        Raises NotAsExpected, on every rank and with nothing changed, where it cannot be trusted.
        """
        world, micro_batches = self.plain.world, self.plain.micro_batches(current)
        new, alone = self._meets_new(current, micro_batches), world.size * len(micro_batches) == 1

        def forwards() -> None:
            for rows in micro_batches:
                batch = self._load(current, rows, rate)
                work = partial(self.whole if alone else self.part, batch)
                self.graphs.run((_shape(batch), alone), work, partial(self._check, current, rows, batch))

        if not alone:
            self._clear_sums()
        self._together(new, forwards)
        if not alone:
            self._reduce()
            self._together(new, partial(self.graphs.run, "update", self.update_by_sums))
        self.graphs.keep()
        self.plain.add_to_window(current)
        return self.norm

    # What is recorded.

    def whole(self, batch: Batch) -> None:
        """A step of one forward."""
        self.update(self._backward(batch))

    def part(self, batch: Batch) -> None:
        """One of the forwards of a step."""
        self.loss += self._backward(batch)
        torch._foreach_add_(self._parts_of_sums(), [p.grad for p in self.parameters])
        self._forget_gradients()

    def update_by_sums(self) -> None:
        """The step, when all forwards have been."""
        for parameter, total in zip(self.parameters, self._parts_of_sums(), strict=True):
            parameter.grad = total
        self.update(self.loss)

    def update(self, loss: torch.Tensor) -> None:
        backend, config = self.plain.backend, self.plain.config
        self.rate.copy_(self.inputs[0:1].view(torch.float64)[0])
        norm = backend.clip(config.max_grad_norm)
        backend.optimizer.step()
        self._forget_gradients()
        if self.products is not None:
            self.products.refresh()
        self.plain.state.window.count(self.inputs[2], loss, norm)
        self.loss.copy_(loss)
        self.norm.copy_(norm)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Forward and backward. Returns its part of the loss."""
        device, bf16 = batch.ids.device, self.plain.config.bf16
        self.layout.fast = True
        try:
            # Weights that autocast rounds and keeps would be those of the step that was recorded.
            with products(device, bf16), torch.enable_grad():
                with autocast(device, bf16, keep=False):
                    logits = self.plain.model(batch)
                loss = self.plain.loss(logits, batch) / self.inputs[1]
                loss.backward()
        finally:
            self.layout.fast = False
        return loss.detach()

    # What surrounds it.

    def _load(self, current: Step, rows: np.ndarray, rate: float) -> Batch:
        """The micro-batch `rows`, in its place on the device, by one copy."""
        host = self.plain.batch(current, rows, torch.device("cpu"), num_pairs=self.plain.micro_batch_size)
        numbers = np.array([0, len(current.rows), current.step + 1])
        numbers[:1].view(np.float64)[0] = rate
        flat = torch.cat([torch.from_numpy(numbers), host.flat])
        if self.inputs.is_cuda:
            flat = flat.pin_memory()
        self.inputs[: len(flat)].copy_(flat, non_blocking=True)
        return host.on(self.inputs[NUMBERS : len(flat)])

    def _most_numbers(self) -> int:
        """Of the largest micro-batch that there can be."""
        pairs, longest = self.plain.micro_batch_size, int(self.plain.split.tokens.lengths.max())
        shape = shape_of(np.full(pairs, longest), pairs)
        return 8 * shape.tokens + 2 * shape.pairs * shape.longest + 3 * shape.pairs + 1

    def _check(self, current: Step, rows: np.ndarray, batch: Batch) -> None:
        compare(self.plain, current, rows, partial(self._backward, batch))

    def _changing(self) -> list[torch.Tensor]:
        """Every tensor that a step changes, but for gradients."""
        optimizer, window = self.plain.backend.optimizer, self.plain.state.window
        moments = [value for p in self.parameters for value in optimizer.state[p].values()]
        copies = [copy for copy, _ in self.products.copies] if self.products else []
        sums = [] if self.sums is None else [self.sums]
        of_window = [window.loss, window.nonfinite]
        return [*self.parameters, *moments, *copies, *of_window, self.rate, self.loss, self.norm, *sums]

    def _meets_new(self, current: Step, own: list[np.ndarray]) -> bool:
        """Whether any rank meets a shape in this step that none has met. `own` are this rank's micro-batches."""
        plain = self.plain
        parts, lengths = own, plain.split.tokens.lengths
        if plain.world.size > 1:
            parts = [rows for rank in range(plain.world.size) for rows in plain.micro_batches(current, rank)]
        # An empty micro-batch is row 0.
        found = {shape_of(lengths[rows if len(rows) else [0]], plain.micro_batch_size) for rows in parts}
        new = not found <= self.shapes
        self.shapes |= found
        return new

    def _together(self, new: bool, work: Callable[[], None]) -> None:
        """`work`, which fails on every rank if it does on one; it can only if there is something new."""
        reason = ""
        try:
            work()
        except NotAsExpected as error:
            reason = str(error)
        if not new:
            return
        world = self.plain.world
        gathered = world.gather(np.frombuffer(reason.encode(), np.uint8))
        if found := world.broadcast(None if gathered is None else gathered.tobytes().decode()):
            self.graphs.undo()
            raise NotAsExpected(found)

    def _clear_sums(self) -> None:
        if self.sums is None:
            total = sum(p.numel() for p in self.parameters)
            self.sums = torch.zeros(total, device=self.inputs.device)
        self.sums.zero_()
        self.loss.zero_()

    def _parts_of_sums(self) -> list[torch.Tensor]:
        assert self.sums is not None
        parts = self.sums.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def _reduce(self) -> None:
        """Adds up what the ranks have."""
        assert self.sums is not None
        if self.plain.world.size == 1:
            return
        if self.plain.config.ddp_comm_hook == "bf16":
            low = self.sums.bfloat16()
            dist.all_reduce(low)
            self.sums.copy_(low)
        else:
            dist.all_reduce(self.sums)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def close(self) -> None:
        """Gives its memory back; the optimizer is the plain step's again."""
        self.graphs.clear()
        self.sums = None


def _shape(batch: Batch) -> Shape:
    return Shape(len(batch.ids), batch.num_pairs, batch.groups[0].longest)
