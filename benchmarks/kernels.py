"""The Triton kernels: what each needs of a GPU, built for several, which takes none; on a GPU also how fast they are.

    python -m benchmarks.kernels [--targets 86 90] [--types bf16] [--longest 128]

Needs Triton, on PYTHONPATH where torch's build comes without it. Heads have 64 features, of 768. A spilled register is
a number that a thread has to keep in memory; GPUs of compute capability 8.6 and 8.9 have 99 KiB of shared memory for a
program. Times are medians, of a forward and of a forward with backward, and beside them those of torch's operations.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import common
from trainer.model import kernels
from trainer.model.attention import AttentionSite, attention, projected
from trainer.model.batch import Batch, assemble
from trainer.model.layout import Layout
from trainer.model.masks import columns_of, masked

HEADS, HIDDEN, P, SCALING, SITE = 12, 768, 0.1, 64**-0.5, 1
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
LENGTHS = [103, 70, 62, 55, 50, 46, 43, 40, *range(38, 22, -1), *[22] * 8, *[20] * 8, *[18] * 8, *[15] * 8, *[12] * 8]


def launches(number: torch.dtype, longest: int) -> list[tuple[Any, dict[str, Any], dict[str, Any], int]]:
    """Kernel, arguments, constants and warps of every launch, caught in place of it."""
    from trainer.model import triton_kernels

    caught: list[tuple[Any, dict[str, Any], dict[str, Any], int]] = []

    def catch(
        kernel: Any, grid: Any, arguments: dict[str, Any], constants: dict[str, Any], warps: int, device: Any
    ) -> None:
        caught.append((kernel, arguments, constants, warps))

    x, first, exact = torch.empty(32, HIDDEN, dtype=number), torch.zeros(1, dtype=torch.int64), torch.empty(32, HIDDEN)
    qkv, kv, weight = (torch.empty(*shape, dtype=number) for shape in ((32, 3 * HIDDEN), (32, 2 * HIDDEN), (HIDDEN,)))
    columns = columns_of(SITE, HEADS, longest, torch.device("cpu"))
    pairs = (first, first, first, columns, P, SCALING, longest, HEADS)
    norm = (1e-5, first, columns[0], P)
    plain, triton_kernels.launch = triton_kernels.launch, catch
    try:
        triton_kernels.attend(qkv, *pairs)
        triton_kernels.attend_backward(x, qkv, *pairs)
        triton_kernels.attend_first(x[:1], kv, *pairs)
        triton_kernels.attend_first_backward(x[:1], x[:1], kv, *pairs)
        triton_kernels.drop(x, first, columns[0], P)
        triton_kernels.add_norm(x, exact, weight.float(), weight.float(), *norm)
        triton_kernels.add_norm_backward(exact, x, x, exact, weight.float(), *norm)
    finally:
        triton_kernels.launch = plain
    return caught


def build(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], warps: int, target: int) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, and bytes of shared memory of a program, as on sm_`target`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, known, divisible = {}, dict(constants), {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        value = arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            known.setdefault(name, value)
        else:
            signature[name] = "i32"
        # As a launch finds them: torch's memory begins at multiples of 16, and widths are such.
        aligned = isinstance(value, torch.Tensor) and not parameter.do_not_specialize_on_alignment
        whole = (
            isinstance(value, int) and signature[name] == "i32" and value % 16 == 0 and not parameter.do_not_specialize
        )
        if aligned or whole:
            divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, known, divisible)
    options = {"num_warps": warps, "num_stages": 1}
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {
        **assembled(built.asm["ptx"], Path(triton.__file__).parent),
        "shared": built.metadata.shared,
        "warps": warps,
    }


def assembled(ptx: str, triton: Path) -> dict[str, int]:
    """What NVIDIA's assembler, which Triton brings, says of a kernel."""
    chip = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert chip is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton / "backends" / "nvidia" / "bin" / "ptxas", "-v", f"--gpu-name={chip[1]}", file.name]
        said = subprocess.run(
            [*map(str, command), "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None
    assert spilled is not None
    return {"registers": int(registers[1]), "spilled": int(spilled[1])}


def builds(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for target in chosen.targets:
        for name in chosen.types:
            done = set()
            for longest in chosen.longest:
                for kernel, arguments, constants, warps in launches(TYPES[name], longest):
                    # Only attention is built for a length.
                    shape = {"longest": longest} if "SIZE" in constants else {"width": HIDDEN}
                    if (kernel.__name__, *shape.items()) in done:
                        continue
                    done.add((kernel.__name__, *shape.items()))
                    found = build(kernel, arguments, constants, warps, target)
                    row = {"kernel": kernel.__name__, "target": f"sm_{target}", "type": name, **shape, **found}
                    print(row, flush=True)
                    yield row


def milliseconds(work: Callable[[], Any], device: torch.device, rounds: int = 50) -> float:
    """Median of `rounds`, after ten that warm up."""
    times = []
    for number in range(rounds + 10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 10:
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def make_batch(device: torch.device) -> Batch:
    """64 pairs of the lengths that pairs of NLI have."""
    from trainer.data.tokens import Tokens

    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    tokens = Tokens.of(np.full(offsets[-1], 5), offsets, np.zeros(offsets[-1], bool), 0, "")
    return assemble(tokens, np.zeros(len(LENGTHS), int), np.arange(len(LENGTHS)), device, seed=1, step=1)


def contenders(device: torch.device, number: torch.dtype) -> dict[str, dict[str, tuple[Callable[..., Any], list[Any]]]]:
    """For each operator, it and its equal in torch's operations, with the inputs that take a gradient."""
    batch, layout = make_batch(device), Layout(unpad=True)
    layout.set(batch)
    tokens, longest = len(batch.ids), layout.longest
    columns, site = columns_of(SITE, HEADS, longest, device), columns_of(SITE, 1, HIDDEN, device)[0]
    pairs = (batch.first, batch.lengths, batch.keys, columns, P, SCALING, longest, HEADS)
    modules = [SimpleNamespace(site=AttentionSite(layout, SITE, first_only=narrow)) for narrow in (False, True)]

    def random(*shape: int, dtype: torch.dtype = number) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    def eager(module: Any, *rows: torch.Tensor) -> torch.Tensor:
        query, key, value = (projected(x, HEADS) for x in rows)
        return attention(module, query, key, value, None, dropout=P)[0].flatten(2)

    def eager_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        summed = (masked(x, P, batch.keys[:, None], site) + residual).float()
        y = torch.nn.functional.layer_norm(summed, (HIDDEN,), weight, bias, 1e-5)
        return y, y.to(number)

    whole, few, kv, x = (
        random(tokens, 3 * HIDDEN),
        random(len(LENGTHS), HIDDEN),
        random(tokens, 2 * HIDDEN),
        random(tokens, HIDDEN),
    )
    exact = [x, random(tokens, HIDDEN, dtype=torch.float32), *(random(HIDDEN, dtype=torch.float32) for _ in range(2))]
    return {
        "attend": {
            "kernel": (lambda rows: kernels.attend(rows, *pairs), [whole]),
            "torch": (lambda rows: eager(modules[0], *rows[None].chunk(3, 2)), [whole]),
        },
        "attend_first": {
            "kernel": (lambda q, rows: kernels.attend_first(q, rows, *pairs), [few, kv]),
            "torch": (lambda q, rows: eager(modules[1], q[:, None], *rows[None].chunk(2, 2)), [few, kv]),
        },
        "drop": {
            "kernel": (lambda rows: kernels.drop(rows, batch.keys, site, P), [x]),
            "torch": (lambda rows: masked(rows, P, batch.keys[:, None], site), [x]),
        },
        "add_norm": {
            "kernel": (lambda *rows: kernels.add_norm(*rows, 1e-5, batch.keys, site, P), exact),
            "torch": (eager_norm, exact),
        },
    }


def timings(device: torch.device, number: torch.dtype, rounds: int) -> dict[str, Any]:
    """Milliseconds, as a host that waits for each sees them."""
    found: dict[str, Any] = {}
    for name, both in contenders(device, number).items():
        found[name] = {who: timed(work, inputs, device, rounds) for who, (work, inputs) in both.items()}
        print(name, found[name], flush=True)
    return found


def timed(work: Callable[..., Any], inputs: list[Any], device: torch.device, rounds: int) -> dict[str, float]:
    def results() -> tuple[torch.Tensor, ...]:
        found = work(*inputs)
        return found if isinstance(found, tuple) else (found,)

    gradients = [torch.ones_like(y) for y in results()]
    with torch.no_grad():
        forward = milliseconds(results, device, rounds)
    both = milliseconds(lambda: torch.autograd.grad(results(), inputs, gradients), device, rounds)
    return {"forward": forward, "both": both}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--targets", type=int, nargs="*", default=[80, 86, 89, 90], help="compute capabilities")
    options.add_argument("--types", nargs="+", choices=list(TYPES), default=["bf16", "fp32"])
    options.add_argument("--longest", type=int, nargs="+", default=[64, 128], help="tokens of the longest pair")
    options.add_argument("--rounds", type=int, default=50, help="timed repetitions")
    options.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="what is timed, if there")
    options.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the JSON file")
    options.add_argument("--name", default=None, help="name of the result's file")
    chosen = options.parse_args()
    result: dict[str, Any] = {"builds": list(builds(chosen))}
    if chosen.device.type != "cuda" or torch.cuda.is_available():
        timed = {name: timings(chosen.device, TYPES[name], chosen.rounds) for name in chosen.types}
        result["milliseconds"] = timed
    chosen.device = str(chosen.device)
    common.save("kernels", chosen, result)


if __name__ == "__main__":
    main()
