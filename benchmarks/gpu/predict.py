"""What a measured step would take on another card, from what bounds each of its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# https://images.nvidia.com/aem-dam/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf
PEAK, BANDWIDTH = 71e12, 936e9  # RTX 3090: dense bf16 FLOP/s with fp32 sums, bytes/s
ADAMW_BYTES = 28  # a parameter: reads weight, gradient, two moments; writes weight and moments; fp32
STEPS = 1563  # of the reference run


def rtx_3090(results: Path) -> dict[str, Any] | None:
    """From roofline's JSON in `results`; None where it is not there.

    Forward and backward are bound by products: the 3090 is taken to reach the fraction of its own peak that was reached
    here. The optimizer is bound by memory. An estimate: what a fast card waits for launches, a slower one
    hides.
    """
    path = results / "roofline-distilroberta-bf16.json"
    if not path.is_file():
        return None
    measured = json.loads(path.read_text())
    seconds, flops = measured["seconds"], measured["step_flops"]
    here = seconds["forward"] + seconds["backward"]
    fraction = flops / here / measured["peak_flops_per_second"]
    compute = flops / (PEAK * fraction)
    optimizer = ADAMW_BYTES * measured["memory_bytes"]["state"] / 16 / BANDWIDTH
    step = compute + optimizer + seconds["data"]
    return {
        "fraction_of_peak_reached_here": fraction,
        "seconds_a_step": step,
        "train_seconds_of_the_recipe": STEPS * step,
        "train_seconds_at_the_full_peak": STEPS * (flops / PEAK + optimizer),
        "card": "133 s with its evaluations",
    }
