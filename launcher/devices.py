"""The GPUs of this machine, counted without torch, so that a login node answers at once."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


def num_present() -> int:
    """GPUs that NVIDIA's driver shows, whatever CUDA_VISIBLE_DEVICES says."""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
        return sum(line.startswith("GPU ") for line in listing.splitlines())
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def num_visible(env: Mapping[str, str], present: int) -> int:
    """How many of `present` GPUs a process with `env` sees.

    CUDA_VISIBLE_DEVICES holds indices or UUIDs; as in CUDA, the first that does not exist hides those after it.
    """
    if "CUDA_VISIBLE_DEVICES" not in env or not present:
        return present
    count = 0
    for name in env["CUDA_VISIBLE_DEVICES"].split(","):
        named = name.strip()
        if not (int(named) < present if named.isdigit() else named.startswith(("GPU-", "MIG-"))):
            break
        count += 1
    return count
