"""What one training step sends to a GPU, counted without one: crossrank beside sentence-transformers and transformers.

    python -m benchmarks.launches [--model distilroberta|deberta-v3-small|modernbert-base] [--contenders NAME ...]

crossrank's step is what a GPU with Triton captures as a CUDA graph; crossrank_static the same without Triton, and
crossrank_plain the step that both are checked against. Operations as torch dispatches them, on 64 real pairs; see
benchmarks/fakecuda for what is and is not seen, and benchmarks/fakecuda/contenders.py for what is taken of the others.
Each contender has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.fakecuda import library

NAMES = ("crossrank", "crossrank_static", "crossrank_plain", "sentence_transformers", "transformers")


def count(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process."""
    library.load()
    from benchmarks.fakecuda.contenders import CONTENDERS

    folder = common.model_folder(settings.model, settings.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        settings.scratch = Path(scratch)
        return CONTENDERS[name](settings, folder)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: operations by cause, crossrank's order, then what the host does."""
    counts = {name: result["train"] for name, result in results.items()}
    causes = dict.fromkeys(cause for counted in counts.values() for cause in counted["by_cause"])
    lines = [["", *counts], ["---", *(["---:"] * len(counts))]]
    for cause in causes:
        lines.append([cause, *(str(sum(c["by_cause"].get(cause, {}).values())) for c in counts.values())])
    lines.append(["**operations**", *(f"**{counted['operations']}**" for counted in counts.values())])
    lines.append(["host reads", *(str(len(counted["host_reads"])) for counted in counts.values())])
    lines.append(["copies to the device", *(str(len(counted["copies_to_device"])) for counted in counts.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--contenders", nargs="+", choices=NAMES, default=[*NAMES])
    options.add_argument("--count", choices=NAMES, help="count this one in this process, and print JSON")
    settings = options.parse_args()
    if settings.count:
        print(json.dumps(count(settings.count, settings)))
        return
    common.model_folder(settings.model, settings.tokenizer)  # once for all
    given = [f"--{name}={getattr(settings, name)}" for name in ("model", "data", "tokenizer", "batch")]
    given.append(f"--bf16={str(settings.bf16).lower()}")
    results = {}
    for name in settings.contenders:
        results[name] = common.run_json("benchmarks.launches", "--count", name, *given)
    print(table(results))
    del settings.count, settings.rounds
    common.save(f"launches-{settings.model}", settings, {"contenders": results})


if __name__ == "__main__":
    main()
