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

from trainer.base.errors import TrainingFailed
from trainer.data.sampler import Deal, Step
from trainer.model.attention import input_layers
from trainer.model.batch import Batch, Shape, shape_for, shape_of
from trainer.model.precision import autocast, products
from trainer.model.products import Products
from trainer.step.check import compare, compare_update
from trainer.step.graphs import Graphs, NotAsExpected, Recorder
from trainer.step.plain import PlainStep

NUMBERS = 3  # of a step: rate as float64, the loss's divisor as float32, and its place in the run, counted from 1


class StaticStep:
    """The static step of one run.

    Args:
        plain: the step that it takes the place of, with whose weights, optimizer and counters it works.
        recorder: makes of a function another one that does the same again; None = functions run as they are.

    Attributes:
        loss: () this rank's part of the last step's loss.
        norm: () the last step's gradient norm, over all ranks.
    """

    def __init__(self, plain: PlainStep, recorder: Recorder | None) -> None:
        self.plain, device = plain, plain.world.device
        assert plain.model.layout is not None
        self.layout, optimizer = plain.model.layout, plain.backend.optimizer
        self.products: Products | None = None
        if plain.config.bf16:
            model = plain.model.model
            self.products = Products(model, self.layout, input_layers(model), torch.bfloat16)
        self.loss, self.norm = (torch.zeros((), device=device) for _ in range(2))
        if not optimizer.state:
            plain.backend.make_moments(plain.state.num_updates)
        self.scales = torch.tensor([group["scale"] for group in optimizer.param_groups], dtype=torch.float64)
        self.scales = self.scales.to(device)
        self.rates = torch.zeros(len(self.scales), device=device)  # of each group
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"], group["capturable"] = rate, device.type == "cuda"
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.inputs = torch.zeros(NUMBERS + self._most_numbers(), dtype=torch.int64, device=device)
        # Of gradients, where a step can be more than one forward of one rank; each part is aligned.
        one = plain.world.size == 1 and plain.batch_size <= plain.micro_batch_size
        sizes = [] if one else [-(-p.numel() // 32) * 32 for p in self.parameters]
        self.sums = torch.zeros(sum(sizes), device=device)
        self.parts_of_sums = [
            part[: p.numel()].view(p.shape) for part, p in zip(self.sums.split(sizes), self.parameters, strict=False)
        ]
        self.graphs = Graphs(recorder)
        self.met: set[tuple[Shape, bool]] = set()  # by any rank
        self.updated = False  # once, so that the update has been compared

    def __call__(self, current: Step, rate: float) -> torch.Tensor:
        """Takes the step. Returns the gradient's norm, on the device.

        Raises NotAsExpected, on every rank and with nothing changed, where it cannot be trusted.
        """
        dealt = self.plain.dealt(current)
        alone = dealt.num_parts == 1
        new = self._meets_new(dealt, alone)

        def forwards() -> None:
            for rows in self.plain.micro_batches(current):
                batch = self._load(current, rows, rate)
                work = partial(self.whole if alone else self.part, batch)
                if len(rows) == 0:  # nothing by which it could be tried
                    work()
                    continue
                changing = self._all if alone else self._of_a_part
                self.graphs.run((_shape(batch), alone), work, changing, partial(self._check, current, rows, batch))

        if not alone:
            self.sums.zero_()
            self.loss.zero_()
        self._together(new, forwards)
        if not alone:
            self._reduce()
            self._together(new, partial(self.graphs.run, "update", self.update_by_sums, self._all))
        if not self.updated:
            self._together(new, partial(self._check_update, rate))
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
        torch._foreach_add_(self.parts_of_sums, [p.grad for p in self.parameters])
        self._forget_gradients()

    def update_by_sums(self) -> None:
        """The step, when all forwards have been."""
        for parameter, total in zip(self.parameters, self.parts_of_sums, strict=True):
            parameter.grad = total
        self.update(self.loss)

    def update(self, loss: torch.Tensor) -> None:
        backend, config = self.plain.backend, self.plain.config
        torch.mul(self.scales, self.inputs[0:1].view(torch.float64), out=self.rates)
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
        self._forget_gradients()  # which a recording that failed may have left
        self.layout.fast = True
        try:
            # Weights that autocast rounds and keeps would be those of the step that was recorded.
            with products(device, bf16), torch.enable_grad():
                with autocast(device, bf16, keep=False):
                    logits = self.plain.model(batch)
                loss = self.plain.loss(logits, batch) / self.inputs[1:2].view(torch.float32)[0]
                loss.backward()
        finally:
            self.layout.fast = False
            self.layout.forget()
        return loss.detach()

    # What surrounds it.

    def _load(self, current: Step, rows: np.ndarray, rate: float) -> Batch:
        """The micro-batch `rows`, in its place on the device, by one copy."""
        host = self.plain.batch(current, rows, torch.device("cpu"), num_pairs=self.plain.most_pairs)
        numbers = np.array([0, 0, current.step + 1])
        numbers[:1].view(np.float64)[0] = rate
        numbers[1:2].view(np.float32)[0] = self.plain.loss.divisor(current.rows)
        flat = torch.cat([torch.from_numpy(numbers), host.flat])
        if self.inputs.is_cuda:
            flat = flat.pin_memory()
        self.inputs[: len(flat)].copy_(flat, non_blocking=True)
        return host.on(self.inputs[NUMBERS : len(flat)])

    def _most_numbers(self) -> int:
        """Of the largest micro-batch that there can be."""
        pairs, longest = self.plain.most_pairs, int(self.plain.split.tokens.lengths.max())
        shape = shape_of(np.full(pairs, longest), pairs)
        return 8 * shape.tokens + 2 * shape.pairs * shape.longest + 3 * shape.pairs + 1

    def _check(self, current: Step, rows: np.ndarray, batch: Batch) -> None:
        compare(self.plain, current, rows, partial(self._backward, batch))

    def _check_update(self, rate: float) -> None:
        before = {id(tensor): value for tensor, value in self.graphs.before}
        compare_update(self.plain, lambda tensor: before[id(tensor)], rate, self.norm)
        self.updated = True

    def _of_a_part(self) -> list[torch.Tensor]:
        """Every tensor that a part changes."""
        return [self.sums, self.loss]

    def _all(self) -> list[torch.Tensor]:
        """Every tensor that a step changes, but for gradients."""
        optimizer, window = self.plain.backend.optimizer, self.plain.state.window
        moments = [value for p in self.parameters for value in optimizer.state[p].values()]
        copies = [copy for copy, _ in self.products.copies] if self.products else []
        own = [self.rates, self.loss, self.norm, self.sums]
        return [*self.parameters, *moments, *copies, window.loss, window.nonfinite, *own]

    def _meets_new(self, dealt: Deal, alone: bool) -> bool:
        """Whether any rank meets in this step what none has met."""
        measures = set(dealt.measures())
        if len(dealt.by_length) < dealt.num_parts:  # an empty micro-batch is row 0
            first = int(self.plain.split.tokens.lengths[0])
            measures.add((1, first, first))
        found = {(shape_for(*measured, self.plain.most_pairs), alone) for measured in measures}
        new = not found <= self.met
        self.met |= found
        return new

    def _together(self, new: bool, work: Callable[[], None]) -> None:
        """`work`, which fails on every rank if it does on one; it should only if there is something new."""
        reason = ""
        try:
            work()
        except NotAsExpected as error:
            if not new:
                raise TrainingFailed(str(error)) from error
            reason = str(error)
        if not new:
            return
        reasons = self.plain.world.gather_values(reason)
        if found := self.plain.world.broadcast(next(filter(None, reasons or []), "")):
            self._forget_gradients()
            self.graphs.undo()
            raise NotAsExpected(found)

    def _reduce(self) -> None:
        """Adds up what the ranks have."""
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
        self._forget_gradients()
        self.graphs.clear()
        self.layout.forget()
        if self.products is not None:
            self.products.remove()
        for group in self.plain.backend.optimizer.param_groups:
            group["lr"], group["capturable"] = float(group["lr"]), False
        self.plain.backend.optimizer.grad_scale = None
        self.sums, self.parts_of_sums = self.sums[:0], []
        if self.inputs.is_cuda:
            torch.cuda.empty_cache()


def _shape(batch: Batch) -> Shape:
    return Shape(len(batch.ids), batch.num_pairs, batch.groups[0].longest)
