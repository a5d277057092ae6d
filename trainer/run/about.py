"""about.json: what a reader of the model card wants to know of data, model and machine, noted before the first step.

It holds no more text than the card shows: a text of 100 kB is not carried along.
"""

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.base.arrays import counted
from trainer.base.files import write_json
from trainer.config import Config, DataConfig
from trainer.data.mix import Mix
from trainer.data.pairs import Pairs
from trainer.data.sampler import GlobalBatchSampler
from trainer.data.tokens import Split
from trainer.metrics import activated
from trainer.model.cross_encoder import CrossEncoder
from trainer.options import Objective
from trainer.ranks import World
from trainer.rows.places import listed
from trainer.rows.splits import named_sets
from trainer.run.versions import git_state, versions

FIRST = 1000  # rows that statistics are taken of, as sentence-transformers' cards do
SHOWN = 300  # characters of a text that the card shows
ERRORS = 10  # of a test set that the report shows
ENGLISH = ("all-nli", "snli", "multi_nli", "mnli", "builtin")


def about(
    config: Config,
    splits: dict[str, Split],
    sampler: GlobalBatchSampler,
    model: CrossEncoder,
    world: World,
    wiring: dict[str, Any],
) -> dict[str, Any]:
    """All of it; `wiring` says the backend and the number of nodes."""
    return {
        "working_folder": os.getcwd(),
        "started_at": now(),
        "dataset": of_dataset(config, splits["train"].pairs),
        "data": {
            role: of_split(split)
            | of_sources(split.pairs, sampler.mix if role == "train" else None)
            | of_files(config, split.pairs)
            for role, split in splits.items()
        },
        "padding": padding(splits["train"].tokens.lengths, sampler),
        "model": of_model(config, model),
        "hardware": hardware(world),
        "world_size": world.size,
        **wiring,
        "device": world.device.type,
        "global_batch_size": sampler.batch_size,
        "versions": versions(),
        "git": git_state(),
    }


def now() -> str:
    """Of UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def note(folder: Path, **facts: Any) -> None:
    """Adds what has become known of the run in `folder` since."""
    path = folder / "about.json"
    write_json(path, json.loads(path.read_text()) | facts)


def of_split(split: Split) -> dict[str, Any]:
    """Size, columns, statistics, three samples, token lengths: lengths[i] pairs have i tokens."""
    pairs, tokens = split.pairs, split.tokens
    first = pairs.texts.some(range(min(FIRST, len(pairs))))
    texts = [text_statistics([own[place] for own in first]) for place in (0, 1)]
    return {
        "name": split.name,
        "size": len(pairs),
        "dropped": pairs.num_dropped,
        "cut": tokens.num_cut,
        "columns": list(pairs.columns),
        "statistics": [*texts, label_statistics(pairs)],
        "samples": [
            [premise[: SHOWN + 1], hypothesis[: SHOWN + 1], pairs.targets_of(i).item()]
            for i, (premise, hypothesis) in enumerate(first[:3])
        ],
        "labels": counted(pairs.label, len(pairs.label_names)).tolist() if pairs.label_names else [],
        "mapped": pairs.mapped,
        "lengths": counted(tokens.lengths, int(tokens.lengths.max()) + 1).tolist(),
    }


def of_sources(pairs: Pairs, mix: Mix | None) -> dict[str, Any]:
    """How many pairs each source has, and in training how many an epoch has of it."""
    if not pairs.sizes:
        return {}
    sources = [{"name": name, "size": size} for name, size in pairs.sizes.items()]
    if mix is not None:
        for own, weight, size in zip(sources, mix.weights, mix.sizes, strict=True):
            own |= {"weight": float(weight), "epoch_size": size}
    return {"sources": sources}


def of_files(config: DataConfig, pairs: Pairs) -> dict[str, Any]:
    """The names of the split's own files, and what to call them where the data set has no name."""
    if not pairs.files:
        return {}
    return {"files": list(pairs.files)} | ({"file": listed(pairs.files)} if config.dataset_name is None else {})


def text_statistics(texts: list[str]) -> dict[str, Any]:
    """Lengths in characters."""
    lengths = [len(text) for text in texts]
    return {"type": "string", "min": min(lengths), "mean": float(np.mean(lengths)), "max": max(lengths)}


def label_statistics(pairs: Pairs) -> dict[str, Any]:
    """Shares of the classes that occur, or how large the targets are."""
    labels = pairs.targets_of(slice(FIRST))
    if not pairs.label_names:
        targets = labels.astype(np.float64)
        return {"type": "float", "min": targets.min(), "mean": targets.mean(), "max": targets.max()}
    numbers, counts = np.unique(labels, return_counts=True)
    shares = {str(n): float(c / len(labels)) for n, c in zip(numbers.tolist(), counts.tolist(), strict=True)}
    return {"type": "int", "shares": shares}


def example_scores(pairs: Pairs, logits: np.ndarray, objective: Objective) -> list[dict[str, Any]]:
    """The first five pairs that the card can show in full, with the model's scores (outputs,) for each."""
    some = (range(i, min(i + FIRST, len(pairs))) for i in range(0, len(pairs), FIRST))
    texts = ((i, own) for numbers in some for i, own in zip(numbers, pairs.texts.some(numbers), strict=True))
    chosen = list(islice(((i, own) for i, own in texts if max(map(len, own)) <= SHOWN), 5))
    scores = activated(logits[[i for i, _ in chosen]], objective)
    return [
        {"premise": premise, "hypothesis": hypothesis, "scores": own.tolist()}
        for (_, (premise, hypothesis)), own in zip(chosen, scores, strict=True)
    ]


def confident_errors(
    pairs: Pairs, scores: np.ndarray, objective: Objective, threshold: float | None = None
) -> list[dict[str, Any]]:
    """The wrong predictions that the model was surest of, the surest first.

    Args:
        scores: probabilities (n, classes); or (n, 1) of one score: the probability of label 1, or of mean squared error
            a number, and the largest differences are its errors.
        threshold: the probability from which on label 1 is predicted; where that is None, nothing is.
    """
    truth = pairs.targets
    names: Sequence[str] | None = pairs.label_names
    if objective == "cross_entropy":
        said, sure = scores.argmax(1), scores.max(1)
    elif objective == "mse":
        said, sure, names = scores[:, 0], np.abs(scores[:, 0] - truth), None
    elif threshold is None:
        return []
    else:
        said = (scores[:, 0] >= threshold).astype(int)
        sure = np.where(said, scores[:, 0], 1 - scores[:, 0])
    wrong = np.flatnonzero(said != truth)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")[:ERRORS]].tolist()
    return [
        {
            "row": int(pairs.row[i]),
            "source": pairs.source_of(i),
            "premise": premise[: SHOWN + 1],
            "hypothesis": hypothesis[: SHOWN + 1],
            "label": names[int(truth[i])] if names else float(truth[i]),
            "predicted": names[int(said[i])] if names else float(said[i]),
            "probability": float(sure[i]) if names else None,
        }
        for i, (premise, hypothesis) in zip(worst, pairs.texts.some(worst), strict=True)
    ]


def padding(lengths: np.ndarray, sampler: GlobalBatchSampler) -> dict[str, int]:
    """Tokens of the first epoch, and how many more its batches would have, each padded to its longest pair."""
    tokens = padded = 0
    for pairs, sums, longest in sampler.measure(lengths, 0):
        tokens += int(sums.sum())
        padded += int((pairs * longest).sum())
    return {"tokens": tokens, "padding": padded - tokens}


def of_dataset(config: DataConfig, train: Pairs) -> dict[str, Any]:
    """Its name, and its place on the hub where it has one; of local files nobody knows which revision they are.

    Of several, `hub_ids` are the places of those that are there.
    """
    sets, files = named_sets(config.dataset_name or [], config.dataset_config_name), config.has_files
    form = re.compile(r"[\w.-]+/[\w.-]+" if files else r"[\w.-]+(/[\w.-]+)?")
    on_hub = [name for _, name, _ in sets if name != "builtin" and not Path(name).exists() and form.fullmatch(name)]
    titles = [title for title, _, _ in sets] or list(train.files) or ["data"]
    return {
        "name": listed(titles),
        "hub_id": on_hub[0] if on_hub and len(sets) == 1 else None,
        "hub_ids": list(dict.fromkeys(on_hub)),
        "from_files": files,
        "revision": None if files or not on_hub else config.dataset_revision,
        "language": "en" if set(titles) <= {*ENGLISH} else None,
    }


def of_model(config: Config, model: CrossEncoder) -> dict[str, Any]:
    name, settings = config.model_name_or_path, model.model.config
    local = name == "builtin" or Path(name).exists()
    return {
        "base": Path(name.rstrip("/")).name if local else name,
        "hub_id": None if local else name,
        "revision": None if local else getattr(settings, "_commit_hash", None) or config.model_revision,
        "architecture": type(model.model).__name__,
        "num_parameters": model.num_parameters,
        "max_length": model.max_length,
        "label_names": model.label_names,
        "objective": model.objective,
        "lora": model.lora.describe(model.model) if model.lora else None,
    }


def hardware(world: World) -> dict[str, Any]:
    """This rank's machine; GPUs are counted over all ranks."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
        "gpus": world.size if gpu else 0,
        "ram_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "on_cloud": on_cloud(),
    }


def on_cloud() -> bool:
    """Whether the firmware names one of the three large clouds; asking their services would take a network."""
    try:
        firmware = Path("/sys/class/dmi/id")
        vendor, tag = ((firmware / name).read_text().strip() for name in ("sys_vendor", "chassis_asset_tag"))
    except OSError:
        return False
    return vendor in ("Amazon EC2", "Google") or tag in ("Amazon EC2", "7783-7084-3265-9085-8269-3286-77")  # Azure


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
