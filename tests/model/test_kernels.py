"""The operators of kernels.py: their plain form against the eager model's pieces, their kernels by the interpreter.

The kernels need Triton, which torch's build for CPUs comes without. `make` puts it into a folder of its own, so that
only the processes that these tests start see it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from kernel_cases import CPU, Norm, Pairs, attend_differences, attend_first_differences, difference
from test_attention import make_tokens
from torch.library import opcheck

from trainer.model import kernels
from trainer.model.attention import AttentionSite, attention, projected
from trainer.model.batch import assemble
from trainer.model.layout import Layout
from trainer.model.masks import columns_of, masked

HEADS, SIZE, SITE = 2, 16, 5
HIDDEN = HEADS * SIZE


@pytest.fixture(scope="module")
def with_triton() -> dict[str, str]:
    """The environment of a process that has Triton."""
    folder = Path(os.environ.get("CROSSRANK_TRITON", ROOT / ".venv" / "triton"))
    if not (folder / "triton").is_dir():
        pytest.skip(f"Triton is not in {folder}; `make venv` puts it there, on Linux")
    path = os.pathsep.join(map(str, [folder, ROOT, ROOT / "tests", ROOT / "tests" / "model"]))
    return os.environ | {"PYTHONPATH": path}


def test_kernels_by_the_interpreter(with_triton):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", ROOT / "tests/model/interpreted_kernels.py"]
    env = with_triton | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([*map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout


def test_kernels_fit_gpus(with_triton, tmp_path):
    """Built for a desktop's GPU and a server's: their memory is enough, and threads keep their numbers in registers."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--targets", "86", "90", "--types", "bf16",
               "--longest", "128", "--results", tmp_path]  # fmt: skip
    env = with_triton | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run([*map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    built = json.loads((tmp_path / "kernels.json").read_text())["builds"]
    assert len(built) == 2 * 8
    for row in built:
        assert row["shared"] <= 99 * 1024, row
        assert row["spilled"] <= 128, row  # bytes a thread


def of_layout(lengths: list[int], p: float):
    """A batch in its layout, and the arguments of attention on it."""
    batch = assemble(make_tokens(lengths), np.zeros(len(lengths), int), np.arange(len(lengths)), CPU, seed=3, step=4)
    layout = Layout(unpad=True)
    layout.set(batch)
    columns = columns_of(SITE, HEADS, layout.longest, CPU)
    shared = (batch.first, batch.lengths, batch.keys, columns, p, SIZE**-0.5, layout.longest, HEADS)
    return layout, shared


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attend_is_the_models_attention(p):
    layout, shared = of_layout([7, 40, 12, 3, 25], p)
    module = SimpleNamespace(site=AttentionSite(layout, SITE, first_only=False))
    rows = [torch.randn(len(layout.batch.ids), 3 * HIDDEN, requires_grad=True)]
    rows.append(rows[0].detach().clone().requires_grad_())
    q, k, v = (projected(x[None], HEADS) for x in rows[0].chunk(3, 1))
    expected = attention(module, q, k, v, None, dropout=p)[0].flatten(2)[0]
    got = kernels.attend(rows[1], *shared)
    gradient = torch.randn_like(got)
    for y in (got, expected):
        y.backward(gradient)
    assert difference(got, expected) < 1e-6
    assert difference(rows[1].grad, rows[0].grad) < 1e-6


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attend_first_is_the_models_attention(p):
    layout, shared = of_layout([7, 40, 12, 3, 25], p)
    module = SimpleNamespace(site=AttentionSite(layout, SITE, first_only=True))
    q, kv = (
        torch.randn(5, HIDDEN, requires_grad=True),
        torch.randn(len(layout.batch.ids), 2 * HIDDEN, requires_grad=True),
    )
    keys, values = (projected(x[None], HEADS) for x in kv.chunk(2, 1))
    expected = attention(module, projected(q[:, None], HEADS), keys, values, None, dropout=p)[0].flatten(1)
    got = kernels.attend_first(q, kv, *shared)
    gradient = torch.randn_like(got)
    for ours, theirs in zip(
        (got, *torch.autograd.grad(got, (q, kv), gradient)),
        (expected, *torch.autograd.grad(expected, (q, kv), gradient)),
        strict=True,
    ):
        assert difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("differences", [attend_differences, attend_first_differences])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_attention_is_exact(dtype, differences):
    found = differences(Pairs([7, 64, 1, 103], p=0.1, dtype=dtype, more=4))
    assert max(found) < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_is_masked(dtype):
    keys, columns = Pairs([19]).keys, columns_of(3, 1, 30, CPU)[0]
    x = torch.randn(19, 30, dtype=dtype, requires_grad=True)
    expected, got = masked(x, 0.1, keys[:, None], columns), kernels.drop(x, keys, columns, 0.1)
    gradient = torch.randn_like(x)
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (got, expected)))
    assert torch.equal(kernels.drop(x, keys, columns, 0.0), x)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_add_norm_is_the_models(p, dtype, used):
    """Dropout, sum and norm of the eager model under autocast, whose next layer rounds the norm."""
    case = Norm(p=p, dtype=dtype)
    dropped = case.x if p == 0 else masked(case.x, p, case.keys[:, None], case.columns)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = torch.nn.functional.layer_norm(dropped + case.res, (case.width,), case.weight, case.bias, 1e-5)
    expected = case.with_gradients((y, y.to(dtype) + 0), case.leaves, case.gradients, used)
    # Where only one of them rounds up, numbers of 8 bits differ by 2**-8.
    bounds = [1e-6, *[1e-6 if dtype == torch.float32 else 1e-3] * 2, *[1e-6] * 3]
    for ours, theirs, bound in zip(case.run(used), expected, bounds, strict=True):
        assert ours.dtype == theirs.dtype
        assert difference(ours, theirs) < bound


def test_as_operators_of_torch():
    """Schema, shapes for tracing, and gradients as torch wants them."""
    case, norm = Pairs([7, 20, 5], size=16), Norm()
    qkv, q = case.random(case.tokens, 3 * case.hidden), case.random(3, case.hidden)
    kv, shared = case.random(case.tokens, 2 * case.hidden), case.arguments()
    of_all, of_first = torch.randn(case.tokens, case.hidden), torch.randn(3, case.hidden)
    opcheck(kernels.attend, (qkv, *shared))
    opcheck(kernels.attend_first, (q, kv, *shared))
    opcheck(kernels.attend_backward, (of_all, qkv.detach(), *shared))
    opcheck(kernels.attend_first_backward, (of_first, q.detach(), kv.detach(), *shared))
    for p in (0.0, 0.1):
        site = (norm.keys, norm.columns, p)
        opcheck(kernels.drop, (norm.x, *site))
        opcheck(kernels.add_norm, (*norm.leaves, 1e-5, *site))
        inner = [x.detach() for x in norm.leaves[:3]]
        opcheck(kernels.add_norm_backward, (norm.gradients[0], None, *inner, 1e-5, *site))


@pytest.mark.parametrize(
    "beyond", [{"longest": 129}, {"head_size": 129}, {"width": 4097}, {"longest": 128, "head_size": 65}]
)
def test_what_the_kernels_do_not_take(beyond):
    assert kernels.available(CPU, **dict.fromkeys(beyond, 64))
    assert not kernels.available(CPU, **beyond)
