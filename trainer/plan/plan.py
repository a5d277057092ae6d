"""A run before it is queued: memory, time, traffic, scaling, energy; and what to choose.

`make` reads the data as a run does, counts its model's step (trace.py), deals its batches (loads.py), and puts a
device's and a link's numbers to it (timing.py, memory.py). Nothing is computed on the device that is planned for.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trainer.base.errors import UserError
from trainer.base.fields import Fields, option
from trainer.config import Config
from trainer.data.sampler import global_batch_size, num_forwards
from trainer.data.tokens import Split
from trainer.plan.costs import NAMES, Costs, features
from trainer.plan.devices import Device, Link, find_device, find_link
from trainer.plan.loads import Loads, evaluation_counts, heaviest_parts, loads_of, sampler_of
from trainer.plan.memory import Memory, memory_of, state_bytes
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
        control = control_seconds(ranks, busy, config.logging_steps) if ranks > 1 else 0.0
        parts = [*map(float, compute), optimizer, sent.seconds - sent.hidden, control, data]
        pairs = self.config.train_batch_size or global_batch_size(config, ranks)
        return Step(ranks, sum(parts), dict(zip(PARTS, parts, strict=True)), float(pairs), loads.num_steps,
                    float(loads.tokens.mean()), float(loads.tokens.max(1).mean()), sent.sent, sent.seconds,
                    sent.hidden)  # fmt: skip

    def num_steps(self, ranks: int) -> int:
        return sampler_of(self.config, self.data["train"], ranks).num_steps

    # Memory.

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
        return memory_of(self.device, state, activations, self.num_steps(ranks), data)

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


def make(own: Planner) -> dict[str, Any]:
    """The plan, as JSON has it; see docs/plan.md."""
    config, asked, ranks = own.config, own.asked, own.asked.nodes * own.asked.gpus_per_node
    backend, micro = own.backend(ranks), config.per_device_train_batch_size
    memory = own.memory(ranks, micro, backend)
    fits = own.fits(memory, ranks)
    largest = own.largest(ranks, backend)
    step = own.step(ranks)
    scaling = [own.step(world) for world in sorted({*WORLDS, ranks})]
    alone = scaling[0].pairs / scaling[0].seconds
    dev, test = own.evaluation("dev", ranks), own.evaluation("test", ranks)
    evaluating = own.num_evaluations(step.num_steps) * dev + test
    training = step.num_steps * step.seconds
    hours = (training + evaluating) / 3600 * ranks
    return {
        "format": 1,
        "model": {"name": config.model_name_or_path, "parameters": own.parameters.total,
                  "trained": own.parameters.trained, "unpadded": own.subject.unpadded},
        "data": {"pairs": len(own.data["train"]), "mean_tokens": float(own.data["train"].tokens.lengths.mean()),
                 "longest": int(own.data["train"].tokens.lengths.max())},
        "run": {"nodes": asked.nodes, "ranks": ranks, "device": own.device.title, "backend": backend,
                "step_form": own.form_of(backend), "micro_batch": min(micro, -(-int(step.pairs) // ranks)),
                "batch": int(step.pairs), "steps": step.num_steps},
        "memory": dataclasses.asdict(memory) | {"limit": own.device.memory, "fits": fits,
                                                "largest_micro_batch": largest},
        "step": {"seconds": step.seconds, "parts": step.parts, "flops": flops(own, step, ranks),
                 "sent_bytes": step.sent, "sent_seconds": step.traffic, "hidden_seconds": step.hidden},
        "seconds": {"training": training, "evaluation": evaluating, "one_dev": dev, "test": test,
                    "total": training + evaluating},
        "energy_kwh": own.device.watts * hours / 1000,
        "device_hours": hours,
        "cost": None if asked.price is None else asked.price * hours,
        "scaling": [of_world(world, alone) for world in scaling],
        "choice": choice(own, ranks, backend, fits),
    }  # fmt: skip


def flops(own: Planner, step: Step, ranks: int) -> float:
    """Of products, a mean step, all ranks together."""
    loads = loads_of(own.config, own.subject, own.costs, own.data["train"], ranks,
                     own.config.per_device_train_batch_size)  # fmt: skip
    return float(loads.counts[..., :2].sum((1, 2, 3)).mean())


def of_world(step: Step, alone: float) -> dict[str, Any]:
    speed = step.pairs / step.seconds
    return {"ranks": step.ranks, "step_seconds": step.seconds, "pairs_per_second": speed,
            "efficiency": speed / (step.ranks * alone), "batch": int(step.pairs), "steps": step.num_steps,
            "mean_tokens": step.mean_tokens, "slowest_tokens": step.slowest_tokens,
            "sent_bytes": step.sent, "exposed_seconds": step.traffic - step.hidden}  # fmt: skip


def choice(own: Planner, ranks: int, backend: str, fits: bool) -> dict[str, Any]:
    """The fastest backend and micro-batch that fit, with the reason; where none does, what would fit."""
    found = []
    for name in ["single"] if ranks == 1 else ["ddp", "fsdp", "zero2"]:
        size = own.largest(ranks, name)
        if size is not None:
            size = min(size, own.config.train_batch_size or own.config.per_device_train_batch_size)
            found.append((own.step(ranks, size, name).seconds, name, size))
    if not found:
        return {"backend": None, "micro_batch": None, "reason": "nothing fits", "would_fit": would_fit(own, ranks)}
    seconds, name, size = min(found)
    others = ", ".join(f"{other} {slower:.4g}" for slower, other, _ in sorted(found) if other != name)
    reason = f"{name} takes {seconds:.4g} s a step" + (f" ({others})" if others else "")
    reason += f"; {size} pairs a forward fit into {own.device.memory / 1e9:.1f} GB"
    return {"backend": name, "micro_batch": size, "reason": reason,
            "would_fit": [] if fits else would_fit(own, ranks)}  # fmt: skip


def would_fit(own: Planner, ranks: int) -> list[str]:
    """Changes after which the run fits, the smallest first."""
    config, found = own.config, []
    if (size := own.largest(ranks, own.backend(ranks))) is not None:
        found.append(f"--per_device_train_batch_size {size}")
    if not config.gradient_checkpointing:
        less = dataclasses.replace(config, gradient_checkpointing=True)
        try:
            other = planner(less, own.asked, own.label_names, own.data)
            other.settle()
            micro = config.per_device_train_batch_size
            if other.fits(other.memory(ranks, micro, other.backend(ranks), exact=False), ranks):
                found.append("--gradient_checkpointing true")
        except UserError:  # a model that has none
            pass
    for world in (w for w in WORLDS if w >= max(2, ranks)):
        if (size := own.largest(world, "fsdp")) is not None:
            found.append(f"--backend fsdp --per_device_train_batch_size {size} on {world} ranks")
            break
    return found or ["a device with more memory, or a lower --max_length"]
