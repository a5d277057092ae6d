"""The losses of one score are torch's, and what fills a batch up has no part in them."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from trainer.config import Config
from trainer.model.batch import IGNORED
from trainer.step.score_loss import ScoreLoss

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"objective": "binary_cross_entropy"}, [0, 1]),
        ({"objective": "binary_cross_entropy", "pos_weight": 3.5}, [0, 1]),
        ({"objective": "mse"}, [-1.5, 0, 0.25, 5]),
    ],
    ids=["binary", "weighted", "mse"],
)
def test_sums(fields, values):
    table = np.array(values, np.float32)
    loss = ScoreLoss(Config(dataset_name=["builtin"], **fields), table, CPU)
    labels = torch.arange(9) % len(values)
    logits = torch.randn(9, 1, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor(values)[labels].float()
    if fields["objective"] == "mse":
        expected = mse_loss(logits[:, 0], targets, reduction="sum")
    else:
        weight = torch.tensor(fields.get("pos_weight", 1.0))
        expected = binary_cross_entropy_with_logits(logits[:, 0], targets, reduction="sum", pos_weight=weight)
    assert torch.allclose(loss(logits, labels), expected)
    assert loss(logits.bfloat16(), labels).dtype == torch.float32

    # What fills up may be any number, or none.
    filled = torch.cat([logits, torch.tensor([[3.0], [torch.inf], [torch.nan]])]).requires_grad_()
    same = loss(filled, torch.cat([labels, torch.full((3,), IGNORED)]))
    same.backward()
    assert torch.allclose(same, expected)
    assert (filled.grad[-3:] == 0).all()
    assert filled.grad.isfinite().all()
    assert loss(filled[-1:], torch.tensor([IGNORED])) == 0
