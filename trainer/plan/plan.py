"""A run before it is queued: memory, time, traffic, scaling, energy; and what to choose.

A Planner counts its model's step (trace.py), deals its batches (loads.py), and puts a device's and a link's numbers to
it (timing.py, memory.py). Nothing is computed on the device that is planned for.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from trainer.base.errors import UserError
from trainer.base.fields import Fields, option
from trainer.config import Config
from trainer.data.sampler import Deal, global_batch_size, num_forwards
from trainer.data.tokens import Split
from trainer.plan.costs import NAMES, Costs, features
from trainer.plan.devices import Device, Link, find_device, find_link
from trainer.plan.loads import Loads, evaluation_counts, heaviest_parts, loads_of, sampler_of
from trainer.plan.memory import STEPS_OF_SHAPES, Memory, memory_of, state_bytes
from trainer.plan.timing import Place, control_seconds, of_micro_batches, optimizer_seconds, traffic
from trainer.plan.trace import Subject

WORLDS = [2**power for power in range(11)]  # 1 to 1,024 ranks
PARTS = ("linear", "attention", "other operations", "launches", "optimizer", "gradients", "control", "data")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Fields):
    """Plan"""

    nodes: int = option(1, above=0)
    """Machines."""
    gpus_per_node: int = option(1, above=0)
    """Ranks on each of them: its GPUs, or processes on a CPU."""
    device: str = option("cpu", path=True)
    """What each rank computes on: rtx3090, a100, h100, h200, cpu, or a file such as --measure writes."""
    link: str | None = option(None, path=True)
    """Between nodes, or on one node between ranks: nvlink4, infiniband400x8, ethernet10 ..., a bandwidth such as
    25Gbit, or a file; None = the device's own on one node, ethernet100 between several."""
    json: bool = False
    """Print the plan as JSON; docs/plan.md lists its keys."""
    picture: str | None = option(None, path=True)
    """File of the scaling curve, svg or png; None = plan.svg in output_dir, if that is given."""
    measure: str | None = option(None, path=True)
    """Measure this machine on the run's own model first, in about a minute, write a device file of this name, and plan
    with it."""
    price: float | None = option(None, above=0)
    """Price of one device for an hour, in any currency."""


@dataclass(frozen=True)
class Step:
    """A mean step of the run on some ranks: seconds by part, and in all; `slowest` and `mean` tokens of a rank."""

    ranks: int
    seconds: float
    parts: dict[str, float]
    pairs: float
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

    def settle(self) -> None:
        """Once its data is known: what training cannot change is frozen."""
        fast = self.form in ("captured", "static")
        self.subject.settle(self.data["train"].tokens, fast, self.device.kind == "cpu")

    @cached_property
    def costs(self) -> Costs:
        most = min(global_batch_size(self.config, 1), self.config.per_device_train_batch_size)
        return Costs.of(self.subject, self.data["train"].tokens.lengths, most)

    @cached_property
    def parameters(self) -> Any:
        return self.subject.parameters

    @property
    def number(self) -> str:
        return "bf16" if self.config.bf16 else "tf32" if self.config.tf32 and self.device.kind == "gpu" else "fp32"

    def place(self, ranks: int) -> Place:
        """So many ranks, each node filled up before another one is taken."""
        per_node = min(ranks, self.asked.gpus_per_node)
        return Place(-(-ranks // per_node), per_node, self.inner, self.outer)

    def backend(self, ranks: int) -> str:
        """The one that the run would take, deepspeed by its stage."""
        config = self.config
        if config.backend == "deepspeed" or config.deepspeed:
            name = (config.deepspeed or "zero2").removesuffix("_offload")
            return name if name in ("zero0", "zero1", "zero2", "zero3") else "zero2"
        if config.backend in ("auto", "single", "ddp"):
            return "single" if ranks == 1 else "ddp"
        return config.backend

    def form_of(self, backend: str) -> str:
        return self.form if backend in ("single", "ddp") else "plain"

    def seconds(self, counts: np.ndarray, ranks: int, form: str) -> np.ndarray:
        """(..., 4) of counts (..., NAMES)."""
        local = self.place(ranks).per_node
        flat = of_micro_batches(counts.reshape(-1, len(NAMES)), self.device, self.number, form, local)
        return flat.reshape(*counts.shape[:-1], 4)

    def step(self, ranks: int, micro_batch: int | None = None, backend: str | None = None) -> Step:
        config, backend = self.config, backend or self.backend(ranks)
        loads = loads_of(config, self.subject, self.costs, self.data["train"], ranks,
                         micro_batch or config.per_device_train_batch_size)  # fmt: skip
        return self.of_loads(loads, ranks, backend)

    def of_loads(self, loads: Loads, ranks: int, backend: str) -> Step:
        config, device, place, form = self.config, self.device, self.place(ranks), self.form_of(backend)
        of_ranks = self.seconds(loads.counts, ranks, form).sum(2)  # (steps, ranks, 4)
        slowest = of_ranks.sum(-1).argmax(1)
        compute = of_ranks[np.arange(len(slowest)), slowest].mean(0)
        optimizer = optimizer_seconds(self.parameters, device, backend, ranks, place.per_node)
        hook = config.ddp_comm_hook == "bf16"
        sent = traffic(self.parameters, device, place, backend, form, 2 / 3 * float(compute.sum()), hook)
        busy = float(compute.sum()) + optimizer
        data = device.step / device.share(place.per_node)
        if device.kind == "gpu":
            data = max(0.0, data - busy)  # the host is ahead of the device
        control = control_seconds(ranks, config.logging_steps) if ranks > 1 else 0.0
        parts = [*map(float, compute), optimizer, sent.seconds - sent.hidden, control, data]
        pairs = self.config.train_batch_size or global_batch_size(config, ranks)
        return Step(ranks, sum(parts), dict(zip(PARTS, parts, strict=True)), float(pairs), loads.num_steps,
                    float(loads.tokens.mean()), float(loads.tokens.max(1).mean()), sent.sent, sent.seconds,
                    sent.hidden)  # fmt: skip

    # Memory.

    def num_shapes(self, ranks: int, micro_batch: int) -> int:
        """Numbers of tokens that the first rank computes in the first steps: a padded run meets some of them again."""
        if self.device.shapes == 0:
            return 0
        lengths, found = self.data["train"].tokens.lengths, set()
        for step in islice(sampler_of(self.config, self.data["train"], ranks).steps(), STEPS_OF_SHAPES):
            of_rows = lengths[step.rows]
            part = of_rows[Deal(of_rows, ranks * num_forwards(micro_batch, len(of_rows), ranks)).part(0)]
            longest = int(of_rows.max())
            found.add(features(self.subject, part if len(part) else lengths[:1], micro_batch, True, longest)[1])
        return len(found)

    def memory(self, ranks: int, micro_batch: int, backend: str, exact: bool = True) -> Memory:
        """Of the heaviest rank; `exact`: traced, not computed from coefficients."""
        config, own = self.config, self.parameters
        parts = heaviest_parts(config, self.data["train"], ranks, micro_batch)
        most = min(micro_batch, -(-global_batch_size(config, ranks) // ranks))
        peaks = [float(np.array(features(self.subject, p, most, True)) @ self.costs.training[:, -1]) for p in parts]
        peak = max(peaks)
        if exact:
            peak = self.subject.count(parts[int(np.argmax(peaks))], True, most).peak
        forwards = num_forwards(micro_batch, global_batch_size(config, ranks), ranks)
        fast = self.form_of(backend) in ("captured", "static") and self.subject.unpadded
        # The peak has the gradients that the backward makes; with several forwards those of the one before are there.
        activations = max(0.0, peak - (0.0 if forwards > 1 or backend in ("fsdp", "zero3") else 4.0 * own.trained))
        state = state_bytes(own, backend, ranks, fast and ranks * forwards > 1, fast and config.bf16,
                            config.ddp_comm_hook == "bf16")  # fmt: skip
        data = sum(split.tokens.bytes_per_pair * len(split) for split in self.data.values())
        return memory_of(self.device, state, activations, self.num_shapes(ranks, micro_batch), data)

    def fits(self, memory: Memory, ranks: int) -> bool:
        """On a CPU the ranks of a machine share its memory."""
        together = self.place(ranks).per_node if self.device.kind == "cpu" else 1
        return memory.total * together <= self.device.memory

    def largest(self, ranks: int, backend: str) -> int | None:
        """Pairs of the largest micro-batch that fits, up to all that a rank has of a step; None = not one pair."""
        most = self.config.train_batch_size or self.config.per_device_train_batch_size
        size: int | None = None
        tried = 1
        while True:
            if not self.fits(self.memory(ranks, tried, backend, exact=False), ranks):
                return size
            size = tried
            if (tried * ranks >= most and self.config.train_batch_size) or tried >= 4096:
                return size
            tried *= 2

    # A run.

    def evaluation(self, role: str, ranks: int) -> float:
        """Seconds of one evaluation of a split."""
        if role not in self.data:
            return 0.0
        size = self.config.per_device_eval_batch_size
        of_ranks = evaluation_counts(self.subject, self.costs, self.data[role], size, ranks)
        form = "plain" if self.device.kind == "gpu" else self.form
        return max(float(self.seconds(own, ranks, form).sum()) if len(own) else 0.0 for own in of_ranks)

    def num_evaluations(self, num_steps: int) -> int:
        """Of the dev split, the final one included, which the last step's need not be computed again for."""
        config = self.config
        if "dev" not in self.data:
            return 0
        every = {"steps": config.eval_steps, "epoch": math.ceil(num_steps / config.num_train_epochs)}
        during = 0 if config.eval_strategy == "no" else (num_steps - 1) // max(1, every[config.eval_strategy])
        return int(config.eval_on_start) + during + 1


def planner(config: Config, asked: PlanConfig, label_names: tuple[str, ...], data: dict[str, Split]) -> Planner:
    device, _ = find_device(asked.device)
    file = asked.device if asked.device.endswith((".yaml", ".yml")) else None
    inner = find_link(device.link, file)
    outer = inner if asked.nodes == 1 else find_link("ethernet100")
    if asked.link is not None:
        given = find_link(asked.link, file)
        inner, outer = (given if asked.nodes == 1 else inner), given
    subject = Subject(config, label_names)
    form = form_of(config, device, subject)
    return Planner(config, asked, device, inner, outer, subject, data, label_names, form)


def form_of(config: Config, device: Device, subject: Subject) -> str:
    """As step/form.py decides it."""
    auto = "captured" if device.kind == "gpu" and config.exact_shards is None else "plain"
    form = {"auto": auto}.get(config.step_form, config.step_form)
    plain = config.attn_implementation or config.torch_compile or config.gradient_checkpointing or config.skip_nonfinite
    if form == "captured" and device.kind == "cpu":
        raise UserError("step_form captured needs a CUDA device; say --step_form static, or leave it out")
    return "plain" if plain or not subject.unpadded else form
