"""What is minimised: cross-entropy of classes, or of one score binary cross-entropy or the squared error."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from trainer.config import Config
from trainer.model.batch import IGNORED

# Of logits (pairs, outputs) and labels (pairs,): the sum over the pairs whose label is not IGNORED, in fp32.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(config: Config, values: np.ndarray | None, device: torch.device) -> Loss:
    """The objective's loss. `values` are the targets whose places the labels are, where one score is learned."""
    if values is None:
        return lambda logits, labels: _of_classes(config, logits, labels)
    table = torch.from_numpy(values).to(device)
    weight = None if config.pos_weight is None else torch.tensor(config.pos_weight, device=device)

    def of_score(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        real = labels != IGNORED
        targets = table[labels.clamp(min=0)]
        # A pair that fills up is given a score, so that whatever its own is has no gradient.
        scores = torch.where(real, logits.float()[:, 0], 0.0)
        if config.objective == "mse":
            each = mse_loss(scores, targets, reduction="none")
        else:
            each = binary_cross_entropy_with_logits(scores, targets, reduction="none", pos_weight=weight)
        return torch.where(real, each, 0.0).sum()

    return of_score


def _of_classes(config: Config, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    smoothing = config.label_smoothing_factor
    return cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)
