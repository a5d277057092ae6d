"""Bytes of a rank: its process, the state of training, and what the heaviest micro-batch of the run keeps.

Weights, gradients and AdamW's two moments are fp32: 16 bytes a trained parameter and 4 a frozen one (Rajbhandari et al.
2020 for what each stage of ZeRO shards). Beyond the formulas DeepSpeed keeps buckets, in bytes a parameter of the first
50 M, as measured by benchmarks.backends.
"""

from dataclasses import dataclass

from trainer.plan.devices import Device
from trainer.plan.trace import Parameters

ZERO_BUCKET = 50e6  # elements, of ds_configs/
BUCKETS = {"zero1": 2.2, "zero2": 2.2, "zero3": 10.9}
SHARDS_WEIGHTS = ("fsdp", "zero3")
SHARDS_GRADIENTS = ("fsdp", "zero3")  # zero2 frees others' gradients only after its bucket: measured as zero1
SHARDS_MOMENTS = ("fsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        process: what is there without the model, kernels among it.
        state: weights, gradients, moments, buffers of the backend.
        activations: of the heaviest micro-batch, beyond the gradients in `state`.
        slack: what the allocator holds besides.
        total: all of them.
    """

    process: float
    state: float
    activations: float
    slack: float
    total: float


def state_bytes(own: Parameters, backend: str, ranks: int, sums: bool, copies: bool, bf16_hook: bool) -> float:
    """Weights, gradients, moments and what the backend or a static step keeps beside them.

    `sums`: whether a static step adds gradients up in a tensor of its own; `copies`: whether it keeps weights in bf16.
    """
    weights = 4.0 * own.held / (ranks if backend in SHARDS_WEIGHTS else 1)
    gathered = 8.0 * own.largest_layer if backend in SHARDS_WEIGHTS and ranks > 1 else 0.0  # one in use, one prefetched
    gradients = 4.0 * own.trained / (ranks if backend in SHARDS_GRADIENTS else 1)
    moments = 8.0 * own.trained / (ranks if backend in SHARDS_MOMENTS else 1)
    buckets = BUCKETS.get(backend, 0.0) * min(own.trained, ZERO_BUCKET)
    more = 4.0 * own.trained * sums + 2.0 * (own.held - own.tail) * copies + 2.0 * own.trained * bf16_hook
    return weights + gathered + gradients + moments + buckets + more + own.buffers


def activation_bytes(peak: float, bare: float, own: Parameters, backend: str, forwards: int) -> float:
    """What a backward has beyond the state: `peak` and `bare` as in counter.Counts.

    Alone and with one forward, gradients come while activations go. Otherwise they have their place all the time, and
    where they are sharded those of one layer are whole.
    """
    if backend == "single" and forwards == 1:
        return max(0.0, peak - 4.0 * own.trained)
    return bare + (4.0 * min(own.largest_layer, own.trained) if backend in SHARDS_GRADIENTS else 0.0)


def memory_of(device: Device, state: float, activations: float, alone: bool, data: float = 0.0) -> Memory:
    """`alone`: whether there is one rank; `data`: bytes of tokens, which on a CPU lie in the same memory. The
    allocator's slack is on what comes and goes, in other sizes each step."""
    base, factor = device.resident(alone)
    slack = (factor - 1) * (activations + (state if device.kind == "gpu" else 0.0))
    process = base + (data if device.kind == "cpu" else 0.0)
    return Memory(process, state, activations, slack, process + state + activations + slack)
