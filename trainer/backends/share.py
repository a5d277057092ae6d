"""What a rank saves: of each tensor the run that it keeps, and how the runs of all ranks become one.

Every way of sharding here cuts flattened tensors into runs, in the order of the ranks: FSDP2 cuts along the first
dimension, ZeRO-3 the flattened parameter, ZeRO-1 and 2 all parameters one behind the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from trainer.ranks import World


@dataclass(frozen=True)
class Share:
    """By key, such as `exp_avg/model.bert...`.

    Attributes:
        shapes: of the full tensors, the same on every rank.
        runs: where this rank's run begins in the flattened tensor, and the run, 1-D on the CPU; no empty ones.
        divided: whether each rank has a part; else rank 0 has all, and the others nothing.
    """

    shapes: dict[str, tuple[int, ...]]
    runs: dict[str, tuple[int, torch.Tensor]]
    divided: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "Share":
        """Whole tensors, on rank 0."""
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return cls(shapes, {key: (0, tensor.flatten()) for key, tensor in tensors.items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """What this rank writes: its runs as they are, or the tensors in their shapes, where they are whole."""
        return {
            key: run.numpy() if self.divided else run.numpy().reshape(self.shapes[key])
            for key, (_, run) in self.runs.items()
        }

    def places(self) -> np.ndarray:
        """(keys, 2) where this rank's run of each tensor begins, and how many numbers it has."""
        none = 0, torch.empty(0)
        found = [(start, len(run)) for start, run in (self.runs.get(key, none) for key in self.shapes)]
        return np.array(found, np.int64).reshape(-1, 2)


def collected(share: Share, world: World) -> Share:
    """All of it on rank 0, as whole tensors. Every rank takes part."""
    runs = {}
    for key, shape in share.shapes.items():
        _, own = share.runs.get(key, (0, torch.empty(0)))
        full = world.gather(own.numpy())
        if full is not None:
            assert len(full) == math.prod(shape), f"the ranks' runs do not make up {key}"
            runs[key] = 0, torch.from_numpy(full)
    return Share(share.shapes, runs)
