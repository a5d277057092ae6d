"""The plan as an object of JSON: what plan.py knows of a run, put together, and what to choose."""

import dataclasses
from typing import Any

from trainer.base.errors import UserError
from trainer.plan.loads import loads_of
from trainer.plan.plan import WORLDS, Planner, Step, planner

CLEARLY = 1.05  # times slower that the simpler backend may be


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
    # The first ones are the simpler ones: another must be clearly faster.
    seconds, name, size = next(one for one in found if one[0] <= CLEARLY * min(found)[0])
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
