"""Memory of a rank, and time to the first step, by pairs and ranks, with and without a cache of the data.

    python -m benchmarks.data --pairs 100000 1000000 --ranks 1 2 4 [--before OTHER_CHECKOUT]

The pairs are those of --data, repeated, each premise with a number of its own so that no two are alike, in shards of a
million rows. With --long_words a premise is one word of 144 characters, and the tokenizer one of entire words: text of
many gigabytes is then tokenised in minutes. A run takes three steps of a tiny model. Memory is the largest that a rank
has had, looked at ten times a second: RSS counts what ranks share once for each, PSS divides it among them, private is
what is a rank's own.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

SHARD = 1_000_000
STEPS = 3


def write_pairs(folder: Path, data: Path, count: int, long_words: bool) -> Path:
    """A folder of parquet shards, which is made once."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    place = folder / f"{'long' if long_words else 'pairs'}-{count}"
    if (place / "ready").exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    rows = parquet.read_table(data / "train.parquet", columns=["premise", "hypothesis", "label"])
    shards = -(-count // SHARD)
    for shard in range(shards):
        size, parts = min(SHARD, count - shard * SHARD), []
        for start in range(0, size, rows.num_rows):
            part = rows.slice(0, min(rows.num_rows, size - start))
            first = shard * SHARD + start
            numbers = pa.array(range(10**8 + first, 10**8 + first + part.num_rows)).cast(pa.string())
            text = pc.binary_repeat(numbers, 16)
            if not long_words:
                text = pc.binary_join_element_wise(part["premise"].cast(pa.string()), numbers, " ")
            parts.append(part.set_column(0, "premise", text))
        parquet.write_table(pa.concat_tables(parts), place / f"train-{shard:05d}-of-{shards:05d}.parquet")
    (place / "ready").touch()
    return place


def word_model(folder: Path, pairs: Path) -> Path:
    """The builtin model with a tokenizer of the hypotheses' first words, which takes any other for unknown."""
    from pyarrow import parquet
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    from trainer.data.builtin import make_config

    place, config = folder / "word-model", make_config()
    texts = parquet.read_table(sorted(pairs.glob("*.parquet"))[0], columns=["hypothesis"])["hypothesis"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = list(
        dict.fromkeys([*special, *(word for text in texts.slice(0, 1000).to_pylist() for word in text.split())])
    )
    own = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words[: config.vocab_size])}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=128, **names).save_pretrained(place)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(place)
    return place


def memory(process: Path) -> dict[str, int]:
    """MiB of a process that is still there."""
    text = (process / "smaps_rollup").read_text()
    found = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"rss": found["Rss"] // 1024, "pss": found["Pss"] // 1024, "private": private // 1024}


def ranks_below(parent: int) -> list[Path]:
    """The ranks among the processes that a launcher has started, or the one process that it is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            started_by = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if b"crossrank" in command and (started_by == parent or int(process.name) == parent):
            found.append(process)
    return [process for process in found if int(process.name) != parent] or found


def measure(root: Path, pairs: Path, ranks: int, cache: Path, form: Path) -> dict[str, Any]:
    """A run of a few steps: the most that any rank, and that all of them, had at once; seconds to the first step."""
    start = [sys.executable, "-m", "crossrank"]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
                 "crossrank"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        own = ["train", "--config", str(form), "--train_file", str(pairs / "train-*.parquet"), "--max_steps",
               str(STEPS), "--output_dir", f"{folder}/run"]  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root), "CROSSRANK_CACHE": str(cache)}
        began, first, peak = time.time(), None, {"rss": 0, "pss": 0, "private": 0, "all_pss": 0}
        log = Path(folder) / "log"
        with log.open("w") as output:
            run = subprocess.Popen([*start, *own], env=environment, cwd=root, stdout=output, stderr=output)
            while run.poll() is None:
                told = []
                for process in ranks_below(run.pid):
                    try:
                        told.append(memory(process))
                    except (OSError, KeyError):
                        continue
                for name in ("rss", "pss", "private"):
                    peak[name] = max([peak[name], *(rank[name] for rank in told)])
                peak["all_pss"] = max(peak["all_pss"], sum(rank["pss"] for rank in told))
                if first is None and "step 1:" in log.read_text():
                    first = time.time() - began
                time.sleep(0.1)
        if run.returncode != 0:
            sys.exit(log.read_text())
    return {"first_step_seconds": first, **peak}


FORM = """
model_name_or_path: {model}
train_batch_size: 64
logging_steps: 1
save_strategy: "no"
write_report: false
track_emissions: false
"""


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--long_words", action="store_true")
    options.add_argument("--before", type=Path, default=None, help="another checkout, measured beside this one")
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "crossrank-pairs")
    chosen = options.parse_args()
    rows: list[dict[str, Any]] = []
    form = chosen.folder / "form.yaml"
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for count in chosen.pairs:
        pairs = write_pairs(chosen.folder, chosen.data, count, chosen.long_words)
        model = word_model(chosen.folder, pairs) if chosen.long_words else "builtin"
        form.write_text(FORM.format(model=model))
        for ranks in chosen.ranks:
            for name, root in {"before": chosen.before, "now": common.ROOT}.items():
                if root is None:
                    continue
                with tempfile.TemporaryDirectory(dir=chosen.folder) as cache:
                    for state in ("cold", "warm"):
                        found = measure(root, pairs, ranks, Path(cache), form)
                        rows.append({"code": name, "pairs": count, "ranks": ranks, "cache": state, **found})
                        print(", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}"
                                        for k, v in rows[-1].items()), flush=True)  # fmt: skip
    common.save("data", argparse.Namespace(**vars(chosen)), {"runs": rows})


if __name__ == "__main__":
    main()
