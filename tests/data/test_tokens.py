import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from tests.made_pairs import made_pairs, texts_of, tokenize
from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.data.builtin import pairs as builtin_pairs
from trainer.data.load import load_pairs
from trainer.model.batch import IGNORED, assemble


def make_pairs(rows):
    return made_pairs([(row["premise"], row["hypothesis"]) for row in rows], [row["label"] for row in rows])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """From a file, as a run has them."""
    path = tmp_path_factory.mktemp("pairs") / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in builtin_pairs("dev")[:300]))
    (pairs,) = load_pairs(DataConfig(train_file=[str(path)], label_names=["a", "b", "c"]), "train")
    return pairs


def columns(pairs):
    """Premises and hypotheses."""
    return [list(texts) for texts in zip(*texts_of(pairs), strict=True)]


@pytest.fixture(scope="module")
def tokenizer(builtin_model):
    return AutoTokenizer.from_pretrained(builtin_model)


@pytest.mark.parametrize("max_length", [128, 12])
def test_tokens_are_the_tokenizers(pairs, tokenizer, tmp_path, max_length):
    tokens = tokenize(pairs, tokenizer, max_length, tmp_path)
    reference = AutoTokenizer.from_pretrained(tokenizer.name_or_path)(
        *columns(pairs), truncation="longest_first", max_length=max_length
    )
    for i, (ids, types) in enumerate(zip(reference["input_ids"], reference["token_type_ids"], strict=True)):
        assert tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == ids
        assert tokens.types[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == types
    assert bool(tokens.num_cut) == (max_length == 12)
    assert tokens.bytes_per_pair < 100


def test_types_of_any_kind(pairs, tokenizer, tmp_path):
    """Funnel's first token has type 2, and another template puts ones first: what the tokenizer says is kept."""
    from tokenizers.processors import TemplateProcessing

    numbers = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS]:2 $A:1 [SEP]:0 $B:0 [SEP]:1", special_tokens=numbers
    )
    tokens = tokenize(pairs, other, 64, tmp_path)
    expected = other(*columns(pairs))["token_type_ids"]
    assert tokens.types.tolist() == [number for types in expected for number in types]
    assert set(expected[0]) == {0, 1, 2}
    rows = np.array([5, 1])
    batch = assemble(tokens, pairs.label, rows, torch.device("cpu"))
    assert batch.types.tolist() == [number for row in batch.rows for number in expected[row]]


@pytest.mark.parametrize("processor", [None, processors.ByteLevel(), processors.Sequence([processors.ByteLevel()])])
def test_types_that_no_post_processor_sets(pairs, tokenizer, tmp_path, processor):
    """The library's fast way leaves them out, and is then not taken."""
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    parts = json.loads(other.backend_tokenizer.to_str()) | {"post_processor": None}
    other._tokenizer = Tokenizer.from_str(json.dumps(parts))
    if processor:
        other._tokenizer.post_processor = processor
    tokens = tokenize(pairs, other, 12, tmp_path)
    expected = other(*columns(pairs), truncation="longest_first", max_length=12)
    assert tokens.types.tolist() == [number for types in expected["token_type_ids"] for number in types]
    assert tokens.types.any()


def test_real_tokenizer(allnli, roberta_tokenizer, tmp_path):
    """RoBERTa's tokens, which have no types: 27 a pair on average."""
    import pyarrow.parquet as pq

    pairs = make_pairs(pq.read_table(allnli / "train.parquet").slice(0, 2000).to_pylist())
    tokenizer = AutoTokenizer.from_pretrained(roberta_tokenizer)
    tokens = tokenize(pairs, tokenizer, 512)
    reference = AutoTokenizer.from_pretrained(roberta_tokenizer)(*columns(pairs))["input_ids"]
    assert tokens.ids.tolist() == [i for ids in reference for i in ids]
    assert not tokens.types.any()
    assert 26 < tokens.lengths.mean() < 28


def cached_file(folder):
    (file,) = folder.glob("tokens/*/ids.bin")
    return file


def test_cache_is_used_and_keyed(pairs, tokenizer, tmp_path, said):
    first = tokenize(pairs, tokenizer, 64, tmp_path)
    stamp = cached_file(tmp_path).stat().st_mtime_ns
    again = tokenize(pairs, tokenizer, 64, tmp_path)
    assert cached_file(tmp_path).stat().st_mtime_ns == stamp
    assert all((getattr(first, n) == getattr(again, n)).all() for n in ("ids", "offsets", "types", "lengths", "used"))
    assert (again.fingerprint, again.num_cut) == (first.fingerprint, first.num_cut)
    in_memory = tokenize(pairs, tokenizer, 64)
    assert in_memory.fingerprint == first.fingerprint
    assert all((getattr(first, n) == getattr(in_memory, n)).all() for n in ("ids", "offsets", "types", "lengths"))
    tokenize(pairs, tokenizer, 32, tmp_path)
    assert len(list(tmp_path.glob("tokens/*/facts.json"))) == 2
    assert not said


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "gone", "facts", "other array"])
def test_damaged_cache_is_rebuilt(pairs, tokenizer, tmp_path, damage, said):
    good = tokenize(pairs, tokenizer, 64, tmp_path)
    file = cached_file(tmp_path)
    expected, data = good.ids.copy(), bytearray(file.read_bytes())
    facts = file.with_name("facts.json")
    if damage == "flip":
        data[-5] ^= 1
    if damage in ("facts", "other array"):
        facts.write_text(
            facts.read_text()[:-5] if damage == "facts" else facts.read_text().replace('"ids"', '"numbers"')
        )
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"truncate": data[: len(data) // 2], "empty": b""}.get(damage, data))
    again = tokenize(pairs, tokenizer, 64, tmp_path)
    assert (again.ids == expected).all()
    assert len(said) == 1
    assert "damaged" in said[0]
    tokenize(pairs, tokenizer, 64, tmp_path)


def test_damage_in_a_large_cache(pairs, tokenizer, tmp_path, said, monkeypatch):
    """Not all of it is read at every start: its sizes and times are looked at, and all that --verify_data asks for."""
    from trainer.data import stored

    monkeypatch.setattr(stored, "SMALL", 0)
    tokenize(pairs, tokenizer, 64, tmp_path)
    file = cached_file(tmp_path)
    time, data = file.stat().st_mtime_ns, bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(time, time))
    assert stored.stored(file.parent) is not None
    assert stored.stored(file.parent, verify=True) is None
    os.utime(file)
    assert stored.stored(file.parent) is None
    assert all("damaged" in line for line in said)


def test_cache_that_cannot_be_written(pairs, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set CROSSRANK_CACHE to a folder"):
        tokenize(pairs, tokenizer, 64, tmp_path / "file")


WRITER = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from tests.made_pairs import tokenize
from trainer.config import DataConfig
from trainer.data import load, spooling, tokenize as disk
write, share = spooling._Writer.write, disk._write_share
spooling._Writer.write = lambda *a: (print("read"), write(*a))[1]
disk._write_share = lambda *a: (print("tokenised"), share(*a))[1]
(pairs,) = load.load_pairs(DataConfig(train_file=[sys.argv[2]]), "train")
tokenize(pairs, AutoTokenizer.from_pretrained(sys.argv[1]), 64, Path(sys.argv[3]))
"""


def test_one_process_reads_others_wait(builtin_model, tmp_path):
    """Three runs that begin together; what two of them have tokenised at once is the same."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in builtin_pairs("train")))
    command = [sys.executable, "-c", WRITER, str(builtin_model), str(data), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "".join(outputs).split().count("read") == 1
    assert len(list((tmp_path / "cache").glob("tokens/*/facts.json"))) == 1


def test_batches_lay_pairs_end_to_end(pairs, tokenizer, tmp_path):
    tokens = tokenize(pairs, tokenizer, 64, tmp_path)
    rows = np.array([7, 3, 200])
    batch = assemble(tokens, pairs.label, rows, torch.device("cpu"))
    assert sorted(batch.rows) == sorted(rows)
    assert (np.diff(tokens.lengths[batch.rows]) <= 0).all()
    rows = batch.rows
    expected = [tokens.ids[tokens.offsets[r] : tokens.offsets[r + 1]].tolist() for r in rows]
    assert batch.ids.tolist() == [i for ids in expected for i in ids]
    assert batch.positions.tolist() == [p for ids in expected for p in range(len(ids))]
    assert batch.pair.tolist() == [n for n, ids in enumerate(expected) for _ in ids]
    assert batch.ids[batch.first].tolist() == [ids[0] for ids in expected]
    assert batch.labels.tolist() == pairs.label[rows].tolist()
    lengths = [len(ids) for ids in expected]
    assert [(g.pairs, g.longest, g.tokens) for g in batch.groups] == [(3, max(lengths), sum(lengths))]
    assert batch.width.tolist() == [max(lengths)] * sum(lengths)
    one_each = assemble(tokens, pairs.label, rows, torch.device("cpu"), likeness=1.0)
    assert [group.longest for group in one_each.groups] == sorted(set(lengths), reverse=True)
    assert one_each.width.tolist() == [n for n in lengths for _ in range(n)]
    empty = assemble(tokens, pairs.label, rows[:0], torch.device("cpu"))
    assert empty.labels.tolist() == [IGNORED]


def other_tokenizers(roberta):
    """RoBERTa's, and one that adds no token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"dog": 0, "cat": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return [AutoTokenizer.from_pretrained(roberta), PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")]


@pytest.mark.parametrize("side", ["right", "left"])
def test_pairs_are_cut_as_the_library_cuts(builtin_model, roberta_tokenizer, side):
    rng = np.random.default_rng(0)
    words = ["dog", "cat", "animals", "xyz", "in a park"]
    texts = [[" ".join(rng.choice(words, n)) for n in rng.choice([1, 2, 3, 5, 8, 20, 60], 120)] for _ in range(2)]
    pairs = make_pairs([{"premise": p, "hypothesis": h, "label": 0} for p, h in zip(*texts, strict=True)])
    for tokenizer in (AutoTokenizer.from_pretrained(builtin_model), *other_tokenizers(roberta_tokenizer)):
        tokenizer.truncation_side = side
        full = tokenizer(*texts)["input_ids"]
        for max_length in (5, 6, 7, 12, 13, 31, 64):
            tokens = tokenize(pairs, tokenizer, max_length)
            reference = tokenizer(*texts, truncation="longest_first", max_length=max_length)
            assert tokens.ids.tolist() == [i for ids in reference["input_ids"] for i in ids]
            assert tokens.num_cut == sum(len(ids) > max_length for ids in full)
            if "token_type_ids" in reference:
                assert tokens.types.tolist() == [t for types in reference["token_type_ids"] for t in types]


MEMORY = """
import resource, sys
from tests.data.test_tokens import make_pairs
from tests.made_pairs import tokenize
from trainer.data.builtin import make_tokenizer
def peak(words):
    row = {"premise": "dogs " * words, "hypothesis": "cats " * words, "label": 0}
    tokenize(make_pairs([row] * 4), make_tokenizer(), 128)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
small = peak(10)
print(peak(6000) - small)
"""


def test_long_pairs_cost_what_their_text_costs():
    """Four pairs of 6,000 + 6,000 words; with what the library keeps, nearly 3 GB."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 300


def test_the_fingerprint_stays(pairs):
    """Of data as they usually are: else no older run could be resumed."""
    from trainer.data.builtin import make_tokenizer

    rows = make_pairs(builtin_pairs("dev")[:100])
    expected = "5bda0aeddfec0f1c33049ddeb96aa3f5757a2eeb42b23c3eddd9d29f8484b75d"
    assert tokenize(rows, make_tokenizer(), 12).fingerprint == expected
