"""`--measure`: what this machine's CPU reaches on the run's own model, as a device file.

The run's own step is taken on some of its batches, by one rank and, where several are asked for, by all of them at
once: forwards and backwards of several sizes without the exchange of gradients, the optimizer, and all-reduces alone.
Of each the operations are counted (trace.py), and the device's rates are those that explain the seconds best: least
squares of relative errors without negative rates (Lawson & Hanson 1974). Rates are of this model's shapes, the user's
threads and number format; another model is measured anew.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer import ranks
from trainer.base.errors import TrainingFailed
from trainer.base.files import write_text
from trainer.base.log import log
from trainer.base.yaml_files import dump
from trainer.config import Config, read_yaml
from trainer.loop import Trainer
from trainer.model.precision import products
from trainer.plan.costs import NAMES
from trainer.plan.memory import activation_bytes, state_bytes
from trainer.plan.timing import ADAMW
from trainer.plan.trace import Subject
from trainer.run.versions import ROOT
from trainer.train import prepare

PAIRS = 4_000  # of the training data that are read
SIZES = (1.0, 0.5, 0.25, 0.1)  # of a step's pairs: micro-batches that are timed
GROWING = (0.25, 0.5, 1.0)  # parts of steps, whose peaks are looked at
STEPS = 6  # of each, and the heaviest: about what a heap holds after 60 steps of a run
SLACK, MOST_SLACK = 2.0, 4.0  # where it cannot be measured, about the CPU's of devices.yaml; and what it is at most
ATTENTION = 0.1  # of the rate of linear layers: by estimate; on AllNLI it is 1 % of the FLOPs
BUDGET = 12.0  # seconds of timed micro-batches
PEAK_SIZES = (1 << 20, 1 << 24, 1 << 26)  # bytes of all-reduces


def measure(config: Config, path: Path, num_ranks: int) -> None:
    """Writes the device file `path`. Raises TrainingFailed where the ranks fail."""
    found = {count: run_ranks(config, count, num_ranks) for count in sorted({1, num_ranks})}
    write_text(path, dump(device_file(found, config)))
    log.info(f"measured on {', '.join(map(str, found))} rank(s): {path}")


def run_ranks(config: Config, count: int, of_machine: int) -> dict[str, Any]:
    """What `count` ranks measure at the same time, each with the threads of one of `of_machine`."""
    front_door = str(ROOT / "crossrank.py")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // of_machine))
    with tempfile.TemporaryDirectory() as folder:
        fields = {own.name: getattr(config, own.name) for own in dataclasses.fields(config)}
        quiet = {"output_dir": f"{folder}/run", "track_emissions": False, "write_report": False, "report_to": [],
                 "eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": None,
                 "early_stopping_patience": None,
                 "validation_file": None, "test_file": None, "save_strategy": "no", "max_steps": 1000,
                 "max_train_samples": min(PAIRS, config.max_train_samples or PAIRS)}  # fmt: skip
        write_text(Path(folder) / "config.yaml", dump(fields | quiet))
        command = [sys.executable, front_door, "agent", "--standalone", f"--nproc-per-node={count}", front_door,
                   "gauge", f"{folder}/config.yaml", f"{folder}/found.json"]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}  # what is measured is the CPU
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if line.startswith("crossrank:")]
            raise TrainingFailed(f"{count} rank(s) could not be measured: {(lines or ['no answer'])[0]}")
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return found | {"threads": int(threads)}


def main(argv: list[str]) -> int:
    """One rank; rank 0 writes what was measured."""
    config = Config(**read_yaml(Path(argv[0])))
    world = ranks.start(600)
    trainer = prepare(config, world)
    trainer.model.train()
    steps = list(islice(trainer.sampler.steps(), STEPS))
    # The heaviest ones of all are what a plan is asked about.
    peaks, heaviest = grow(trainer, [*steps, *trainer.sampler.extremes(trainer.data["train"].tokens.lengths)])
    wholes = [trainer.plain.micro_batches(step)[0] for step in steps[:2]]
    batches = [rows[: max(1, int(len(rows) * part))] for rows in wholes for part in SIZES]
    timed = time_micro_batches(trainer, steps[0], batches)
    found = {
        "seconds": timed,
        "products": time_products(trainer, int(trainer.data["train"].tokens.lengths[batches[0]].sum())),
        "optimizer": time_optimizer(trainer),
        "all_reduce": time_all_reduce(world.size),
        "peaks": peaks,
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    everyone = world.gather(np.frombuffer(json.dumps(found).encode() + b"\n", np.uint8))
    if everyone is not None:
        lengths = trainer.data["train"].tokens.lengths
        own = [json.loads(line) for line in everyone.tobytes().splitlines()]
        counted = count(config, trainer, [lengths[rows] for rows in batches], [lengths[rows] for rows in heaviest])
        write_text(Path(argv[1]), json.dumps({"ranks": own, **counted}))
    ranks.stop()
    return 0


def grow(trainer: Trainer, steps: list[Any]) -> tuple[list[int], list[np.ndarray]]:
    """Takes parts of the same steps, smaller ones first. Returns the peak of resident memory (bytes) after those of
    each size, and the rows of the heaviest micro-batch until then."""
    lengths, layout = trainer.data["train"].tokens.lengths, trainer.model.layout
    peaks, heaviest, met = [], [], []

    def num_tokens(rows: np.ndarray) -> int:
        own = lengths[rows]
        return int(own.sum()) if layout is not None and layout.unpad else len(own) * int(own.max(initial=0))

    for part in GROWING:
        for step in steps:
            micro_batches = [rows[: max(1, int(len(rows) * part))] for rows in trainer.plain.micro_batches(step)]
            for index, rows in enumerate(micro_batches, 1):
                trainer.plain.backward(step, rows, last=index == len(micro_batches))
            trainer.backend.step(1e-5, trainer.config.max_grad_norm)
            met += micro_batches
        peaks.append(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
        heaviest.append(max(met, key=num_tokens))
    return peaks, heaviest


def time_micro_batches(trainer: Trainer, step: Any, batches: list[np.ndarray]) -> list[float]:
    """Medians of forward and backward of each, all ranks at once, without the exchange of gradients."""
    seconds: list[list[float]] = [[] for _ in batches]
    started = time.perf_counter()
    for _ in range(40):
        for own, rows in zip(seconds, batches, strict=True):
            trainer.world.barrier()
            begun = time.perf_counter()
            trainer.plain.backward(step, rows, last=False)
            own.append(time.perf_counter() - begun)
        # Every rank stops after the same round.
        if len(seconds[0]) >= 3 and not trainer.world.all(time.perf_counter() - started < BUDGET):
            break
    trainer.model.zero_grad()
    return [float(np.median(own)) for own in seconds]


def time_products(trainer: Trainer, tokens: int) -> float:
    """FLOP/s of the model's linear layers by themselves, on as many tokens as a step has, all ranks at once."""
    number = torch.bfloat16 if trainer.config.bf16 else torch.float32
    flops = seconds = 0.0
    layers = [module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)]
    shapes = [layer.weight.shape for layer in layers]
    with products(trainer.world.device, trainer.config.bf16):
        for shape in sorted(set(shapes), key=shapes.index):
            x, weight = torch.randn(tokens, shape[1]).to(number), torch.randn(*shape).to(number)
            times = []
            for _ in range(8):
                trainer.world.barrier()
                begun = time.perf_counter()
                x @ weight.T
                times.append(time.perf_counter() - begun)
            flops += shapes.count(shape) * 2 * tokens * shape.numel()
            seconds += shapes.count(shape) * float(np.median(times))
    return flops / seconds


def time_optimizer(trainer: Trainer) -> float:
    seconds = []
    for _ in range(6):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-6)
        trainer.world.barrier()
        begun = time.perf_counter()
        trainer.backend.step(1e-7, 1.0)
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds[1:]))


def time_all_reduce(size: int) -> list[float]:
    """Of PEAK_SIZES bytes; [] on one rank."""
    found = []
    for number in PEAK_SIZES if size > 1 else ():
        tensor, seconds = torch.zeros(number // 4), []
        for _ in range(5):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(tensor)
            seconds.append(time.perf_counter() - begun)
        found.append(float(np.median(seconds[1:])))
    return found


def count(config: Config, trainer: Trainer, timed: list[np.ndarray], heaviest: list[np.ndarray]) -> dict[str, Any]:
    """What trace.py says of the lengths of micro-batches: of those that were timed, and bytes of the others and of the
    state."""
    subject = Subject(config, trainer.data["train"].pairs.label_names)
    subject.settle(trainer.data["train"].tokens, False, True)
    own, backend = subject.parameters, "ddp" if trainer.backend.name == "deepspeed" else trainer.backend.name
    forwards = max(1, len(trainer.plain.micro_batches(trainer.sampler.at(0))))
    counts, peaks = ([subject.count(lengths) for lengths in group] for group in (timed, heaviest))
    return {"counts": [[getattr(of_one, name) for name in NAMES] for of_one in counts],
            "state": state_bytes(own, backend, trainer.world.size, False, False, False),
            "activations": [activation_bytes(c.peak, c.bare, own, backend, forwards) for c in peaks]}  # fmt: skip


def measured_on(config: Config) -> str:
    """What a measurement holds for."""
    number, form = "bf16" if config.bf16 else "fp32", "unpadded" if config.unpad else "padded"
    return f"{config.model_name_or_path}, {number}, {form}"


def device_file(found: dict[int, dict[str, Any]], config: Config) -> dict[str, Any]:
    """The file's content."""
    alone, most = found[1], max(found)
    rates, first = fitted(alone), alone["ranks"][0]
    optimizer = ADAMW * first["trained"] / first["optimizer"]
    peak, bandwidth = max(rates[0], rates[1]), max(rates[2], optimizer)
    peaks = dict.fromkeys(("linear_bf16", "linear_tf32", "linear_fp32"), peak)
    process, slack = kept(alone)
    sharing = ["1=1"]
    sharing += [f"{count}={min(1.0, shared(found[count], rates)):.4f}" for count in sorted(found)[1:]]
    number = "bf16" if config.bf16 else "fp32"
    source = f"measured here: {config.model_name_or_path}, {number}, {alone['threads']} thread(s) a rank"
    values = peaks | {
        "linear_reached": rates[0] / peak, "attention_reached": rates[1] / peak,
        "bandwidth": bandwidth, "bandwidth_reached": rates[2] / bandwidth, "optimizer_reached": optimizer / bandwidth,
        "operation": rates[3], "replayed": rates[3], "step": 0.0,
        "process": process, "slack": slack, "watts": 30.0,
        "memory": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }  # fmt: skip
    if most > 1:
        values["process_of_several"], values["slack_of_several"] = kept(found[most])
    device = {name: {"value": float(value), "source": source} for name, value in values.items()}
    device["sharing"] = {"value": sharing, "source": source}
    device["watts"]["source"] = "estimate, not measured"
    words = {"title": f"this machine, {number}", "kind": "cpu", "link": "loopback", "measured_on": measured_on(config)}
    links = {"loopback": link_of(found[most], most, source)} if most > 1 else {}
    return {"devices": {"measured": words | device}, "links": links}


def kept(found: dict[str, Any]) -> tuple[float, float]:
    """Bytes that a rank has without its model, and the factor on activations, that explain the peaks best."""
    rest = np.max([own["peaks"] for own in found["ranks"]], axis=0) - found["state"]
    activations = np.array(found["activations"], dtype=np.float64)
    slack = SLACK
    # Less tells nothing: where gradients are most of the peak, or there is one pair.
    if np.ptp(activations) > 0.05 * rest.mean():
        slack = float(np.clip(np.polyfit(activations, rest, 1)[0], 1.0, MOST_SLACK))
    return max(0.0, float(np.mean(rest - slack * activations))), slack


def fitted(found: dict[str, Any]) -> np.ndarray:
    """Rates of (linear FLOPs, attention FLOPs, bytes moved), and seconds an operation.

    That of linear layers is measured by itself, and attention takes a part of it, ATTENTION: in one model all of them
    grow together, and seconds alone would not tell them apart. The other two explain what is left.
    """
    from scipy.optimize import nnls

    counts = np.array(found["counts"], dtype=np.float64)
    seconds = np.mean([own["seconds"] for own in found["ranks"]], axis=0)
    linear = float(np.mean([own["products"] for own in found["ranks"]]))
    # No rate of products explains more than all seconds; a busy machine could say so.
    linear = max(linear, float((counts[:, 0] / (0.95 * seconds)).max()))
    left = seconds - counts[:, 0] / linear - counts[:, 1] / (ATTENTION * linear)
    columns = counts[:, 3:5]
    scale = columns.max(0)
    coefficients, _ = nnls(columns / scale / seconds[:, None], np.maximum(left, 0.0) / seconds)
    coefficients = np.maximum(coefficients / scale, 1e-15)
    return np.array([linear, ATTENTION * linear, 1 / coefficients[0], coefficients[1]])


def explained(counts: Any, rates: np.ndarray) -> np.ndarray:
    """Seconds (n,) of counts (n, NAMES) by fitted rates."""
    linear, attention, _, moved, operations, *_ = np.array(counts, dtype=np.float64).T
    return linear / rates[0] + attention / rates[1] + moved / rates[2] + operations * rates[3]  # type: ignore[no-any-return]


def shared(found: dict[str, Any], rates: np.ndarray) -> float:
    """Speed of each rank relative to one that computes alone."""
    seconds = np.mean([own["seconds"] for own in found["ranks"]], axis=0)
    return float(np.median(explained(found["counts"], rates) / seconds))


def link_of(found: dict[str, Any], num_ranks: int, source: str) -> dict[str, Any]:
    """Bandwidth by the largest all-reduce, latency by what the smallest takes beyond that."""
    seconds = np.mean([own["all_reduce"] for own in found["ranks"]], axis=0)
    times = 2 * (num_ranks - 1) / num_ranks
    rate = times * (PEAK_SIZES[-1] - PEAK_SIZES[0]) / max(1e-9, seconds[-1] - seconds[0])
    latency = max(0.0, seconds[0] - times * PEAK_SIZES[0] / rate) / (2 * (num_ranks - 1))
    values = {"bandwidth": float(rate), "reached": 1.0, "latency": float(latency)}
    return {name: {"value": value, "source": source} for name, value in values.items()}
