"""Inputs of the operators in kernels.py, and what they are to give, computed in fp64, pair by pair."""

from dataclasses import dataclass

import numpy as np
import torch

from trainer.model import kernels
from trainer.model.masks import columns_of, masked, token_keys

CPU = torch.device("cpu")


@dataclass
class Pairs:
    """Pairs of `lengths` tokens, `heads` heads of `size` features."""

    lengths: list[int]
    heads: int = 2
    size: int = 32
    p: float = 0.1
    dtype: torch.dtype = torch.float32
    longest: int = 0
    more: int = 0  # numbers of a row beside its own
    device: torch.device = CPU

    def __post_init__(self) -> None:
        self.hidden, self.tokens = self.heads * self.size, sum(self.lengths)
        self.counts = torch.tensor(self.lengths, device=self.device)
        self.first = self.counts.cumsum(0) - self.counts
        self.longest = self.longest or max(self.lengths)
        pair = np.repeat(np.arange(len(self.lengths)), self.lengths)
        positions = np.arange(self.tokens) - self.first.cpu().numpy()[pair]
        self.keys = torch.from_numpy(token_keys(1, 2, pair + 7, positions)).to(self.device)
        self.columns = columns_of(5, self.heads, self.longest, self.device)

    def arguments(self, scaling: float | None = None) -> tuple:
        scaling = self.size**-0.5 if scaling is None else scaling
        shared = (self.first, self.counts, self.keys, self.columns)
        return *shared, self.p, scaling, self.longest, self.heads

    def random(self, rows: int, width: int, seed: int = 0) -> torch.Tensor:
        """A leaf (rows, width) whose rows lie in wider ones."""
        wide = torch.randn(rows, width + self.more, generator=torch.Generator().manual_seed(seed))
        return wide.to(self.device, self.dtype)[:, :width].requires_grad_()

    def reference(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """In fp64: `q` (tokens or pairs, hidden), `kv` (tokens, 2 * hidden)."""
        mixed = []
        for number, (start, length) in enumerate(zip(self.first.tolist(), self.lengths, strict=True)):
            rows = slice(start, start + length)
            first_only = len(q) != self.tokens
            of_q = q[number : number + 1] if first_only else q[rows]
            queries, keys, values = (
                x.unflatten(1, (self.heads, -1)).transpose(0, 1) for x in (of_q, *kv[rows].chunk(2, 1))
            )
            weights = (queries * self.size**-0.5 @ keys.transpose(1, 2)).softmax(-1)
            if self.p > 0:
                of_rows = self.keys[rows][: len(of_q)].view(1, -1, 1)
                weights = masked(weights, self.p, of_rows, self.columns[:, None, : -(-length // 4)])
            mixed.append((weights @ values).transpose(0, 1).flatten(1))
        return torch.cat(mixed)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the whole tensors; infinite where something was not written."""
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).norm() / expected.norm()
    return float(error.nan_to_num(torch.inf))


def attend_differences(case: Pairs) -> list[float]:
    """Of the result and the gradients of `attend`, to those in fp64."""
    qkv = case.random(case.tokens, 3 * case.hidden)
    exact = qkv.detach().double().requires_grad_()
    gradient = case.random(case.tokens, case.hidden, seed=1).detach()
    got = kernels.attend(qkv, *case.arguments())
    expected = case.reference(exact[:, : case.hidden], exact[:, case.hidden :])
    got.backward(gradient)
    expected.backward(gradient.double())
    assert got.dtype == qkv.grad.dtype == case.dtype
    parts = zip(qkv.grad.chunk(3, 1), exact.grad.chunk(3, 1), strict=True)
    return [difference(got, expected), *(difference(*part) for part in parts)]


def attend_first_differences(case: Pairs) -> list[float]:
    """The same of `attend_first`."""
    q, kv = case.random(len(case.lengths), case.hidden), case.random(case.tokens, 2 * case.hidden, seed=1)
    exact = [x.detach().double().requires_grad_() for x in (q, kv)]
    gradient = case.random(len(case.lengths), case.hidden, seed=2).detach()
    got, expected = kernels.attend_first(q, kv, *case.arguments()), case.reference(*exact)
    got.backward(gradient)
    expected.backward(gradient.double())
    parts = [(q.grad, exact[0].grad), *zip(kv.grad.chunk(2, 1), exact[1].grad.chunk(2, 1), strict=True)]
    return [difference(got, expected), *(difference(*part) for part in parts)]


@dataclass
class Norm:
    """Inputs of `add_norm`."""

    rows: int = 7
    width: int = 48
    p: float = 0.1
    dtype: torch.dtype = torch.float32
    residual: torch.dtype = torch.float32
    more: int = 0
    device: torch.device = CPU

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            wide = torch.randn(*shape[:-1], shape[-1] + self.more, generator=generator).to(self.device, dtype)
            return wide[..., : shape[-1]].requires_grad_()

        self.x = random(self.dtype, self.rows, self.width)
        self.res = random(self.residual, self.rows, self.width)
        self.weight, self.bias = (random(torch.float32, self.width).detach().clone().requires_grad_() for _ in "wb")
        self.gradients = [random(dtype, self.rows, self.width).detach() for dtype in (torch.float32, self.dtype)]
        self.keys = torch.from_numpy(token_keys(3, 4, np.arange(self.rows), np.arange(self.rows) + 1)).to(self.device)
        self.columns = columns_of(6, 1, self.width, self.device)[0]
        self.leaves = (self.x, self.res, self.weight, self.bias)

    def run(self, used: tuple[bool, bool] = (True, True)) -> list[torch.Tensor]:
        """Both results and four gradients, through the results that are `used`."""
        results = kernels.add_norm(*self.leaves, 1e-5, self.keys, self.columns, self.p)
        return self.with_gradients(results, self.leaves, self.gradients, used)

    def exact(self, used: tuple[bool, bool] = (True, True)) -> list[torch.Tensor]:
        """The same in fp64."""
        leaves = [x.detach().double().requires_grad_() for x in self.leaves]
        x, residual, weight, bias = leaves
        dropped = x if self.p == 0 else masked(x, self.p, self.keys[:, None], self.columns)
        y = torch.nn.functional.layer_norm(dropped + residual, (self.width,), weight, bias, 1e-5)
        return self.with_gradients((y, y + 0), leaves, [g.double() for g in self.gradients], used)

    def with_gradients(self, results, leaves, gradients, used) -> list[torch.Tensor]:
        """The results, and the leaves' gradients, given those of the results that are `used`."""
        some = [(y, g) for y, g, wanted in zip(results, gradients, used, strict=True) if wanted]
        gradients = torch.autograd.grad([y for y, _ in some], leaves, [g for _, g in some])
        return [*(y.detach() for y in results), *gradients]
