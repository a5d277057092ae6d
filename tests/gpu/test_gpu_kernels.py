"""The kernels on a real GPU, by `pytest -m gpu`, in every type, and what the interpreter cannot show: equal bits."""

import os

import pytest
import torch
from kernel_cases import Norm, Pairs, attend_differences, attend_first_differences, difference

from trainer.model import kernels
from trainer.model.masks import masked

ON = torch.device(os.environ.get("CROSSRANK_GPU_TESTS_ON", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON.type == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CASES = {
    "short": {"lengths": [5, 1, 16, 9]},
    "middle": {"lengths": [27, 64, 1, 33, 32, 5], "size": 64},
    "long": {"lengths": [103, 65, 64, 5], "size": 64, "heads": 12},
    "longest": {"lengths": [128, 1, 77], "size": 64},
    "wide-heads": {"lengths": [20, 64], "size": 128},
    "no-dropout": {"lengths": [64, 103, 5, 16], "p": 0.0},
    "strided": {"lengths": [33, 5], "more": 8},
}


def test_there_are_kernels():
    assert kernels.available(ON, longest=128, head_size=64, width=4096)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("differences", [attend_differences, attend_first_differences])
def test_attention(name, dtype, differences):
    found = differences(Pairs(**CASES[name], dtype=dtype, device=ON))
    assert max(found) < BOUNDS[dtype], found


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [48, 384, 768, 4096])
def test_rows(width, dtype):
    case = Norm(rows=300, width=width, dtype=dtype, device=ON)
    dropped = kernels.drop(case.x.detach(), case.keys, case.columns, 0.1)
    assert torch.equal(dropped, masked(case.x.detach(), 0.1, case.keys[:, None], case.columns))
    for used in ((True, True), (True, False), (False, True)):
        found = [difference(*pair) for pair in zip(case.run(used), case.exact(used), strict=True)]
        assert max(found) < BOUNDS[dtype], found


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_same_bits_again(dtype):
    pairs = Pairs([103, 64, 33, 5] * 16, heads=12, size=64, dtype=dtype, device=ON)
    qkv = pairs.random(pairs.tokens, 3 * pairs.hidden)

    def all_of_it():
        out = kernels.attend(qkv, *pairs.arguments())
        first = kernels.attend_first(out[pairs.first], qkv[:, pairs.hidden :], *pairs.arguments())
        (gradient,) = torch.autograd.grad(first.square().sum() + out.square().sum(), qkv)
        return [out, first, gradient, *Norm(rows=2000, width=768, dtype=dtype, device=ON).run()]

    once = all_of_it()
    for _ in range(5):
        for before, again in zip(once, all_of_it(), strict=True):
            assert torch.equal(before, again)
