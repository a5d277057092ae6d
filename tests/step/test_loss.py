"""The training loss: torch's of the whole batch, however that is split."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from tests.made_pairs import made_pairs
from trainer.base.errors import UserError
from trainer.config import Config
from trainer.data.tokens import Split
from trainer.model.batch import IGNORED
from trainer.step.loss import Loss, class_weights

NAMES, LABELS = ("no", "perhaps", "yes"), np.array([0, 0, 0, 2, 1, 0, 2, 0])
CPU = torch.device("cpu")


def pairs(labels: np.ndarray = LABELS, source: list[str] | None = None):
    return made_pairs([("", "")] * len(labels), labels, NAMES, source, "t.csv")


def config(weights: object, **fields: object) -> Config:
    return Config(train_file="t.csv", class_weights=weights, **fields)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1, 2.5, 0.5]])
def test_any_split_is_torchs(weights, smoothing):
    loss = Loss(config(weights, label_smoothing_factor=smoothing), Split("t", pairs(), None), CPU)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    given = None if weights is None else torch.tensor(weights)
    expected = torch.nn.CrossEntropyLoss(weight=given, label_smoothing=smoothing)(logits, torch.from_numpy(LABELS))
    gradient = torch.autograd.grad(expected, logits)[0]

    def part(rows: list[int]) -> torch.Tensor:
        labels = torch.tensor([*LABELS[rows], IGNORED])  # one that fills up a shape
        return loss(torch.cat([logits[rows], torch.zeros(1, 3)]), SimpleNamespace(labels=labels))

    for split in ([[*range(8)]], [[3], [], [0, 1, 2, 4, 5, 6, 7]], [[7, 6, 5, 4], [3, 2, 1, 0]]):
        got = sum(part(rows) for rows in split) / loss.divisor(np.arange(8))
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)
        assert torch.allclose(torch.autograd.grad(got, logits)[0], gradient, rtol=0, atol=1e-7)


def test_balanced_is_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    assert np.allclose(class_weights(config("balanced"), pairs()), expected)
    # As an epoch has them: each pair of `a` twice.
    sources = ["a", "b"] * 4
    twice = np.concatenate([LABELS, LABELS[::2]])
    weighted = config(["balanced"], source_weights="a=2")
    assert np.allclose(class_weights(weighted, pairs(source=sources)),
                       compute_class_weight("balanced", classes=np.arange(3), y=twice))  # fmt: skip


@pytest.mark.parametrize("given", ["1,2.50,0.5", [1, 2.5, 0.5], np.array([1, 2.5, 0.5]), ("1.0", "2.5", "0.5")])
def test_one_way_to_write_them(given):
    assert config(given).class_weights == ["1", "2.5", "0.5"]
    assert config([1 / 3]).class_weights == [repr(1 / 3)]


@pytest.mark.parametrize(("given", "said"), [
    ("1,2", "has 2 number(s), and t.csv 3 classes; give one for each of no, perhaps, yes"),
    ("1,0,1", "a number above 0 for each class"),
    ("1,-1,1", "a number above 0 for each class"),
    ([1, float("nan"), 1], "a number above 0 for each class"),
    ("1,inf,1", "a number above 0 for each class"),
    ("balanced,1", "class_weights must be balanced, or a number"),
    ("evenly", "class_weights must be balanced, or a number"),
    (2, "must be a list of numbers such as 1,2,1"),
    ([1, None], "must be a list of numbers such as 1,2,1"),
    ("balanced", "t.csv has no pair of yes; give a number for each of no, perhaps, yes"),
])  # fmt: skip
def test_bad_weights(given, said):
    with pytest.raises(UserError) as caught:
        class_weights(config(given), pairs(LABELS % 2))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"objective": "binary_cross_entropy"}, [0, 1]),
        ({"objective": "binary_cross_entropy", "pos_weight": 3.5}, [0, 1]),
        ({"objective": "mse"}, [-1.5, 0, 0.25, 5]),
    ],
    ids=["binary", "weighted", "mse"],
)
def test_sums_of_one_score(fields, values):
    labels = torch.arange(9) % len(values)
    split = Split("t", dataclasses.replace(pairs(labels.numpy()), values=np.array(values, np.float32)), None)
    loss = Loss(Config(dataset_name=["builtin"], **fields), split, CPU)
    logits = torch.randn(9, 1, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor(values)[labels].float()
    if fields["objective"] == "mse":
        expected = mse_loss(logits[:, 0], targets, reduction="sum")
    else:
        weight = torch.tensor(fields.get("pos_weight", 1.0))
        expected = binary_cross_entropy_with_logits(logits[:, 0], targets, reduction="sum", pos_weight=weight)
    assert torch.allclose(loss(logits, SimpleNamespace(labels=labels)), expected)
    assert loss(logits.bfloat16(), SimpleNamespace(labels=labels)).dtype == torch.float32

    # What fills up may be any number, or none.
    filled = torch.cat([logits, torch.tensor([[3.0], [torch.inf], [torch.nan]])]).requires_grad_()
    same = loss(filled, SimpleNamespace(labels=torch.cat([labels, torch.full((3,), IGNORED)])))
    same.backward()
    assert torch.allclose(same, expected)
    assert (filled.grad[-3:] == 0).all()
    assert filled.grad.isfinite().all()
    assert loss(filled[-1:], SimpleNamespace(labels=torch.tensor([IGNORED]))) == 0
