"""What else decides bits under exact_shards: it is fixed for the run, noted, and the same when the run is resumed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.base.errors import UserError
from trainer.config import Config
from trainer.ranks import World
from trainer.run.about import cpu_name

FIELDS = ("exact_shards", "exact_threads", "per_device_train_batch_size", "per_device_eval_batch_size", "unpad",
          "gradient_checkpointing")  # fmt: skip
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS repeats its bits


@contextmanager
def pinned(config: Config, world: World) -> Iterator[None]:
    """Under exact_shards fixes threads and algorithms, before anything is computed, and gives them back in the end.

    Raises UserError where the environment forbids it.
    """
    if config.exact_shards is None:
        yield
        return
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES and world.device.type == "cuda":
        raise UserError(f"exact_shards needs {WORKSPACE} to be {' or '.join(WORKSPACES)}, got {given!r}; unset it")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.set_num_threads(config.exact_threads)
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # which is for finding mistakes, and takes time
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        settings.fill_uninitialized_memory = fills


def pins(config: Config, world: World) -> dict[str, Any] | None:
    """By name, what must be equal for equal bits; None where the run does not promise them."""
    if config.exact_shards is None:
        return None
    cuda = world.device.type == "cuda"
    return {name: getattr(config, name) for name in FIELDS} | {
        "device": world.device.type,
        "device_name": torch.cuda.get_device_name(world.device) if cuda else cpu_name(),
        "instructions": None if cuda else torch.backends.cpu.get_cpu_capability(),
        WORKSPACE: os.environ.get(WORKSPACE) if cuda else None,
        "torch": str(torch.__version__),
    }
