"""The Triton kernels on a CPU, by Triton's interpreter. test_kernels.py runs this file, in a process of its own."""

import pytest
import torch
from kernel_cases import CPU, Norm, Pairs, attend_differences, attend_first_differences, difference

from trainer.model import kernels
from trainer.model.masks import columns_of, keep, masked

# The interpreter computes on bfloat16's bits as if they were integers, so fp16 stands for the 16-bit types.
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3}
LENGTHS = {
    16: [5, 1, 16, 9],
    64: [27, 64, 1, 33, 32, 5],
    103: [103, 65, 64, 5],
    128: [128, 1, 77],
}
CASES = {
    **{f"longest-{longest}": {"lengths": lengths} for longest, lengths in LENGTHS.items()},
    "bound": {"lengths": [5, 30], "longest": 128},
    "size-64": {"lengths": [40, 64, 5], "size": 64, "heads": 3},
    "size-24": {"lengths": [40, 5], "size": 24},
    "size-128": {"lengths": [20, 5], "size": 128},
    "no-dropout": {"lengths": [64, 103, 5, 16], "p": 0.0},
    "strided": {"lengths": [33, 5], "more": 8},
    "half": {"lengths": [33, 5, 16], "p": 0.5},
}


@pytest.fixture(autouse=True)
def by_the_kernels():
    assert kernels.interpreted()
    assert kernels.available(CPU, longest=128, head_size=64, width=4096)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("differences", [attend_differences, attend_first_differences])
def test_attention(name, dtype, differences):
    found = differences(Pairs(**CASES[name], dtype=dtype))
    assert max(found) < BOUNDS[dtype], found


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_attention(p):
    """Equal scores, and values that tell the keys apart: the result is the mask."""
    case = Pairs([64, 30, 5], size=64, p=p)
    values = torch.cat([torch.eye(length, 64) for length in case.lengths]).repeat(1, case.heads)
    qkv = torch.cat([torch.zeros(case.tokens, 2 * case.hidden), values], 1)
    of_all = kernels.attend(qkv, *case.arguments()).unflatten(1, (case.heads, 64))
    of_first = kernels.attend_first(qkv[case.first, : case.hidden], qkv[:, case.hidden :], *case.arguments())
    for start, length in zip(case.first.tolist(), case.lengths, strict=True):
        rows = slice(start, start + length)
        kept = keep(case.keys[rows, None, None], case.columns, 64, round(p * 65536) - 32768)[..., :length]
        assert ((of_all[rows, :, :length] > 0) == kept).all()
    assert (of_first.unflatten(1, (case.heads, 64)) == of_all[case.first]).all()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [8, 100, 300])
def test_drop(width, dtype):
    """The bits of `masked`, of x and of its gradient, whose rows may be strided."""
    keys, columns = Pairs([19]).keys, columns_of(3, 1, width, CPU)[0]
    x = torch.randn(19, width + 4).to(dtype)[:, :width].requires_grad_()
    got = kernels.drop(x, keys, columns, 0.1)
    assert torch.equal(got, masked(x, 0.1, keys[:, None], columns))
    gradient = torch.randn(width, 19).to(dtype).T
    (of_x,) = torch.autograd.grad(got, x, gradient)
    assert torch.equal(of_x, masked(gradient, 0.1, keys[:, None], columns))
    assert torch.equal(kernels.drop(x, keys, columns, 0.0), x)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"width": 384, "rows": 5},
        {"dtype": torch.float16},
        {"dtype": torch.float16, "residual": torch.float16},
        {"p": 0.0, "more": 4},
        {"p": 0.5, "rows": 1},
    ],
    ids=str,
)
def test_add_norm(case, used):
    assert_exact(Norm(**case), used)


def test_add_norm_of_more_rows_than_programs():
    assert_exact(Norm(rows=300, width=16), (True, True))


def assert_exact(case: Norm, used: tuple[bool, bool]) -> None:
    got, expected = case.run(used), case.exact(used)
    assert [x.dtype for x in got] == [torch.float32, case.dtype, case.dtype, case.residual, *[torch.float32] * 2]
    bound = BOUNDS[torch.float16 if torch.float16 in (case.dtype, case.residual) else torch.float32]
    found = [difference(*pair) for pair in zip(got, expected, strict=True)]
    assert max(found) < bound, found
    kept = keep(case.keys[:, None], case.columns, case.width, round(case.p * 65536) - 32768)
    assert ((got[2] != 0) == kept).all()


def test_the_same_bits_again():
    case, norm = Pairs([33, 64, 5]), Norm(rows=40)
    qkv = case.random(case.tokens, 3 * case.hidden)

    def all_of_it():
        out = kernels.attend(qkv, *case.arguments())
        first = kernels.attend_first(out[case.first], qkv[:, case.hidden :], *case.arguments())
        (gradient,) = torch.autograd.grad(first.square().sum() + out.square().sum(), qkv)
        return [out, first, gradient, *norm.run()]

    for once, again in zip(all_of_it(), all_of_it(), strict=True):
        assert torch.equal(once, again)
