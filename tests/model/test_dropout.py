"""The masks are random enough to be dropout, and belong to the sample whatever the layout."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from trainer.model.calls import DropoutCalls
from trainer.model.dropout import DropoutKeys, KeyedDropout
from trainer.model.masks import token_keys

TOKENS, FEATURES = 2000, 512


def masks(p: float, seed: int = 42, step: int = 3, site: int = 1) -> torch.Tensor:
    rows, positions = np.arange(TOKENS) // 25, np.arange(TOKENS) % 25
    keys = DropoutKeys()
    tokens = torch.from_numpy(token_keys(seed, step, rows, positions))
    keys.set(tokens[None], tokens[positions == 0], tokens[:1])
    return keys.mask(site, p, torch.ones(1, TOKENS, FEATURES))[0]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_look_independent(p):
    look_independent(masks(p), p)


def look_independent(mask: torch.Tensor, p: float) -> None:
    """Asserts it of the mask of ones (rows, features)."""
    kept = (mask > 0).double()
    rows, features = kept.shape
    # Means: within five standard errors, over all elements and for each token and feature.
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / kept.numel() ** 0.5
    for dim, n in ((0, rows), (1, features)):
        z = (kept.mean(dim) - (1 - p)) / (sigma / n**0.5)
        assert abs(z.std() - 1) < max(0.1, 4 / (2 * len(z)) ** 0.5)
        assert z.abs().max() < 6
    # Survivors are scaled so that the expectation stays.
    assert abs(mask.mean() - 1) < 0.005
    # Correlations between tokens and between features are those of chance.
    centred = (kept - (1 - p)) / sigma
    for matrix, n in ((centred[:2000] @ centred[:2000].T / features, features), (centred.T @ centred / rows, rows)):
        off_diagonal = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
        assert abs(off_diagonal.std() * n**0.5 - 1) < 0.05
        assert off_diagonal.abs().max() < 1.3 * largest_by_chance(matrix.shape[0], n, p)


def largest_by_chance(rows: int, n: int, p: float) -> float:
    """Of the correlations between rows of torch's own masks (rows, n)."""
    kept = (torch.rand(rows, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) >= p).double()
    centred = (kept - (1 - p)) / (p * (1 - p)) ** 0.5
    matrix = centred @ centred.T / n
    return float(matrix[~torch.eye(rows, dtype=torch.bool)].abs().max())


def of_modules(x: torch.Tensor, p: float) -> torch.Tensor:
    tokens = torch.from_numpy(token_keys(42, 3, np.arange(TOKENS), np.arange(TOKENS)))
    keys = DropoutKeys()
    keys.set(tokens[None], tokens[:1], tokens[:1])
    return KeyedDropout(p, keys)(x[None])[0]


def of_tables(x: torch.Tensor, p: float) -> torch.Tensor:
    keys = DropoutKeys()
    keys.set(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor([7]))
    return keys.shared_mask(1, p, x, 0)


def of_attention(x: torch.Tensor, p: float) -> torch.Tensor:
    queries = torch.from_numpy(token_keys(42, 3, np.arange(TOKENS), np.arange(TOKENS)))
    return (
        DropoutKeys()
        .attention_mask(1, p, x.view(1, 4, TOKENS // 4, FEATURES), queries[None, : TOKENS // 4])
        .view(x.shape)
    )


def of_calls(x: torch.Tensor, p: float) -> torch.Tensor:
    calls, rows = DropoutCalls(), np.arange(TOKENS)
    calls.sites = [(0, 1)]
    calls.set(torch.from_numpy(token_keys(42, 3, rows, rows)), torch.tensor([7]))
    with calls.active():
        return functional.dropout(x, p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("place", [of_modules, of_tables, of_attention, of_calls])
def test_any_precision_keeps_the_expectation(place, dtype):
    """1 / 0.9 is no bfloat16 number: rounded before the product, it would take 0.16 % off every activation, and off
    every gradient."""
    x = torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    exact = x.detach().double() * place(torch.ones(x.shape), 0.1)
    got = place(x, 0.1)
    got.backward(x.detach())
    assert got.dtype == dtype
    for scaled in (got.detach(), x.grad):
        assert abs((scaled.double() * x.detach()).sum() / (exact * x.detach()).sum() - 1) < 1e-4


@pytest.mark.parametrize("change", [{"seed": 43}, {"step": 4}, {"site": 2}])
def test_masks_change_with_seed_step_and_site(change):
    agreement = ((masks(0.5) > 0) == (masks(0.5, **change) > 0)).double().mean()
    assert abs(agreement - 0.5) < 0.005


def test_masks_follow_the_sample():
    """A pair keeps its masks in another batch, at another place, in a padded batch."""
    rows, lengths = np.array([5, 9]), np.array([4, 6])
    row, position = np.repeat(rows, lengths), np.concatenate([np.arange(n) for n in lengths])
    flat = torch.from_numpy(token_keys(1, 2, row, position))
    keys = DropoutKeys()
    keys.set(flat[None], flat[[0, 4]], flat[:1])
    dropout = KeyedDropout(0.3, keys)
    packed = dropout(torch.ones(1, 10, 33))[0]
    first = dropout(torch.ones(2, 33))
    alone = torch.from_numpy(token_keys(1, 2, np.full(6, 9), np.arange(6)))
    padded = torch.zeros(1, 8, dtype=torch.int64)
    padded[0, :6] = alone
    keys.set(padded, alone[:1], alone[:1])
    assert torch.equal(dropout(torch.ones(1, 8, 33))[0, :6], packed[4:])
    assert torch.equal(first[1], packed[4])


def test_attention_masks_do_not_depend_on_padding():
    keys, queries = DropoutKeys(), torch.from_numpy(token_keys(1, 2, np.zeros(12), np.arange(12)))[None]
    wide = keys.attention_mask(3, 0.2, torch.ones(1, 4, 12, 12), queries)
    narrow = keys.attention_mask(3, 0.2, torch.ones(1, 4, 9, 9), queries[:, :9])
    assert torch.equal(wide[:, :, :9, :9], narrow)
    assert not torch.equal(wide[:, 0], wide[:, 1])


def test_off_in_evaluation():
    dropout = KeyedDropout(0.5, DropoutKeys()).eval()
    x = torch.randn(2, 3)
    assert dropout(x) is x
