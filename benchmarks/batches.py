"""Larger batches: speed against the pairs in a step; or the most pairs of a step that fit into a GPU's memory.

python -m benchmarks.batches [--batches 16 64 256]
python -m benchmarks.batches --largest distilroberta roberta-large [--memory-gib 24]
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from trainer.base.errors import out_of_memory

SHAPES: dict[str, dict[str, Any]] = {
    "distilroberta": {"model_type": "roberta", "num_hidden_layers": 6},
    "roberta-large": {"model_type": "roberta", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                      "intermediate_size": 4096},
    "deberta-v3-large": {"model_type": "deberta-v2", "hidden_size": 1024, "num_hidden_layers": 24,
                         "num_attention_heads": 16, "intermediate_size": 4096, "relative_attention": True,
                         "pos_att_type": ["p2c", "c2p"], "position_buckets": 256, "share_att_key": True,
                         "norm_rel_ebd": "layer_norm", "position_biased_input": False, "vocab_size": 128_100},
}  # fmt: skip


def largest(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The most pairs, by powers of two, whose forward and backward fit beside the optimizer's state; random tokens of
    AllNLI's mean length, in its number format."""
    import numpy as np
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from trainer.data.tokens import Tokens
    from trainer.model.cross_encoder import CrossEncoder
    from trainer.model.precision import autocast

    shape = {"vocab_size": 50265, "max_position_embeddings": 514, "num_labels": 3, "pad_token_id": 1} | SHAPES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.for_model(**shape)
    model = CrossEncoder(AutoModelForSequenceClassification.from_config(config)).to(device).train()
    parameters = list(model.parameters())
    fits, pairs = 0, 1
    try:
        moments = [torch.zeros_like(p) for p in parameters for _ in range(2)]
        while pairs <= chosen.limit:
            offsets = np.arange(pairs + 1) * chosen.tokens
            ids = np.full(offsets[-1], 5, np.uint16)
            types = np.arange(offsets[-1]) % chosen.tokens >= chosen.tokens // 2
            tokens = Tokens.of(ids, offsets, types, 0, "")
            rows = np.arange(pairs)
            batch = model.batch(tokens, np.zeros(pairs, int), rows, device, seed=1, step=1)
            with autocast(device, chosen.bf16):
                logits = model(batch)
            torch.nn.functional.cross_entropy(logits.float(), batch.labels).backward()
            del logits, batch
            fits, pairs = pairs, 2 * pairs
        del moments
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    return {"pairs": fits, "parameters": sum(p.numel() for p in parameters), "tokens_a_pair": chosen.tokens}


def speeds(chosen: argparse.Namespace) -> dict[str, Any]:
    model = common.model_folder(chosen.model, chosen.tokenizer)
    found = {}
    for batch in chosen.batches:
        settings = ["crossrank", "--model", model, "--data", chosen.data, "--batch", batch, "--bf16", chosen.bf16,
                    "--steps", chosen.steps, "--window", chosen.steps // 4,
                    "--more", f"per_device_train_batch_size={batch}"]  # fmt: skip
        found[str(batch)] = common.run_json("benchmarks.contenders", *settings)
        print(f"{batch} pairs a step: {found[str(batch)]['samples_per_second']:.1f} samples/s", flush=True)
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([int(batch) for batch in found], [run["samples_per_second"] for run in found.values()], "o-")
    axes.set(xscale="log", xlabel="pairs in a step", ylabel="pairs a second", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--largest", nargs="+", choices=SHAPES, help="of these shapes, in place of the speeds")
    options.add_argument("--limit", type=int, default=65_536, help="pairs at which --largest stops")
    options.add_argument("--tokens", type=int, default=27, help="of a pair, for --largest")
    options.add_argument("--memory-gib", type=float, default=None, help="what --largest may use of the GPU's memory")
    chosen = options.parse_args()
    number = "bf16" if chosen.bf16 else "fp32"
    if chosen.largest:
        common.limit_memory(chosen.memory_gib)
        result = {}
        for name in chosen.largest:
            result[name] = largest(name, chosen)
            gc.collect()
            torch.cuda.empty_cache()
        print(result)
        common.save(f"largest-batches-{number}", chosen, {"largest": result})
        return
    found = speeds(chosen)
    name = f"batches-{chosen.model.split('/')[-1]}-{number}"
    plot(found, common.save(name, chosen, {"runs": found}).with_suffix(".png"))


if __name__ == "__main__":
    main()
