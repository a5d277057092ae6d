import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score
from test_attention import make, make_tokens

from tests.made_pairs import made_pairs
from trainer import evaluate
from trainer.evaluate import in_order, predict_logits
from trainer.metrics import classification_scores, scores_by_source
from trainer.model.cross_encoder import CrossEncoder
from trainer.ranks import World


def test_scores_are_sklearns():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, 500), rng.normal(size=(500, 3)).astype(np.float32)
    scores = classification_scores(labels, logits, 3)
    for average in ("macro", "micro", "weighted"):
        assert scores[f"f1_{average}"] == f1_score(labels, logits.argmax(-1), average=average)
    assert scores["confusion_matrix"] == confusion_matrix(labels, logits.argmax(-1)).tolist()
    assert scores["accuracy"] == pytest.approx((labels == logits.argmax(-1)).mean())


def test_loss_is_cross_entropy():
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 4, 50), rng.normal(size=(50, 4)).astype(np.float32)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    assert classification_scores(labels, logits, 4)["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_scores_by_source():
    labels, logits = np.array([0, 1, 1]), np.eye(2)[[0, 1, 0]]
    scores = scores_by_source(
        ["b", "a"], np.array([1, 1, 0]), lambda rows: classification_scores(labels[rows], logits[rows], 2)
    )
    assert (scores["a"]["accuracy"], scores["b"]["accuracy"]) == (1.0, 0.0)
    assert (scores["a"]["num_samples"], scores["b"]["num_samples"]) == (2, 1)


def test_in_order():
    assert in_order(np.array([2, 0, 1]), np.array([[2.0], [0.0], [1.0]]), 3).tolist() == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize("every", [1000, 3])
def test_batches_do_not_wait_for_each_other(monkeypatch, every):
    """Logits are read once, or every so often where there are many; a signal is looked for before each batch."""
    lengths = np.arange(3, 23)
    model, tokens = CrossEncoder(make("bert")), make_tokens(list(lengths))
    pairs = made_pairs([("", "")] * 20)
    reads, checks = [], []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(len(tensor)) or cpu(tensor))
    monkeypatch.setattr(evaluate, "READ_EVERY", every)
    world = World(0, 1, 0, torch.device("cpu"))
    logits = predict_logits(model, pairs, tokens, world, 2, False, lambda: checks.append(0))
    assert (len(checks), reads) == (10, [20] if every == 1000 else [6, 6, 6, 2])
    one_by_one = [model(model.batch(tokens, pairs.label, np.array([row]), world.device)) for row in range(20)]
    assert np.allclose(logits, torch.cat(one_by_one).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 1], [0, 1, 2, 2], [0, 1, 3], [0, 1, 2, 3]])
def test_a_missing_or_doubled_sample_is_an_error(rows):
    with pytest.raises(RuntimeError, match="not exactly once"):
        in_order(np.array(rows), np.zeros((len(rows), 2)), 3)


def test_the_matrix_of_many_classes_is_bounded():
    """The classes with the most pairs, and all others as one."""
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 200, 5000), rng.normal(size=(5000, 200)).astype(np.float32)
    labels[:1000] = 150
    scores = classification_scores(labels, logits, 200)
    matrix, kept = np.array(scores["confusion_matrix"]), scores["confusion_classes"]
    full = confusion_matrix(labels, logits.argmax(-1), labels=range(200))
    assert matrix.shape == (51, 51)
    assert (matrix[:50, :50] == full[np.ix_(kept, kept)]).all()
    assert (matrix.sum(), 150 in kept) == (5000, True)
    assert "confusion_classes" not in classification_scores(labels[:9] % 50, logits[:9, :50], 50)


def test_the_interval_of_many_classes_fits(monkeypatch):
    """Drawn in parts it is the same; 1,500 classes at once would take 33 GiB."""
    import tracemalloc

    from trainer import metrics

    rng = np.random.default_rng(0)
    few = rng.integers(0, 50, (4, 4)).tolist()
    expected = metrics.interval(few)
    monkeypatch.setattr(metrics, "MOST_CELLS", 1000)
    assert metrics.interval(few) == expected
    monkeypatch.undo()
    matrix = np.zeros((1500, 1500), int)
    np.add.at(matrix, (rng.integers(0, 1500, 3000), rng.integers(0, 1500, 3000)), 1)
    matrix = matrix.tolist()
    tracemalloc.start()
    low, high = metrics.interval(matrix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 <= low < high < 0.01
    assert peak < 1 << 29
