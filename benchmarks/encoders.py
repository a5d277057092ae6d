"""Whether a run is the same on any number of ranks, for the encoders and decoders that transformers has.

    python -m benchmarks.encoders [TYPE ...] [--sample 3 --seed 0]

A tiny model of each type, random weights, dropout 0.1, fp32, a dozen steps on the embedded data: the largest difference
of the losses between one rank and each other number of ranks and backend, or why a type does not run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

ASKED = """
bert roberta xlm-roberta camembert electra distilbert modernbert deberta-v2 deberta mpnet albert ernie rembert
megatron-bert roberta-prelayernorm xlm-roberta-xl nomic_bert gte eurobert longformer funnel gpt2 llama qwen2 qwen3 gemma
bart t5 convbert mobilebert big_bird xlnet
""".split()  # noqa: SIM905
# What configs call these sizes, and how large they are in a tiny model.
SIZES = {
    32: "hidden_size d_model n_embd emb_dim dim embedding_size pooler_hidden_size rnn_dim word_embed_proj_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_key_value_heads",
    48: "intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim d_inner hidden_dim ffn_dim n_inner dff",
    8: "head_dim d_kv d_head attention_head_size dim_head qk_nope_head_dim v_head_dim",
    162: "max_position_embeddings n_positions n_ctx",
}
# As published, which the types' default configs are not.
ODD: dict[str, dict[str, Any]] = {
    "funnel": {"block_sizes": [1, 1]},
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0, "conv_kernel_size": 3,
    },
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "modernbert": {"classifier_pooling": "mean"},
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}


def tiny_config(model_type: str, vocabulary: int, dropout: float = 0.0) -> Any:
    """The config of a tiny model of this type, with three classes. Its padding token is 0, its last token 3."""
    from transformers import AutoConfig

    from trainer.model.settings import set_dropout

    usual = AutoConfig.for_model(model_type).to_dict()
    sizes = {name: size for size, names in SIZES.items() for name in names.split() if usual.get(name) is not None}
    sizes |= {name: vocabulary for name in ("vocab_size", "n_words") if name in usual} | TOKENS
    sizes |= ODD.get(model_type, {})
    config = AutoConfig.for_model(model_type, **sizes, num_labels=3)
    set_dropout(config, dropout)
    return config


def save_tiny(model_type: str, folder: Path) -> None:
    """The folder of a tiny model, with the embedded data's tokenizer."""
    from transformers.utils import logging

    from trainer.data.builtin import make_tokenizer

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"  # the number 3, with which every pair ends
    make_tiny(tiny_config(model_type, len(tokenizer), dropout=0.1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny(config: Any) -> Any:
    """The model. Its weights are as large as a trained one's, so that a difference would show."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForSequenceClassification.from_config(config).parameters())
    if size > 3e6:
        raise ValueError(f"no tiny model can be made of its config: {size:,} parameters")
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def losses(model: Path, out: Path, ranks: int, backend: str) -> list[float]:
    """Of a run in processes of its own. Raises RuntimeError with the last line that it said."""
    command = [
        "train", "--recipe", "demo", "--model_name_or_path", model, "--output_dir", out, "--backend", backend,
        "--max_steps", 12, "--train_batch_size", 12, "--per_device_train_batch_size", 3, "--logging_steps", 1,
        "--bf16", "false", "--eval_strategy", "no", "--save_strategy", "no", "--write_report", "false",
        "--track_emissions", "false", "--max_test_samples", 8, "--max_eval_samples", 8, "--max_train_samples", 200,
    ]  # fmt: skip
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = multiprocessing.get_context("forkserver")
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {name: str(value) for name, value in own.items()} | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        processes.append(server.Process(target=_rank, args=([*map(str, command)], env, f"{out}.log")))
        processes[-1].start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(Path(f"{out}.log").read_text().strip().splitlines()[-1])
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "train"]


def _rank(arguments: list[str], env: dict[str, str], log: str) -> None:
    os.environ |= env
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from trainer.__main__ import main

    sys.exit(main(arguments))


def compare(model_type: str, folder: Path) -> dict[str, Any]:
    """The largest difference of the losses of each way to run it, or `why` it does not run."""
    import torch

    from trainer.model.families import FAMILIES

    row: dict[str, Any] = {"type": model_type, "unpadded": model_type in FAMILIES}
    try:
        save_tiny(model_type, folder / "model")
        one = losses(folder / "model", folder / "one", 1, "auto")
        for ranks, backend in ((2, "ddp"), (3, "ddp"), (2, "fsdp")):
            other = losses(folder / "model", folder / f"{ranks}-{backend}", ranks, backend)
            row[f"{ranks} {backend}"] = float((torch.tensor(one) - torch.tensor(other)).abs().max())
    except Exception as error:  # a type that does not run is a row of the table
        row["why"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def table() -> list[str]:
    """docs/models.md's table of model types, as Markdown."""
    from trainer.model.families import FAMILIES

    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [row("type", "same run", "unpadded", "last layer for first tokens only", "tested in")]
    lines.append(row(*["---"] * 5))
    for name, family in FAMILIES.items():
        lines.append(row(name, "yes", "yes", "yes" if family.trims else "no", "`test_attention.py`"))
    others = sorted(set(ASKED) - set(FAMILIES))
    return [*lines, *(row(name, "yes", "no", "no", "`test_calls.py`") for name in others)]


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as ALL

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("types", nargs="*", default=ASKED, metavar="TYPE", help="model types of transformers")
    options.add_argument("--sample", type=int, default=0, help="so many more of transformers' types, drawn by --seed")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--results", type=Path, default=None, help="file for the table as JSON")
    options.add_argument("--table", action="store_true", help="print docs/models.md's table of types, and end")
    given = options.parse_args()
    if given.table:
        print("\n".join(table()))
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    multiprocessing.set_forkserver_preload(
        ["trainer.train", "evaluate", "sklearn.metrics", "transformers.modeling_utils", "trainer.backends.fsdp"]
    )
    drawn = random.Random(given.seed).sample(sorted(set(ALL) - set(given.types)), given.sample)
    rows = []
    for model_type in [*given.types, *drawn]:
        with tempfile.TemporaryDirectory() as folder:
            row = compare(model_type, Path(folder))
        rows.append(row)
        figures = row.get("why") or ", ".join(f"{k} {v:.1e}" for k, v in row.items() if isinstance(v, float))
        print(f"{model_type:24} {'unpadded' if row['unpadded'] else 'padded':9} {figures}", flush=True)
    if given.results:
        given.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
