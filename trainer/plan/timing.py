"""Seconds of a step from what is counted and what a device and a link can do.

- Products: FLOPs over the rate that is reached, or bytes over the bandwidth, whichever is more (the roofline model of
  Williams et al. 2009). Other operations: bytes over the bandwidth. On a CPU and in a CUDA graph each operation has its
  least time on top; the host of a plain step on a GPU sends operations while others run, so the slower side counts.
- AdamW reads weight, gradient and two moments and writes three of them, and the norm reads the gradient: 32 bytes.
- All-reduce of S bytes over P ranks: 2 (P - 1) / P * S over the slowest link's bandwidth (Patarasuk & Yuan 2009), and
  2 (P - 1) messages' latency with gloo's ring, 2 log2 P with NCCL's trees. Gather and scatter are half of one each.
- DDP sends buckets while the last forward's backward goes on: hidden is what fits beside it, but not the last bucket,
  the embeddings'. FSDP and ZeRO-3 send weights beside every forward and backward.
  On a CPU ranks of one machine compute their own transport, so only a network's waiting is hidden.
"""

import math
from dataclasses import dataclass

import numpy as np

from trainer.plan.devices import Device, Link
from trainer.plan.trace import Parameters

ADAMW = 32  # bytes a trained parameter and step
DDP_BUCKET = 25 * 2**20  # bytes, of torch's DistributedDataParallel
# Times that a rank sends its (P - 1) / P of the gradients' and of the weights' bytes in a step of one forward; counted
# by benchmarks.backends on gloo, where fsdp's reduce-scatter is an all-reduce.
GRADIENTS = {"ddp": 2.0, "zero0": 2.0, "zero1": 2.0, "zero2": 2.0, "zero3": 1.0, "fsdp": 1.0}
WEIGHTS = {"zero1": 1.0, "zero2": 1.0, "zero3": 2.0, "fsdp": 2.0}
EACH_FORWARD = ("zero2", "zero3")  # send gradients after every backward: DeepSpeed's stages that part them
MESSAGE = 4e-5  # seconds a hop of control traffic: gloo over TCP, by estimate


@dataclass(frozen=True)
class Place:
    """Where ranks are: `per_node` on each node but for the last one, and the links inside a node and between nodes."""

    ranks: int
    per_node: int
    inner: Link
    outer: Link

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a ring over all ranks: each node's link carries the whole ring once."""
        links = [link for link, used in ((self.inner, self.per_node > 1), (self.outer, self.nodes > 1)) if used]
        return min((link.bandwidth * link.reached for link in links), default=math.inf)

    @property
    def latency(self) -> float:
        return (self.outer if self.nodes > 1 else self.inner).latency


def of_micro_batches(counts: np.ndarray, device: Device, number: str, form: str, local_ranks: int) -> np.ndarray:
    """(n, 4) seconds of linear layers, attention, other operations, launches; `counts` (n, costs.NAMES).

    `number`: bf16, tf32 or fp32.
    """
    linear, attention, read, moved, operations, *_ = np.maximum(counts, 0).T
    peak, bandwidth = getattr(device, f"linear_{number}"), device.bandwidth * device.bandwidth_reached
    share = device.share(local_ranks)
    # A CPU's caches hold weights and tokens: what was measured there is in the rate of its products.
    loads = read / bandwidth if device.kind == "gpu" else 0.0
    seconds = np.stack(
        [
            np.maximum(linear / (peak * device.linear_reached), loads),
            attention / (peak * device.attention_reached),
            moved / bandwidth,
        ]
    )
    if device.kind == "gpu" and form != "captured":
        launches = np.maximum(0, operations * device.operation - seconds.sum(0))
    else:
        launches = operations * (device.replayed if form == "captured" else device.operation)
    return np.concatenate([seconds, launches[None]]).T / share


def optimizer_seconds(own: Parameters, device: Device, backend: str, ranks: int, local_ranks: int) -> float:
    trained = own.trained / (ranks if backend in ("fsdp", "zero1", "zero2", "zero3") else 1)
    return ADAMW * trained / (device.bandwidth * device.optimizer_reached) / device.share(local_ranks)


@dataclass(frozen=True)
class Traffic:
    """Of a step: bytes that a rank sends, seconds they take, and how many of them the backward hides."""

    sent: float
    seconds: float
    hidden: float


def traffic(
    own: Parameters, device: Device, place: Place, backend: str, form: str, compute: float, forwards: int, hook: bool
) -> Traffic:
    """`compute`: seconds of the slowest rank's `forwards` and their backwards. `hook`: whether gradients are bf16."""
    ranks = place.ranks
    if ranks == 1:
        return Traffic(0.0, 0.0, 0.0)
    whole = backend in ("fsdp", "zero3")  # no rank keeps all weights
    width, all_reduced = (2 if hook else 4), backend == "fsdp" and device.kind == "cpu"
    gradients = width * own.trained * (2.0 if all_reduced else GRADIENTS[backend])
    weights = 4 * (own.held if whole else own.trained) * WEIGHTS.get(backend, 0.0)
    total = gradients * (forwards if backend in EACH_FORWARD else 1) + weights * (forwards if whole else 1)
    sent, size = (ranks - 1) / ranks * total, width * own.trained
    hops = 2 * (ranks - 1) if device.kind == "cpu" else 2 * math.ceil(math.log2(ranks))
    messages = max(1, math.ceil(size / DDP_BUCKET))
    seconds = sent / place.bandwidth + hops * place.latency * messages
    if form in ("captured", "static") or (device.kind == "cpu" and place.nodes == 1):
        return Traffic(sent, seconds, 0.0)
    beside = 2 / 3 * compute / (1 if whole or backend in EACH_FORWARD else forwards)
    late = min(1.0, own.tail * width / size + min(DDP_BUCKET, size) / size / 2) if backend in ("ddp", "zero0") else 0.2
    return Traffic(sent, seconds, min(seconds * (1 - late), beside))


def control_seconds(ranks: int, logging_steps: int) -> float:
    """A log line waits for two sums, each a ring's; no step waits for a vote to stop: see run/preempt.py."""
    return 2 * 2 * (ranks - 1) * MESSAGE / logging_steps
