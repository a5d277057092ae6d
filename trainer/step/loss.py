"""What a step makes smaller: a sum over the pairs of a batch, and what the sum of a whole step is divided by.

Every rank knows the divisor from the step's rows, so any split of a step into batches and ranks gives the same loss and
gradient.
"""

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from trainer.base.arrays import counted
from trainer.base.errors import UserError
from trainer.config import Config
from trainer.data.mix import Mix
from trainer.data.pairs import Pairs
from trainer.data.tokens import Split
from trainer.model.batch import IGNORED, Batch


class Loss:
    """The training loss of one run: that of its objective.

    Cross-entropy of classes has their weights as torch's CrossEntropyLoss has them. Of one score it is binary
    cross-entropy with pos_weight, or the squared error; labels are then places in the split's table of targets.

    Args:
        split: the training pairs.
        device: where logits are.
    """

    def __init__(self, config: Config, split: Split, device: torch.device) -> None:
        self.objective, self.smoothing = config.objective, config.label_smoothing_factor
        values = split.pairs.values
        self.targets = None if values is None else torch.tensor(values, device=device)
        self.pos_weight = None if config.pos_weight is None else torch.tensor(config.pos_weight, device=device)
        self.weight: torch.Tensor | None = None  # (classes,)
        self.labels, self.weights = split.pairs.label, class_weights(config, split.pairs)
        if self.weights is not None:
            self.weight = torch.tensor(self.weights, device=device)

    def __call__(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Summed over the pairs of a batch that have a label, in fp32, given their logits (pairs, outputs)."""
        if self.targets is not None:
            return self._of_score(logits.float()[:, 0], batch.labels, self.targets)
        return cross_entropy(
            logits.float(),
            batch.labels,
            weight=self.weight,
            reduction="sum",
            ignore_index=IGNORED,
            label_smoothing=self.smoothing,
        )

    def _of_score(self, scores: torch.Tensor, labels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        real, targets = labels != IGNORED, table[labels.clamp(min=0)]
        # A pair that fills up is given a score, so that whatever its own is has no gradient.
        scores = torch.where(real, scores, 0.0)
        if self.objective == "mse":
            each = mse_loss(scores, targets, reduction="none")
        else:
            each = binary_cross_entropy_with_logits(scores, targets, reduction="none", pos_weight=self.pos_weight)
        return torch.where(real, each, 0.0).sum()

    def divisor(self, rows: np.ndarray) -> float:
        """Of a step of these rows of the data set: their number, or the sum of their labels' weights."""
        return float(len(rows) if self.weights is None else self.weights[self.labels[rows]].sum(dtype=np.float64))


def class_weights(config: Config, pairs: Pairs) -> np.ndarray | None:
    """(classes,) in fp32; None where all count alike. Raises UserError where they do not fit the training pairs."""
    if config.class_weights is None:
        return None
    names = pairs.label_names
    if config.class_weights != ["balanced"]:
        if len(config.class_weights) != len(names):
            raise UserError(f"class_weights has {len(config.class_weights)} number(s), and {pairs.name} {len(names)} "
                            f"classes; give one for each of {', '.join(names)}, in this order")  # fmt: skip
        return np.array(config.class_weights, np.float64).astype(np.float32)
    # n / (classes * n of the class), as scikit-learn's, of the pairs that an epoch has.
    mix = Mix.of(config.source_weights, pairs)
    counts = counted(pairs.label, len(names)) if mix is None else mix.of_classes(pairs.label, len(names))
    if lost := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        raise UserError(f"class_weights balanced: {pairs.name} has no pair of {', '.join(lost)}; give a number for "
                        f"each of {', '.join(names)}")  # fmt: skip
    weights: np.ndarray = (counts.sum() / (len(names) * counts)).astype(np.float32)
    return weights
