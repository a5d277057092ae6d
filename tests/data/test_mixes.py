"""Several files, globs, folders, pipes and data sets: what a source is called, their classes, rows and weights."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from test_sources import ROWS, write

from tests.made_pairs import premises_of, sources_of
from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.data.load import load_pairs, load_splits, split_name
from trainer.data.mix import Mix
from trainer.data.sampler import GlobalBatchSampler, epoch_order
from trainer.labels.values import NLI
from trainer.rows import pipes
from trainer.rows.files import find_sources
from trainer.rows.places import Place, at, rows_at
from trainer.run.about import of_files, of_sources, padding


def rows(*labels, **more):
    return [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": label} | more for i, label in enumerate(labels)]


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("premise,hypothesis,label\na,b,x\nc,d,y\n")
    return folder


def named(folder, *items):
    """Of each source its name and files."""
    found = find_sources([item.replace("@", f"{folder}/") for item in items], "train_file")
    return {source.name: [str(path.relative_to(folder)) for path in source.paths] for source in found}


@pytest.mark.parametrize(
    ("files", "items", "expected"),
    [
        (["snli.csv", "fever.csv"], ["@snli.csv", "@fever.csv"], {"snli": 1, "fever": 1}),
        (["b.csv", "a.csv", "c.tsv"], ["@*.csv"], {"a": 1, "b": 1}),
        (["snli/train.csv", "mnli/train.csv"], ["@*/train.csv"], {"mnli": 1, "snli": 1}),
        (["snli/data/train.csv", "anli.csv"], ["@**/*.csv"], {"anli": 1, "snli": 1}),
        (["x/a.csv", "x/a.tsv", "b.csv"], ["@x/a.csv", "@b.csv"], {"a": 1, "b": 1}),
        (["x/r1.csv", "y/r1.csv", "y/r2.csv"], ["@x/r1.csv", "@y/r1.csv", "@y/r2.csv"], {"x": 1, "y": 1, "r2": 1}),
        (["snli/0000.csv", "snli/0001.csv", "w.csv"], ["@snli", "@w.csv"], {"snli": 2, "w": 1}),
        (["s/train-00000-of-00002.csv", "s/train-00001-of-00002.csv"], ["@s"], {"s": 2}),
        (["s/wanli-0.csv", "s/wanli-1.csv", "s/news-2019.csv", "s/news-2020.csv"], ["@s"],
         {"news-2019": 1, "news-2020": 1, "wanli-0": 1, "wanli-1": 1}),
        (["part-00000.csv", "part-00001.csv", "b.csv"], ["mine=@part-*", "@b.csv"], {"mine": 2, "b": 1}),
        (["s/part-1.csv", "s/part-2.csv", "t/part-1.csv"], ["@s/*", "@t"], {"s": 2, "t": 1}),
        (["a=b.csv", "c.csv"], ["@a=b.csv", "@c.csv"], {"a=b": 1, "c": 1}),
        (["s/a.csv", "s/README.md", "s/.hidden", "s/dataset_infos.json", "s/readme.txt"], ["@s"], {"a": 1}),
        (["data.csv"], ["@data.csv"], {"data": 1}),
    ],
)  # fmt: skip
def test_what_sources_are_called(tmp_path, files, items, expected):
    found = named(make(tmp_path, *files), *items)
    assert {name: len(paths) for name, paths in found.items()} == expected
    assert list(found) == list(expected)
    assert all(paths == sorted(paths) for paths in found.values())


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["@*.jsonl"], r"\*\.jsonl: no file matches"),
        (["@a.csv", "@x/../a.csv"], "the same file twice"),
        (["@a.csv", "@*.csv"], "the same file twice"),
        (["@mixed"], "files of several kinds, as b.csv and b.tsv"),
        (["@mixed/*"], "files of several kinds, as b.csv and b.tsv"),
        (["@splits"], r"several splits, as sick_test.csv and sick_train.csv; .*splits/\*train\*"),
        (["@empty"], "a folder without data files.*it has folders"),
        (["n=@a.csv", "n=@b.csv"], "two files called 'n'"),
        (["n=@a.csv", "N=@n.csv"], "would both be called 'n'"),
        ([".n=@a.csv"], "no name that a file may have"),
    ],
)
def test_items_that_cannot_be_meant(tmp_path, items, expected):
    make(tmp_path, "a.csv", "b.csv", "n.csv", "x/c.csv", "mixed/b.csv", "mixed/b.tsv", "splits/sick_train.csv",
         "splits/sick_test.csv", "empty/README.md", "empty/inner/a.csv")  # fmt: skip
    with pytest.raises(UserError, match=expected):
        named(tmp_path, *items)


def mixed(tmp_path, **fields):
    """Three sources of 4, 6 and 2 pairs with other names for the columns; the second has a row without a label."""
    write(tmp_path / "snli.csv", rows(*NLI, "entailment"))
    write(tmp_path / "fever.jsonl", [{"sentence1": f"p{i}", "sentence2": "h", "gold_label": name}
                                     for i, name in enumerate(("-", *NLI, *NLI))])  # fmt: skip
    write(tmp_path / "two.parquet", rows("entailment", "contradiction"))
    files = [str(tmp_path / name) for name in ("snli.csv", "fever.jsonl", "two.parquet")]
    return DataConfig(**{"train_file": files} | fields)


def test_files_are_joined_in_order(tmp_path):
    (pairs,) = load_pairs(mixed(tmp_path), "train")
    assert sources_of(pairs) == ["snli"] * 4 + ["fever"] * 6 + ["two"] * 2
    assert (pairs.label_names, pairs.label[-2:].tolist()) == (NLI, [0, 2])
    assert pairs.row.tolist() == [0, 1, 2, 3, *range(5, 13)]
    assert pairs.at(3) == f"{tmp_path / 'snli.csv'}, row 3"
    assert pairs.at(4) == f"{tmp_path / 'fever.jsonl'}, row 1"
    assert pairs.at(11) == f"{tmp_path / 'two.parquet'}, row 1"
    assert pairs.all_at([11, 4, 5]) == f"{tmp_path / 'fever.jsonl'}, rows 1, 2; {tmp_path / 'two.parquet'}, row 1"
    assert (pairs.num_dropped, pairs.sizes) == (1, {"snli": 4, "fever": 6, "two": 2})
    assert pairs.split == "snli+fever+two-train"
    assert "12 pairs of snli 4, fever 6, two 2 (1 more dropped" in pairs.describe()
    assert of_files(DataConfig(), pairs)["file"] == "snli.csv, fever.jsonl and two.parquet"


def test_first_of_each_source_and_of_all(tmp_path, said):
    (pairs,) = load_pairs(mixed(tmp_path, max_samples_per_source=3), "train")
    assert pairs.sizes == {"snli": 3, "fever": 3, "two": 2}
    (pairs,) = load_pairs(mixed(tmp_path, max_samples_per_source=3, max_train_samples=5), "train")
    assert pairs.sizes == {"snli": 3, "fever": 2}
    assert f"the first 5 pairs are none of {tmp_path / 'two.parquet'}; max_samples_per_source" in " ".join(said)
    assert "first 5 of 12" in pairs.describe()


def test_a_column_of_sources_wins(tmp_path):
    one = write(tmp_path / "a.jsonl", rows("x", "y", source="s"))
    two = write(tmp_path / "b.jsonl", rows("x", "y", genre="g"))
    assert sources_of(load_pairs(DataConfig(train_file=[str(one), str(two)]), "train")[0]) == ["s", "s", "b", "b"]
    assert sources_of(load_pairs(DataConfig(train_file=[str(two)]), "train")[0]) == ["g", "g"]
    assert sources_of(load_pairs(DataConfig(train_file=[str(one)], max_samples_per_source=1), "train")[0]) == ["s"]


def test_shards_are_one_source(tmp_path):
    """By themselves they lack classes, and numbers of these mean something else."""
    for number, labels in enumerate(([0, 0], [1, 2], [1, 0])):
        write(tmp_path / f"train-0000{number}-of-00003.parquet", rows(*labels))
    (pairs,) = load_pairs(DataConfig(train_file=str(tmp_path)), "train")
    assert (pairs.label.tolist(), pairs.label_names, sources_of(pairs)) == ([0, 0, 1, 2, 1, 0], NLI, None)
    assert pairs.at(3) == f"{tmp_path / 'train-00001-of-00003.parquet'}, row 1"
    assert pairs.split == f"{tmp_path.name}-train"
    write(tmp_path / "train-00002-of-00003.parquet", rows(1, 7))
    with pytest.raises(UserError, match=r"00002-of-00003\.parquet, row 1: class numbers must run"):
        load_pairs(DataConfig(train_file=str(tmp_path)), "train")


@pytest.mark.parametrize(
    ("first", "second", "fields", "expected"),
    [
        (NLI, ("entailment", "not_entailment"), {}, "different classes: .*a.csv has entailment, neutral, contradiction"
         ", and .*b.csv has entailment, not_entailment; .*--label_map.*--label_names"),
        (("x", "y"), ("y", "z", "x"), {}, None),
        (("x", "y"), ("y", "z"), {}, "different classes"),
        (NLI, (0, 1, 2), {}, "labels of .*b.csv are numbers, and those of .*a.csv are names"),
        ((0, 1, 2), (0, 1), {}, "different classes: .*a.csv has .*b.csv has LABEL_0, LABEL_1"),
        (NLI, (0, 1, 2), {"label_names": NLI}, None),
    ],
)  # fmt: skip
def test_classes_of_several_sources(tmp_path, first, second, fields, expected):
    files = [str(write(tmp_path / name, rows(*own))) for name, own in (("a.csv", first), ("b.csv", second))]
    if expected is None:
        (pairs,) = load_pairs(DataConfig(train_file=files, **fields), "train")
        names = [str(NLI[own] if own in (0, 1, 2) else own) for own in (*first, *second)]
        assert [pairs.label_names[number] for number in pairs.label] == names
        return
    with pytest.raises(UserError, match=expected):
        load_pairs(DataConfig(train_file=files, **fields), "train")


def test_every_test_file_is_a_test_set(tmp_path):
    make(tmp_path, "rte.csv", "hans/test.csv", "snli-test.csv")
    items = ["rte.csv", "hans/test.csv", "snli-test.csv"]
    splits = load_splits(mixed(tmp_path, train_file=[str(tmp_path / "rte.csv")],
                               test_file=[str(tmp_path / item) for item in items]))  # fmt: skip
    assert {key: pairs.split for key, pairs in splits.items()} == {
        "train": "rte-train", "test": "rte-test", "test 2": "hans-test", "test 3": "snli-test"
    }  # fmt: skip
    assert splits["test 2"].files == ("test.csv",)
    with pytest.raises(UserError, match="two test sets would be called 'snli-test'"):
        load_pairs(DataConfig(test_file=[f"snli={tmp_path / 'rte.csv'}", str(tmp_path / "snli-test.csv")]), "test")
    alone = load_pairs(DataConfig(dataset_name="x/all-nli", test_file=str(tmp_path / "hans" / "test.csv")), "test")
    assert [pairs.split for pairs in alone] == ["AllNLI-test"]


def test_several_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = {}
    for folder, labels in {"snli": [0, 1, 2], "x/glue": [2, 1, 0], "y/glue": [0, 1, 2]}.items():
        own = datasets.Features(premise=datasets.Value("string"), hypothesis=datasets.Value("string"),
                                label=datasets.ClassLabel(names=list(NLI)))  # fmt: skip
        split = datasets.Dataset.from_list(rows(*labels), features=own)
        names[folder] = str(tmp_path / folder)
        splits = {"train": split, "test": split} | ({"dev": split} if folder != "snli" else {})
        datasets.DatasetDict(splits).save_to_disk(names[folder])
    splits = load_splits(DataConfig(dataset_name=[names["snli"], names["x/glue"]]))
    assert sources_of(splits["train"]) == ["snli"] * 3 + ["glue"] * 3
    assert splits["train"].label.tolist() == [0, 1, 2, 2, 1, 0]
    assert {key: own.split for key, own in splits.items()} == {
        "train": "snli+glue-train", "dev": "glue-dev", "test": "snli-test", "test 2": "glue-test"
    }  # fmt: skip
    both = sources_of(load_pairs(DataConfig(dataset_name=[names["x/glue"], names["y/glue"]]), "train")[0])
    assert {name[-6:] for name in both} == {"x-glue", "y-glue"}
    with pytest.raises(UserError, match=r"names .* twice"):
        load_splits(DataConfig(dataset_name=[names["snli"], names["snli"]]))
    with pytest.raises(UserError, match="dataset_revision is that of one"):
        load_splits(DataConfig(dataset_name=["a/b", "c/d"], dataset_revision="main"))


def test_names_and_configurations():
    from trainer.rows.splits import named_sets

    assert named_sets(["nyu-mll/glue:rte", "glue/x", "a/b"], "pair") == [
        ("glue", "nyu-mll/glue", "rte"), ("x", "glue/x", "pair"), ("b", "a/b", "pair")
    ]  # fmt: skip
    assert [title for title, _, _ in named_sets(["glue:rte", "glue:mnli"], None)] == ["glue-rte", "glue-mnli"]


SICK = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"


def test_sick_as_it_is_published(tmp_path):
    """Made-up rows in its layout."""
    lines = [f'{i}\tA man {i} sings\tNobody "sings"\t3.{i}\t{name.upper()}\n' for i, name in enumerate(NLI)]
    (tmp_path / "SICK_train.txt").write_text(SICK + "".join(lines))
    (pairs,) = load_pairs(DataConfig(train_file=str(tmp_path / "SICK_train.txt")), "train")
    assert (pairs.label_names, pairs.columns[2]) == (tuple(name.upper() for name in NLI), "entailment_judgment")
    with pytest.raises(UserError, match=r"3\.1 are scores, not classes; --objective mse"):
        load_pairs(DataConfig(train_file=str(tmp_path / "SICK_train.txt"), label_column="relatedness_score"), "train")


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "a.jsonl.gz"])
def test_a_pipe_is_read(tmp_path, name):
    file = write(tmp_path / name, ROWS)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(file.read_bytes()))
    writer.start()
    (pairs,) = load_pairs(DataConfig(train_file=f"mine={tmp_path / 'pipe'}"), "train")
    writer.join()
    assert (premises_of(pairs), pairs.at(1)) == ([row["premise"] for row in ROWS], f"{tmp_path / 'pipe'}, row 1")
    assert pairs.split == "mine-train"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"", "stdin: no rows"), (b"just words\n", "neither parquet nor jsonl"), (b"\x1f\x8bx", "damaged gzip"),
     (b"premise,hypothesis,label\na,b,x,y\n", "/stdin: cannot be read as csv"),
     (b'{"premise": 1}\n{]\n', "/stdin, row 1: not a JSON object")],
)  # fmt: skip
def test_stdin(tmp_path, monkeypatch, text, expected):
    """A file that a shell has put there is not known by its name either."""
    (tmp_path / "stdin").write_bytes(text)
    monkeypatch.setattr(pipes, "STREAMS", (str(tmp_path),))
    config = DataConfig(train_file=str(tmp_path / "stdin"))
    with pytest.raises(UserError, match=expected):
        load_pairs(config, "train")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="stdin reaches only one rank"):
        load_pairs(config, "train")


def test_places():
    shards = Place.joined(["a", "b"], [2, 3])
    place = Place.joined([shards, "c", "d", "e"], [5, 1, 2, 9])
    assert [at(place, row) for row in (1, 2, 5, 6, 8)] == ["a, row 1", "b, row 0", "c, row 0", "d, row 0", "e, row 0"]
    assert place == "a, b and 3 more"
    assert rows_at(place, [9, 3, 2, 0], 3) == "a, row 0; b, rows 0, 1, ..."
    assert at("x", 4) == "x, row 4"


def mix(tmp_path, weights):
    (pairs,) = load_pairs(mixed(tmp_path), "train")
    return Mix.of([f"{name}={weight}" for name, weight in weights.items()], pairs), pairs


def sampler(mix, num_steps=60, seed=42):
    return GlobalBatchSampler(len(mix), 4, seed, num_steps, "f", mix)


def test_weights_say_how_often_an_epoch_has_a_pair(tmp_path):
    made, pairs = mix(tmp_path, {"snli": 2.5, "fever": 0.5})
    assert (len(made), made.sizes) == (10 + 3 + 2, [10, 3, 2])
    epochs = [np.bincount(sampler(made).order(epoch), minlength=12) for epoch in range(40)]
    for counts in epochs:
        assert (counts[:4].sum(), counts[4:10].sum(), counts[10:].tolist()) == (10, 3, [1, 1])
        assert set(counts[:4]) == {2, 3}
        assert set(counts[4:10]) == {0, 1}
    assert len({tuple(counts) for counts in epochs}) > 30
    assert min(sum(epochs)[4:10]) > 10  # every pair has its turn
    assert sampler(made).order(3).tolist() == sampler(mix(tmp_path, {"snli": 2.5, "fever": 0.5})[0]).order(3).tolist()
    assert sampler(made, seed=7).order(3).tolist() != sampler(made).order(3).tolist()
    assert of_sources(pairs, made)["sources"][0] == {"name": "snli", "size": 4, "weight": 2.5, "epoch_size": 10}


def test_weights_of_one_are_the_order_without(tmp_path):
    made, _ = mix(tmp_path, {"snli": 1, "fever": "1.0"})
    assert sampler(made).order(2).tolist() == epoch_order(12, 42, 2).tolist()


def test_steps_of_a_mix(tmp_path):
    made, _ = mix(tmp_path, {"snli": 2, "fever": 0.5})
    whole = [step.rows.tolist() for step in sampler(made).steps()]
    assert [len(own) for own in whole[:5]] == [4, 4, 4, 1, 4]
    assert [sampler(made).at(step).rows.tolist() for step in range(60)] == whole
    start = sampler(made).seek(sampler(made).position(7))
    assert [step.rows.tolist() for step in sampler(made).steps(start)] == whole[7:]
    lengths = np.arange(1, 13) ** 2
    lengths[7] = 1000  # in some epochs only
    heaviest, longest = sampler(made).extremes(lengths)
    assert 7 in longest.rows
    assert lengths[heaviest.rows].sum() == max(lengths[own].sum() for own in whole)
    first = sampler(made).order(0)
    assert padding(lengths, sampler(made))["tokens"] == lengths[first].sum()


def test_another_mix_is_another_run(tmp_path):
    made, _ = mix(tmp_path, {"snli": 2, "fever": 0.5})
    other, _ = mix(tmp_path, {"snli": 0.5, "fever": 1.5})
    plain = GlobalBatchSampler(len(made), 4, 42, 60, "f")
    for one, two in ((made, other), (made, None), (None, made)):
        samplers = [plain if own is None else sampler(own) for own in (one, two)]
        with pytest.raises(UserError, match=r"another order of samples; .*source_weights: saved"):
            samplers[1].seek(samplers[0].position(3))
    position = plain.position(3)
    del position["source_weights"]  # of an older version
    assert plain.seek(position) == 3


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"snil": 2}, "no source is called 'snil'; there are snli, fever, two"),
        ({"snli": "x"}, "'x' of snli is no number"),
        ({"snli": "nan"}, "'nan' of snli is no number"),
        ({"snli": 0}, "snli=0; leave the file out"),
        ({"snli": -1}, "snli=-1; a weight is positive"),
        ({"two": 0.1}, "0.1 of the 2 pairs of two is none"),
    ],
)
def test_bad_weights(tmp_path, weights, expected):
    with pytest.raises(UserError, match=expected):
        load_splits(mixed(tmp_path, source_weights=weights))


def test_weights_need_sources(tmp_path):
    config = DataConfig(train_file=str(write(tmp_path / "a.csv", rows("x", "y"))), source_weights="a=2")
    with pytest.raises(UserError, match="source_weights needs several sources"):
        load_splits(config)


def test_a_folder_beside_files(tmp_path):
    """It is neither left out nor taken without a word."""
    make(tmp_path, "a.csv", "more/b.csv")
    for item in ("@", "@*"):
        with pytest.raises(UserError, match=r"holds the folder more beside files"):
            named(tmp_path, item)
    assert named(tmp_path, "@*.csv") == {"a": ["a.csv"]}
    assert named(tmp_path, "@**/*") == {"a": ["a.csv"], "b": ["more/b.csv"]}


def test_a_file_in_memory_is_a_file():
    assert not pipes.is_stream(Path("/dev/shm/pairs.csv"))
    assert all(map(pipes.is_stream, map(Path, ("/dev/stdin", "/dev/fd/63"))))


@pytest.mark.parametrize(("title", "name"), [("latest", "latest-test"), ("rte-test", "rte-test"), ("test", "test")])
def test_what_a_set_is_called(title, name):
    assert split_name(title, "test") == name


def test_several_splits_in_one_file(tmp_path):
    """SICK.txt: what is tested on would be trained on."""
    (tmp_path / "SICK.txt").write_text(
        "sentence_A\tsentence_B\tentailment_label\tSemEval_set\na\tb\tNEUTRAL\tTRAIN\nc\td\tENTAILMENT\tTEST\n"
    )
    with pytest.raises(UserError, match=r"SemEval_set says that it holds several splits \(TRAIN, TEST\)"):
        load_pairs(DataConfig(train_file=str(tmp_path / "SICK.txt")), "train")


def test_a_column_with_another_files_name(tmp_path):
    make(tmp_path, "a.csv")
    (tmp_path / "b.csv").write_text("premise,hypothesis,label,source\na,b,x,a\nc,d,y,q\n")
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    with pytest.raises(UserError, match=r"b\.csv: its column source has 'a', which is what .*a\.csv is called"):
        load_pairs(DataConfig(train_file=files), "train")
    assert load_pairs(DataConfig(train_file=[f"first={files[0]}", files[1]]), "train")[0].sizes == {
        "first": 2, "a": 1, "q": 1}  # fmt: skip


def test_columns_that_differ_from_file_to_file(tmp_path):
    make(tmp_path, "a.csv")
    (tmp_path / "b.csv").write_text("question,answer,label\ne,f,x\ng,h,y\n")
    fields = {"premise_column": "premise,question", "hypothesis_column": ["hypothesis", "answer"]}
    (pairs,) = load_pairs(DataConfig(train_file=[str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], **fields), "train")
    assert premises_of(pairs) == ["a", "c", "e", "g"]
