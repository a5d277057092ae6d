"""Pairs in memory, tokens of them, and what the pairs of a split say."""

from dataclasses import replace

import numpy as np

from trainer.data.pairs import Pairs, Texts
from trainer.data.team import alone
from trainer.data.tokenize import in_memory
from trainer.data.tokenize import tokenize as on_disk
from trainer.data.tokens import Encoder


def made_pairs(texts, labels=None, names=("a", "b", "c"), source=None, place="test"):
    """`texts` are (premise, hypothesis); `source` names each pair's."""
    rows = np.arange(len(texts))
    own = Texts(place, rows, [premise for premise, _ in texts], [hypothesis for _, hypothesis in texts])
    labels = np.zeros(len(rows), np.int8) if labels is None else np.array(labels)
    known = list(dict.fromkeys(source or ()))
    codes = None if source is None else np.array([known.index(name) for name in source])
    return Pairs(place, rows, own, labels, codes, tuple(names), tuple(known))


def tokenize(pairs, tokenizer, max_length, folder=None):
    """As a single process does, in memory or with a cache."""
    encoder = Encoder(tokenizer, max_length)
    if folder is None:
        return replace(in_memory(pairs, encoder), fingerprint=encoder.fingerprint(pairs))
    return on_disk(pairs, encoder, alone(folder), "train")


def texts_of(pairs):
    return pairs.texts.some(range(len(pairs)))


def premises_of(pairs):
    return [premise for premise, _ in texts_of(pairs)]


def sources_of(pairs):
    """Each pair's; None = there are none."""
    return None if pairs.source is None else [pairs.source_of(number) for number in range(len(pairs))]
