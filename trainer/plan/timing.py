"""Seconds of a step from what is counted and what a device and a link can do.

- Products: FLOPs over the rate that is reached, or bytes over the bandwidth, whichever is more (the roofline model of
  Williams et al. 2009). Other operations: bytes over the bandwidth. On a CPU and in a CUDA graph each operation has its
  least time on top; the host of a plain step on a GPU sends operations while others run, so the slower side counts.
- AdamW reads weight, gradient and two moments and writes three of them, and the norm reads the gradient: 32 bytes.
- All-reduce of S bytes over P ranks: 2 (P - 1) / P * S over the slowest link's bandwidth (Patarasuk & Yuan 2009), and
  2 (P - 1) messages' latency with gloo's ring, 2 log2 P with NCCL's trees. Gather and scatter are half of one each.
- DDP sends buckets while the backward goes on: hidden is what fits beside it, but not the last bucket, the embeddings'.
  On a CPU ranks of one machine compute their own transport, so only a network's waiting is hidden.
"""

import math
from dataclasses import dataclass

import numpy as np

from trainer.plan.devices import Device, Link
from trainer.plan.trace import Parameters

ADAMW = 32  # bytes a trained parameter and step
BUCKET = 25 * 2**20  # bytes, of torch's DistributedDataParallel
# Times that a rank sends its (P - 1) / P of S bytes of fp32 gradients or weights; counted by benchmarks.backends on
# gloo, where fsdp's reduce-scatter is an all-reduce.
TRAFFIC = {"single": 0.0, "ddp": 2.0, "zero0": 2.0, "zero1": 3.0, "zero2": 3.0, "zero3": 3.0, "fsdp": 3.0}
GLOO_FSDP = 4.0
MESSAGE = 4e-5  # seconds a hop of control traffic: gloo over TCP, by estimate


@dataclass(frozen=True)
class Place:
    """Where ranks are: `nodes` with `per_node` ranks each, and the links inside a node and between nodes."""

    nodes: int
    per_node: int
    inner: Link
    outer: Link

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

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
    linear, attention, read, moved, operations, _ = np.maximum(counts, 0).T
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
    own: Parameters, device: Device, place: Place, backend: str, form: str, backward: float, bf16_hook: bool
) -> Traffic:
    """`backward`: seconds of the slowest rank's."""
    ranks = place.ranks
    if ranks == 1:
        return Traffic(0.0, 0.0, 0.0)
    times = GLOO_FSDP if backend == "fsdp" and device.kind == "cpu" else TRAFFIC[backend]
    width = 2 if bf16_hook else 4
    size = width * own.trained + (0 if backend not in ("fsdp", "zero3") else 4 * (own.held - own.trained) * 2 / times)
    sent = times * (ranks - 1) / ranks * size
    hops = 2 * (ranks - 1) if device.kind == "cpu" else 2 * math.ceil(math.log2(ranks))
    messages = max(1, math.ceil(size / BUCKET))
    seconds = sent / place.bandwidth + hops * place.latency * messages
    if form in ("captured", "static") or (device.kind == "cpu" and place.nodes == 1):
        return Traffic(sent, seconds, 0.0)
    tail = (
        min(1.0, width * max(own.tail, 0) / size + min(BUCKET, size) / size / 2) if backend in ("ddp", "zero0") else 0.2
    )
    return Traffic(sent, seconds, min(seconds * (1 - tail), backward))


def control_seconds(ranks: int, logging_steps: int) -> float:
    """A log line waits for two sums, each a ring's; no step waits for a vote to stop: see run/preempt.py."""
    return 2 * 2 * (ranks - 1) * MESSAGE / logging_steps
