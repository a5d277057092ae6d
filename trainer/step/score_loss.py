"""The losses of one score: binary cross-entropy, and the squared error."""

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from trainer.config import Config
from trainer.model.batch import IGNORED


class ScoreLoss:
    """The loss of the config's objective.

    Args:
        values: the targets, whose places in it are a batch's labels.
        device: where logits are. What a step needs is there from now on, so that it can be recorded.
    """

    def __init__(self, config: Config, values: np.ndarray, device: torch.device) -> None:
        self.objective, self.values = config.objective, torch.from_numpy(values).to(device)
        self.weight = None if config.pos_weight is None else torch.tensor(config.pos_weight, device=device)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed in fp32 over the pairs whose label is not IGNORED, given logits (pairs, 1) and labels (pairs,)."""
        real = labels != IGNORED
        targets = self.values[labels.clamp(min=0)]
        # A pair that fills up is given a score, so that whatever its own is has no gradient.
        scores = torch.where(real, logits.float()[:, 0], 0.0)
        if self.objective == "mse":
            each = mse_loss(scores, targets, reduction="none")
        else:
            each = binary_cross_entropy_with_logits(scores, targets, reduction="none", pos_weight=self.weight)
        return torch.where(real, each, 0.0).sum()
