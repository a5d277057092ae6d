"""The plan as an object of JSON: what plan.py knows of a run, put together, and what to choose."""

import dataclasses
from typing import Any

from trainer.base.errors import UserError
from trainer.data.sampler import global_batch_size
from trainer.plan.asked import link_names
from trainer.plan.plan import WORLDS, Planner, Step, planner

CLEARLY = 1.05  # times slower that the simpler backend may be


def make(own: Planner) -> dict[str, Any]:
    """The plan, as JSON has it; see docs/plan.md."""
    config, asked, ranks = own.config, own.asked, own.asked.nodes * own.asked.gpus_per_node
    backend, micro = own.backend(ranks), config.per_device_train_batch_size
    memory = own.memory(ranks, micro, backend)
    fits = own.fits(memory, ranks)
    largest = own.largest(ranks, backend, config.train_batch_size)
    step = own.step(ranks)
    scaling = [own.step(world) for world in sorted({*WORLDS, ranks})]
    alone = scaling[0].pairs / scaling[0].seconds
    dev, final = own.evaluation("dev", ranks), own.final(ranks)
    test = sum(own.evaluation(role, ranks) for role in own.tests)
    evaluating = own.num_evaluations(ranks) * dev + test + final
    training = step.num_steps * step.seconds
    # The ranks of a machine share its CPU, and its watts are those of all.
    hours = (training + evaluating) / 3600 * (own.place(ranks).nodes if own.device.kind == "cpu" else ranks)
    return {
        "format": 1,
        "model": {"name": config.model_name_or_path, "parameters": own.parameters.total,
                  "trained": own.parameters.trained, "unpadded": own.subject.unpadded},
        "data": {"pairs": len(own.data["train"]), "mean_tokens": float(own.data["train"].tokens.lengths.mean()),
                 "longest": int(own.data["train"].tokens.lengths.max())},
        "run": {"nodes": asked.nodes, "ranks": ranks, "device": own.device.title, "backend": backend,
                "step_form": own.form_of(backend), "micro_batch": min(micro, -(-step.batch // ranks)),
                "batch": step.batch, "steps": step.num_steps, "links": link_names(asked, own.device)},
        "memory": dataclasses.asdict(memory) | {"limit": own.device.memory, "fits": fits,
                                                "largest_micro_batch": largest},
        "step": {"seconds": step.seconds, "parts": step.parts, "flops": flops(own, ranks),
                 "sent_bytes": step.sent, "sent_seconds": step.traffic, "hidden_seconds": step.hidden},
        "seconds": {"training": training, "evaluation": evaluating, "one_dev": dev, "test": test, "fp32": final,
                    "total": training + evaluating},
        "energy_kwh": own.device.watts * hours / 1000,
        "device_hours": hours,
        "cost": None if asked.price is None else asked.price * hours,
        "scaling": [of_world(world, alone) | {"fits": fits_on(own, world.ranks)} for world in scaling],
        "choice": choice(own, ranks, backend, fits),
    }  # fmt: skip


def flops(own: Planner, ranks: int) -> float:
    """Of products, a mean step, all ranks together."""
    loads = own.loads(ranks)
    return float(loads.mean(loads.counts[..., :2].sum((1, 2, 3))))


def fits_on(own: Planner, ranks: int) -> bool:
    micro, backend = own.config.per_device_train_batch_size, own.backend(ranks)
    return own.fits(own.memory(ranks, micro, backend, exact=False), ranks)


def of_world(step: Step, alone: float) -> dict[str, Any]:
    speed = step.pairs / step.seconds
    return {"ranks": step.ranks, "step_seconds": step.seconds, "pairs_per_second": speed,
            "efficiency": speed / (step.ranks * alone), "batch": step.batch, "steps": step.num_steps,
            "mean_tokens": step.mean_tokens, "slowest_tokens": step.slowest_tokens,
            "sent_bytes": step.sent, "exposed_seconds": step.traffic - step.hidden}  # fmt: skip


def choice(own: Planner, ranks: int, backend: str, fits: bool) -> dict[str, Any]:
    """The fastest backend and micro-batch that fit, with the reason; where none does, what would fit.

    Of the same run: its options keep the pairs of a step.
    """
    found, batch = [], global_batch_size(own.config, ranks)
    for name in ["single"] if ranks == 1 else ["ddp", "fsdp", "zero2"]:
        size = own.largest(ranks, name, batch)
        if size is not None:
            size = min(size, own.config.train_batch_size or own.config.per_device_train_batch_size)
            found.append((own.step(ranks, size, name).seconds, name, size))
    would = [] if fits else would_fit(own, ranks, batch)
    if not found:
        return {"backend": None, "micro_batch": None, "options": None, "reason": "nothing fits", "would_fit": would}
    # The first ones are the simpler ones: another must be clearly faster.
    seconds, name, size = next(one for one in found if one[0] <= CLEARLY * min(found)[0])
    others = ", ".join(f"{other} {slower:.4g}" for slower, other, _ in sorted(found) if other != name)
    reason = f"{name} takes {seconds:.4g} s a step" + (f" ({others})" if others else "")
    if seconds > min(found)[0]:
        reason += f", the simplest of those within {100 * CLEARLY - 100:.0f} % of the fastest"
    reason += f"; forwards of {size} pair(s) fit into {own.device.memory / 1e9:.1f} GB"
    return {"backend": name, "micro_batch": size, "options": options(name, batch, size), "reason": reason,
            "would_fit": would}  # fmt: skip


def options(backend: str | None, batch: int, micro_batch: int) -> str:
    """Of the command line, for a step of `batch` pairs over all ranks."""
    wired = "" if backend is None else f"--backend {backend} "
    if backend is not None and backend.startswith("zero"):
        wired = f"--backend deepspeed --deepspeed {backend} "
    return f"{wired}--train_batch_size {batch} --per_device_train_batch_size {micro_batch}"


def would_fit(own: Planner, ranks: int, batch: int) -> list[str]:
    """Options with which the same run fits, the smallest change first."""
    config, found = own.config, []
    if (size := own.largest(ranks, own.backend(ranks), batch)) is not None:
        found.append(options(None, batch, size))
    if not config.gradient_checkpointing:
        less = dataclasses.replace(config, gradient_checkpointing=True)
        try:
            other = planner(less, own.asked, own.label_names, own.data)
            other.settle()
            micro = config.per_device_train_batch_size
            if other.fits(other.memory(ranks, micro, other.backend(ranks), exact=False), ranks):
                found.append("--gradient_checkpointing true")
            other.close()
        except UserError:  # a model that has none
            pass
    for world in (w for w in WORLDS if w >= max(2, ranks)):
        if (size := own.largest(world, "fsdp", batch)) is not None:
            nodes, each = own.place(world).nodes, own.place(world).per_node
            found.append(f"{options('fsdp', batch, size)} on {nodes} x {each} ranks")
            break
    return found or ["a device with more memory, or a lower --max_length"]
