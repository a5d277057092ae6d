"""The embedded data: what its labels rest on, and what would make it too easy."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trainer.data.builtin import CONTRADICTION, ENTAILMENT, NEUTRAL, SPLIT_SIZES, judge, pairs

SCENE = ("in a park", "three", "old", "dogs", "are running")


@pytest.mark.parametrize(
    ("slot", "word", "label"),
    [
        (0, "outside", ENTAILMENT),
        (0, "in a kitchen", CONTRADICTION),
        (1, "at least three", ENTAILMENT),
        (1, "two", CONTRADICTION),
        (2, "", ENTAILMENT),
        (3, "animals", ENTAILMENT),
        (3, "cats", CONTRADICTION),
        (4, "are moving", ENTAILMENT),
        (4, "are not sleeping", ENTAILMENT),
        (4, "are not moving", CONTRADICTION),
    ],
)
def test_labels_follow_from_meanings(slot, word, label):
    changed = (*SCENE[:slot], word, *SCENE[slot + 1 :])
    assert judge(SCENE, changed) == label
    assert judge(changed, SCENE) == (CONTRADICTION if label == CONTRADICTION else NEUTRAL)


def test_pairs_are_distinct_and_splits_disjoint():
    rows = [(row["premise"], row["hypothesis"]) for split in SPLIT_SIZES for row in pairs(split)]
    assert len(rows) == len(set(rows)) == sum(SPLIT_SIZES.values())


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_classes_are_balanced(split):
    counts = Counter(row["label"] for row in pairs(split))
    assert len(set(counts.values())) == 1
    assert len({row["source"] for row in pairs(split)}) == 5


def test_the_same_in_every_process():
    code = "from trainer.data.builtin import pairs; print(pairs('dev'))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def bag_of_words_accuracy(text) -> float:
    words = CountVectorizer(token_pattern=r"\S+")
    train, dev = pairs("train"), pairs("dev")
    model = LogisticRegression(max_iter=300).fit(words.fit_transform(map(text, train)), [r["label"] for r in train])
    return model.score(words.transform(map(text, dev)), [r["label"] for r in dev])


def test_words_alone_do_not_solve_it():
    assert bag_of_words_accuracy(lambda row: row["hypothesis"]) < 0.4
    both = lambda row: row["hypothesis"] + " ".join(f" premise:{word}" for word in row["premise"].split())  # noqa: E731
    assert bag_of_words_accuracy(both) < 0.75


def test_the_model_reads_any_text(builtin_model):
    tokenizer = AutoTokenizer.from_pretrained(builtin_model)
    model = AutoModelForSequenceClassification.from_pretrained(builtin_model)
    inputs = tokenizer([["Zebras jump, don't they?", "R2D2 (a robot) ate 19 apples!"]], return_tensors="pt")
    assert tokenizer.unk_token_id not in inputs["input_ids"]
    assert model(**inputs).logits.shape == (1, 3)


def test_unknown_split():
    with pytest.raises(ValueError, match="train, dev, test"):
        pairs("validation")
