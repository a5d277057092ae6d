"""Text is read once a node, into a cache that knows its sources; no rank reads it again, and none keeps it."""

import json
import os
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import crossrank, losses

from tests.made_pairs import texts_of, tokenize
from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.data import spooling, stored
from trainer.data.builtin import make_tokenizer
from trainer.data.builtin import pairs as builtin_pairs
from trainer.data.join import Part, join
from trainer.data.load import load_pairs
from trainer.data.spool import Spool
from trainer.rows import limits

ROWS = [{name: row[name] for name in ("premise", "hypothesis", "label")} for row in builtin_pairs("dev")[:60]]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(*paths, **fields):
    return load_pairs(DataConfig(train_file=[*map(str, paths)], **fields), "train")[0]


def scored(*paths):
    return load_pairs(DataConfig(train_file=[*map(str, paths)]), "train", objective="mse")[0]


@pytest.fixture
def reads(monkeypatch):
    """What is read from now on."""
    found, write = [], spooling._Writer.write
    monkeypatch.setattr(spooling._Writer, "write", lambda self: (found.append(self.reading.places), write(self))[1])
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_cached_file_is_not_read(tmp_path, reads):
    path = write(tmp_path / "a.jsonl")
    pairs = load(path)
    assert texts_of(pairs) == [(row["premise"], row["hypothesis"]) for row in ROWS]
    again = load(path, max_train_samples=7)
    assert texts_of(again) == texts_of(pairs)[:7]
    assert reads == [[str(path)]]
    tokens = tokenize(pairs, make_tokenizer(), 64, tmp_path / "other")
    path.touch()  # the same, as far as nobody looks
    touched = load(path)
    assert len(reads) == 2
    assert tokenize(touched, make_tokenizer(), 64, tmp_path / "other").fingerprint == tokens.fingerprint
    assert len(list((tmp_path / "other").glob("tokens/*/facts.json"))) == 1
    write(path, ROWS[:50])
    assert len(load(path)) == 50
    texts = tmp_path / "cache" / "texts"
    for folder in texts.glob("*/"):
        os.utime(folder, (1, 1))
    write(path, ROWS[:40])
    assert len(load(path)) == 40
    assert len(list(texts.glob("*/facts.json"))) == 1, "what a file once held is left behind"


def test_verify_data_reads_all(tmp_path, reads, said):
    path = write(tmp_path / "a.jsonl")
    known = path.stat()
    load(path)
    load(path, verify_data=True)
    assert len(reads) == 2
    assert not [line for line in said if "not what it was" in line]
    write(path, [ROWS[1], ROWS[0], *ROWS[2:]])
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert texts_of(load(path))[0] == (ROWS[0]["premise"], ROWS[0]["hypothesis"]), "it cannot know"
    assert texts_of(load(path, verify_data=True))[0] == (ROWS[1]["premise"], ROWS[1]["hypothesis"])
    assert any("not what it was when it was first read" in line for line in said)


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path, write_spool = write(tmp_path / "a.jsonl"), spooling._Writer.write

    def slowly(self):
        write_spool(self)
        with path.open("a") as file:
            file.write(json.dumps(ROWS[0]) + "\n")

    monkeypatch.setattr(spooling._Writer, "write", slowly)
    with pytest.raises(UserError, match=r"a\.jsonl: it changed while it was read; start again when it is complete"):
        load(path)
    monkeypatch.undo()
    assert len(load(path)) == len(ROWS) + 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"premise": "sentence1"}, r"train-01\.jsonl: no column 'premise', which .*train-00\.jsonl has; it has"),
        ({"label": "gold"}, r"train-01\.jsonl: no column 'label', which .*train-00\.jsonl has"),
        ({"more": "source"}, r"train-01\.jsonl: a column 'source', which .*train-00\.jsonl does not have"),
    ],
)
def test_shards_of_differing_columns(tmp_path, change, match):
    rows = [row | {"more": "x"} for row in ROWS]
    write(tmp_path / "train-00.jsonl", rows)
    write(tmp_path / "train-01.jsonl", [{change.get(name, name): own for name, own in row.items()} for row in rows])
    with pytest.raises(UserError, match=match):
        load(tmp_path / "train-*.jsonl")


def test_a_full_disk(tmp_path):
    """The system's limit of a file's size, which root has too."""
    path = write(tmp_path / "a.jsonl", ROWS * 400)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        from trainer.data.load import load_splits

        with pytest.raises(UserError, match=r"the cache of the data cannot be written: .*set CROSSRANK_CACHE to"):
            load_splits(DataConfig(train_file=[str(path)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(load(path)) == len(ROWS) * 400


def test_what_is_gone_is_not_for_want_of_room(tmp_path):
    error = FileNotFoundError(2, "No such file or directory", str(tmp_path / "pairs"))
    assert f"has lost a file: {tmp_path / 'pairs'}: No such" in str(stored.no_room(tmp_path, error))
    assert "cannot be written" in str(stored.no_room(tmp_path, OSError(28, "No space left on device", str(tmp_path))))


def test_many_rows_without_text(tmp_path, monkeypatch):
    """Without a label they are left out, but not without end."""
    rows = [row | ({"premise": None, "label": -1} if place % 2 else {}) for place, row in enumerate(ROWS)]
    assert len(load(write(tmp_path / "a.jsonl", rows))) == len(ROWS) // 2
    monkeypatch.setattr(spooling, "MOST_FAULTS", 20)
    with pytest.raises(UserError, match="more than 20 rows without text, the first of them row 1: premise is null"):
        load(write(tmp_path / "b.jsonl", rows))


def test_what_a_run_shows_survives_its_cache(tmp_path, cache):
    import shutil

    pairs = load(write(tmp_path / "a.jsonl"))
    pairs.texts.hold()
    shutil.rmtree(cache)
    assert pairs.texts.some([3, 1, 3]) == [(ROWS[i]["premise"], ROWS[i]["hypothesis"]) for i in (3, 1, 3)]


def test_many_distinct_labels_and_small_numbers(tmp_path):
    rows = [row | {"label": place / 8} for place, row in enumerate(ROWS)]
    pairs = scored(write(tmp_path / "a.jsonl", rows))
    assert pairs.targets.tolist() == [place / 8 for place in range(len(ROWS))]
    classes = load(write(tmp_path / "b.jsonl"))
    assert (classes.label.dtype, classes.row.dtype) == (np.int8, np.int8)


def test_very_many_scores_are_kept_as_numbers(tmp_path, monkeypatch):
    """The same targets as of few; and what is no score is said with its row, before and after there are many."""
    rows = [row | {"label": (place * 37 % 50) / 8} for place, row in enumerate(ROWS)]
    few = scored(write(tmp_path / "few.jsonl", rows))
    monkeypatch.setattr(spooling, "MOST_LABELS", 20)
    monkeypatch.setattr(limits, "ROWS", 10)
    many = scored(write(tmp_path / "many.jsonl", rows))
    assert many.texts.spools[0].labels.scores is not None
    assert (few.values == many.values).all()
    assert (few.label == many.label).all()
    with pytest.raises(UserError, match=r"many.jsonl: the labels are numbers, and too many different ones for classes"):
        load(tmp_path / "many.jsonl")
    for row in (3, 55):
        bad = [*rows[:row], rows[row] | {"label": "high"}, *rows[row + 1 :]]
        with pytest.raises(UserError, match=rf"bad.jsonl, row {row}: label is 'high', and there are more than 20"):
            scored(write(tmp_path / "bad.jsonl", bad), tmp_path / "few.jsonl")


def test_too_many_sources_are_not_told_apart(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spooling, "MOST_SOURCES", 20)
    rows = [row | {"source": f"document {place}", "genre": "abc"[place % 3]} for place, row in enumerate(ROWS)]
    path = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level("INFO"):
        pairs = load(path)
    assert "a.jsonl: its column source has more than" in caplog.text
    assert (pairs.sizes, len(pairs)) == ({"a": 20, "b": 20, "c": 20}, 60)
    with pytest.raises(UserError, match="different values, which is too many for max_samples_per_source"):
        load(path, max_samples_per_source=1)


@pytest.mark.parametrize(
    "fields",
    [{}, {"label_map": ["neutral=contradiction"]}, {"max_train_samples": 3 << 20}, {"max_samples_per_source": 1 << 19}],
)
def test_many_pairs_are_joined_in_few_bytes_each(fields):
    """Beside what is mapped: rows and labels in their smallest types, and a mask or two."""
    count = 1 << 22
    arrays = {"label": np.arange(count, dtype=np.int32) % 3, "source": np.arange(count, dtype=np.int32) % 4}
    lists = {"labels": ["entailment", "neutral", "contradiction"], "coded": {"source": [*"abcd"]}, "faults": {}}
    arrays["lists"] = np.frombuffer(json.dumps(lists).encode(), np.uint8)
    facts = {
        "places": ["a.parquet"],
        "sizes": [count],
        "own_names": None,
        "columns": ["premise", "hypothesis", "label"],
    }
    part = Part("a", Spool(stored.Stored(Path("a"), arrays, facts)))
    config = DataConfig(train_file=["a.parquet"], **fields)
    tracemalloc.start()
    try:
        pairs = join([part], config, "train", None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pairs.source_names == ("a", "b", "c", "d")
    assert (pairs.row[:3].tolist(), pairs.source[:5].tolist()) == ([0, 1, 2], [0, 1, 2, 3, 0])
    assert len(pairs) == fields.get("max_train_samples", count if "max_samples_per_source" not in fields else 1 << 21)
    assert peak / count < 14


SCRIPT = """
import os, sys
from trainer import __main__
from trainer.data import spooling, tokenize
tokenize.MANY = 10
def told(name, function):
    def inner(*args):
        with open(os.environ["SAID"], "a") as file:
            file.write(f"{name} {os.environ.get('RANK', 0)}\\\\n")
        return function(*args)
    return inner
spooling._Writer.write = told("read", spooling._Writer.write)
tokenize._write_share = told("tokenised", tokenize._write_share)
sys.exit(__main__.main(sys.argv[1:]))
""".replace("\\\\n", "\\n")


def test_one_rank_reads_and_all_tokenise(tmp_path):
    """And a start with a cache does neither."""
    script, said = tmp_path / "run.py", tmp_path / "said"
    script.write_text(SCRIPT)
    path = write(tmp_path / "a.jsonl")
    command = ["train", "--recipe", "demo", "--dataset_name", "null", "--train_file", path, "--max_steps", "2",
               "--eval_strategy", "no", "--load_best_model_at_end", "false", "--metric_for_best_model", "null",
               "--logging_steps", "1", "--track_emissions", "false", "--write_report", "false"]  # fmt: skip
    crossrank(*command, "--output_dir", tmp_path / "one", ranks=3, script=script, SAID=str(said))
    assert sorted(said.read_text().splitlines()) == ["read 0", "tokenised 0", "tokenised 1", "tokenised 2"]
    (made,) = (tmp_path / "cache" / "tokens").glob("*/facts.json")
    shared = stored.stored(made.parent)
    said.unlink()
    crossrank(*command, "--output_dir", tmp_path / "two", ranks=3, script=script, SAID=str(said))
    assert not said.exists()
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    alone = tokenize(load(path), make_tokenizer(), 128)
    assert shared.facts["fingerprint"] == alone.fingerprint
    assert all((shared.arrays[name] == getattr(alone, name)).all() for name in ("ids", "offsets", "lengths", "used"))
