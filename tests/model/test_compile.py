"""Compiled layers: few graphs, none broken, that compute the same."""

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from test_attention import gradients, make, make_tokens
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from trainer.base.errors import UserError
from trainer.model.cross_encoder import CrossEncoder, compile_layers
from trainer.model.families import FAMILIES

BATCHES = [[9, 30, 12], [7, 30, 12, 3, 25], [17], [200, 100], [3, 3, 3, 3, 3, 3]]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compute(family: str, batches: list[list[int]], **options: object) -> None:
    """Asserts that a compiled model computes the same as one that is not, in training and evaluation."""
    plain, compiled = (CrossEncoder(make(family, dropout=0.1)) for _ in range(2))
    compile_layers(compiled, **options)
    for lengths in batches:
        size, tokens = len(lengths), make_tokens(lengths)
        batch = plain.batch(tokens, np.zeros(size, int), np.arange(size), torch.device("cpu"), seed=1, step=2)
        expected, got = (model.train()(batch) for model in (plain, compiled))
        assert torch.allclose(got, expected, rtol=0, atol=1e-5)
        theirs, ours = (gradients(m.model, y.square().sum()) for m, y in ((plain, expected), (compiled, got)))
        scale = max(gradient.abs().max() for gradient in theirs.values())
        assert max((ours[name] - gradient).abs().max() for name, gradient in theirs.items()) < 1e-5 * scale
        with torch.no_grad():
            assert torch.allclose(compiled.eval()(batch), plain.eval()(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_graphs_and_none_is_broken(family):
    """Forward and backward of training, and evaluation, for batches of any shape; 8 is the most that torch keeps."""
    operations: set[str] = set()

    def keep(graph, inputs):
        operations.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep)
    if family == "albert":  # its feed-forward is no module
        with pytest.raises(UserError, match="albert is none"):
            compute(family, BATCHES, backend=backend)
        return
    compute(family, BATCHES, backend=backend)
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 6
    assert any("mm" in name for name in operations)
    # Compiled, the backward of a table of embeddings would add up in any order.
    assert not any("embedding" in name for name in operations)


@pytest.mark.full
def test_torchs_own_compiler():
    """Of a model with dropout inside what is compiled."""
    compute("distilbert", BATCHES[:1])
