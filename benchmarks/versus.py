"""Side by side with a peer, alternating: training or evaluation, as ratios. See vs_sentence_transformers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import common


def main(peer: str, what: tuple[str, ...], steps: int = 40, window: int = 10) -> None:
    options = common.parser(__doc__)
    options.add_argument("--what", choices=what, default=what[0])
    options.add_argument("--steps", type=int, default=steps, help="of a training run; the first window is not timed")
    options.add_argument("--window", type=int, default=window, help="steps between log events")
    options.add_argument("--pairs", type=int, default=2000, help="of an evaluation")
    chosen = options.parse_args()
    ours, theirs = "crossrank", peer
    if chosen.what == "evaluation":
        ours, theirs = f"{ours}_evaluation", f"{theirs}_evaluation"
    model = common.model_folder(chosen.model, chosen.tokenizer)
    settings: list[object] = ["--model", model, "--data", chosen.data, "--batch", chosen.batch, "--bf16", chosen.bf16]
    settings += ["--steps", chosen.steps, "--window", chosen.window, "--pairs", chosen.pairs]
    if chosen.what == "evaluation":
        settings[1] = with_classes(model)
    contenders = {name: [name, *settings] for name in (ours, theirs)}
    runs = common.alternate(contenders, chosen.rounds, "benchmarks.contenders")
    speed = common.ratio(runs[ours], runs[theirs], "samples_per_second")
    print(f"{ours} / {theirs}: {speed['ratio']:.2f} (rounds {speed['lowest']:.2f} to {speed['highest']:.2f})")
    memory = "peak_gpu_mb" if "peak_gpu_mb" in runs[ours][0] else "peak_rss_mb"
    result = {
        "samples_per_second": speed,
        "median_samples_per_second": {name: common.median(runs[name], "samples_per_second") for name in runs},
        memory: {name: common.median(runs[name], memory) for name in runs},
        "runs": runs,
    }
    number_format = "bf16" if chosen.bf16 else "fp32"
    common.save(f"{chosen.what}-vs-{peer}-{chosen.model.split('/')[-1]}-{number_format}", chosen, result)


def with_classes(folder: Any) -> Path:
    """The model as a classifier of three classes, which evaluation needs; a bare encoder gets a head from seed 0."""
    import tempfile

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier = Path(tempfile.mkdtemp(prefix="crossrank-classifier-"))
    torch.manual_seed(0)
    names = dict(enumerate(("entailment", "neutral", "contradiction")))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, id2label=names, label2id={name: i for i, name in names.items()}
    )
    model.save_pretrained(classifier)
    AutoTokenizer.from_pretrained(folder).save_pretrained(classifier)
    return classifier
