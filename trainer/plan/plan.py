"""A run before it is queued: memory, time, traffic, scaling, energy; and what to choose.

A Planner counts its model's step (trace.py), deals its batches (loads.py), and puts a device's and a link's numbers to
it (timing.py, memory.py). Nothing is computed on the device that is planned for.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trainer.base.errors import UserError
from trainer.config import Config
from trainer.data.sampler import global_batch_size, num_forwards
from trainer.data.tokens import Split
from trainer.plan.asked import PlanConfig, links
from trainer.plan.costs import NAMES, Costs, features
from trainer.plan.devices import Device, Link, find_device
from trainer.plan.loads import Loads, Orders, evaluation_counts, heaviest_parts, loads_of
from trainer.plan.memory import Memory, activation_bytes, memory_of, state_bytes
from trainer.plan.timing import Place, control_seconds, of_micro_batches, optimizer_seconds, traffic
from trainer.plan.trace import Subject

WORLDS = [2**power for power in range(11)]  # 1 to 1,024 ranks
MOST_PAIRS = 4_096  # of a forward
PEAKS = [NAMES.index(name) for name in ("peak", "bare")]
PARTS = ("linear", "attention", "other operations", "launches", "optimizer", "gradients", "control", "data")


@dataclass(frozen=True)
class Step:
    """A mean step of the run on some ranks: seconds by part, and in all; `slowest` and `mean` tokens of a rank.

    `pairs`: of the mean step; `batch`: of one that is not an epoch's short last one.
    """

    ranks: int
    seconds: float
    parts: dict[str, float]
    pairs: float
    batch: int
    num_steps: int
    mean_tokens: float
    slowest_tokens: float
    sent: float
    traffic: float
    hidden: float


@dataclass(frozen=True)
class Planner:
    """What is known of a run, of any number of ranks."""

    config: Config
    asked: PlanConfig
    device: Device
    inner: Link
    outer: Link
    subject: Subject
    data: dict[str, Split]
    label_names: tuple[str, ...]
    form: str
    dealt: dict[tuple[int, int], Loads] = field(default_factory=dict)

    def settle(self) -> None:
        """Once its data is known: what training cannot change is frozen."""
        fast = self.form in ("captured", "static")
        self.subject.settle(self.data["train"].tokens, fast, self.device.kind == "cpu")

    @cached_property
    def costs(self) -> Costs:
        most = min(global_batch_size(self.config, 1), self.config.per_device_train_batch_size)
        return Costs(self.subject, self.data["train"].tokens.lengths, most)

    @cached_property
    def orders(self) -> Orders:
        return Orders(self.config, self.data["train"])

    @cached_property
    def parameters(self) -> Any:
        return self.subject.parameters

    @property
    def number(self) -> str:
        return "bf16" if self.config.bf16 else "tf32" if self.config.tf32 and self.device.kind == "gpu" else "fp32"

    def place(self, ranks: int) -> Place:
        """So many ranks, each node filled up before another one is taken."""
        return Place(ranks, min(ranks, self.asked.gpus_per_node), self.inner, self.outer)

    def backend(self, ranks: int) -> str:
        """The one that the run would take, deepspeed by its stage."""
        config = self.config
        if config.backend == "deepspeed" or (config.backend == "auto" and config.deepspeed):
            name = (config.deepspeed or "zero2").removesuffix("_offload")
            return name if name in ("zero0", "zero1", "zero2", "zero3") else "zero2"
        if config.backend in ("auto", "single", "ddp"):
            return "single" if ranks == 1 else "ddp"
        return config.backend

    def form_of(self, backend: str) -> str:
        return self.form if backend in ("single", "ddp") else "plain"

    def seconds(self, counts: np.ndarray, ranks: int, form: str, number: str | None = None) -> np.ndarray:
        """(..., 4) of counts (..., NAMES); `number`: of products, None = the run's."""
        local = self.place(ranks).per_node
        flat = of_micro_batches(counts.reshape(-1, len(NAMES)), self.device, number or self.number, form, local)
        return flat.reshape(*counts.shape[:-1], 4)

    def loads(self, ranks: int, micro_batch: int | None = None) -> Loads:
        """Remembered: backends share them."""
        micro = micro_batch or self.config.per_device_train_batch_size
        if (ranks, micro) not in self.dealt:
            sampler, lengths = (
                self.orders.sampler(global_batch_size(self.config, ranks)),
                self.orders.split.tokens.lengths,
            )
            self.dealt[ranks, micro] = loads_of(sampler, lengths, self.subject, self.costs, ranks, micro)
        return self.dealt[ranks, micro]

    def step(self, ranks: int, micro_batch: int | None = None, backend: str | None = None) -> Step:
        return self.of_loads(self.loads(ranks, micro_batch), ranks, backend or self.backend(ranks))

    def of_loads(self, loads: Loads, ranks: int, backend: str) -> Step:
        config, device, place, form = self.config, self.device, self.place(ranks), self.form_of(backend)
        of_ranks = self.seconds(loads.counts, ranks, form).sum(2)  # (steps, ranks, 4)
        slowest = of_ranks.sum(-1).argmax(1)
        compute = loads.mean(of_ranks[np.arange(len(slowest)), slowest])
        optimizer = optimizer_seconds(self.parameters, device, backend, ranks, place.per_node)
        hook, forwards = config.ddp_comm_hook == "bf16", loads.counts.shape[2]
        sent = traffic(self.parameters, device, place, backend, form, float(compute.sum()), forwards, hook)
        busy = float(compute.sum()) + optimizer
        data = device.step / device.share(place.per_node)
        if device.kind == "gpu":
            data = max(0.0, data - busy)  # the host is ahead of the device
        control = control_seconds(ranks, config.logging_steps) if ranks > 1 else 0.0
        parts = [*map(float, compute), optimizer, sent.seconds - sent.hidden, control, data]
        pairs, mean, most = map(float, map(loads.mean, (loads.pairs, loads.tokens.mean(1), loads.tokens.max(1))))
        return Step(ranks, sum(parts), dict(zip(PARTS, parts, strict=True)), pairs, self.batch(ranks),
                    loads.num_steps, mean, most, sent.sent, sent.seconds, sent.hidden)  # fmt: skip

    def batch(self, ranks: int) -> int:
        """Pairs of a step, but for an epoch's short last one."""
        batch = global_batch_size(self.config, ranks)
        return min(batch, self.orders.sampler(batch).num_samples)

    # Memory.

    def memory(
        self, ranks: int, micro_batch: int, backend: str, exact: bool = True, batch: int | None = None
    ) -> Memory:
        """Of the heaviest rank. `exact`: traced, not computed from coefficients. `batch`: pairs of a step, None = the
        run's."""
        own, batch = self.parameters, batch or global_batch_size(self.config, ranks)
        parts, most = (
            heaviest_parts(self.orders.extremes(batch), ranks, micro_batch),
            min(micro_batch, -(-batch // ranks)),
        )
        peaks = np.array([features(self.subject, p, most, True) for p in parts]) @ self.costs.training[:, PEAKS]
        peak, bare = peaks.max(0)
        if exact:
            counted = self.subject.count(parts[int(np.argmax(peaks[:, 1]))], True, most)
            peak, bare = counted.peak, counted.bare
        forwards = num_forwards(micro_batch, batch, ranks)
        fast = self.form_of(backend) in ("captured", "static") and self.subject.unpadded
        state = state_bytes(own, backend, ranks, fast and ranks * forwards > 1, fast and self.config.bf16,
                            self.config.ddp_comm_hook == "bf16")  # fmt: skip
        data = sum(split.tokens.bytes_per_pair * len(split) for split in self.data.values())
        activations = activation_bytes(float(peak), float(bare), own, backend, forwards)
        return memory_of(self.device, state, activations, ranks == 1, data)

    def fits(self, memory: Memory, ranks: int) -> bool:
        """On a CPU the ranks of a machine share its memory."""
        together = self.place(ranks).per_node if self.device.kind == "cpu" else 1
        return memory.total * together <= self.device.memory

    def largest(self, ranks: int, backend: str, batch: int | None) -> int | None:
        """Pairs of the largest micro-batch that fits; None = not one pair. `batch`: pairs of a step, of which a rank
        has its part; None = as many as a forward of each rank, up to MOST_PAIRS."""
        most = MOST_PAIRS if batch is None else -(-batch // ranks)

        def fits(size: int) -> bool:
            memory = self.memory(ranks, size, backend, exact=False, batch=batch or size * ranks)
            return self.fits(memory, ranks)

        size = 1
        if not fits(1):
            return None
        while size < most and fits(min(2 * size, most)):
            size = min(2 * size, most)
        above = min(2 * size, most + 1)
        while above - size > max(1, size // 64):
            middle = (size + above) // 2
            size, above = (middle, above) if fits(middle) else (size, middle)
        return size

    # A run.

    @property
    def tests(self) -> list[str]:
        """Roles of the test sets."""
        return [role for role in self.data if role.startswith("test")]

    def evaluation(self, role: str, ranks: int, bf16: bool | None = None) -> float:
        """Seconds of one evaluation of a split; `bf16`: None = as the run's steps."""
        if role not in self.data:
            return 0.0
        size, exact = self.config.per_device_eval_batch_size, bf16 is False
        coefficients = self.costs.exact if exact else self.costs.evaluation
        number = ("tf32" if self.config.tf32 and self.device.kind == "gpu" else "fp32") if exact else None
        of_ranks = evaluation_counts(self.subject, coefficients, self.data[role], size, ranks)
        form = "plain" if self.device.kind == "gpu" else self.form
        return max(float(self.seconds(own, ranks, form, number).sum()) if len(own) else 0.0 for own in of_ranks)

    def final(self, ranks: int) -> float:
        """Seconds of the evaluations without autocast, of all splits, that end a run in bf16."""
        return sum(self.evaluation(role, ranks, False) for role in ("dev", *self.tests)) if self.config.bf16 else 0.0

    def num_evaluations(self, ranks: int) -> int:
        """Of the dev split, the final one included, which the last step's need not be computed again for."""
        config, sampler = self.config, self.orders.sampler(global_batch_size(self.config, ranks))
        if "dev" not in self.data:
            return 0
        every = config.eval_steps if config.eval_strategy == "steps" else sampler.steps_per_epoch
        during = 0 if config.eval_strategy == "no" else (sampler.num_steps - 1) // max(1, every)
        return int(config.eval_on_start) + during + 1

    def close(self) -> None:
        """Lets go of the orders of samples, and of their files."""
        if "orders" in vars(self):
            self.orders.close()


def planner(config: Config, asked: PlanConfig, label_names: tuple[str, ...], data: dict[str, Split]) -> Planner:
    device, _ = find_device(asked.device)
    subject = Subject(config, label_names)
    form = form_of(config, device, subject)
    return Planner(config, asked, device, *links(asked, device), subject, data, label_names, form)


def form_of(config: Config, device: Device, subject: Subject) -> str:
    """As step/form.py decides it."""
    auto = "captured" if device.kind == "gpu" and config.exact_shards is None else "plain"
    form = {"auto": auto}.get(config.step_form, config.step_form)
    plain = config.attn_implementation or config.torch_compile or config.gradient_checkpointing or config.skip_nonfinite
    if form == "captured" and device.kind == "cpu":
        raise UserError("step_form captured needs a CUDA device; say --step_form static, or leave it out")
    return "plain" if plain or not subject.unpadded else form
