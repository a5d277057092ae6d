"""The embedded data set and a tiny model made from scratch: a first training run with no download.

The data come from a small grammar. A `Claim` is a sentence with its meaning: how many things (`counts`) fit a
description (`slots`). `judge` compares two meanings and so computes every label; no label is written by hand.

Invariants:
* `pairs` is pure: the same split is the same list in every process and on every machine.
* Every hypothesis is drawn first and then given one premise for each label. So the classes are exactly balanced and
  the hypothesis alone says nothing about the label.
* No (premise, hypothesis) pair occurs twice, neither in one split nor across splits.
* A pair whose label depends on how one reads it ("two dogs": exactly two, or two and maybe more?) is never emitted.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABEL_NAMES = ("entailment", "neutral", "contradiction")
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)

# Hypotheses per split; each one makes three pairs.
SPLIT_SIZES = {"train": 4000, "dev": 334, "test": 334}

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix")
CITIES = ("in London", "in Oslo", "in Paris", "in Rome")
COLOURS = ("black", "brown", "grey", "red", "white")
# Every word below is a kind of its key, and two different words of one level exclude each other.
THINGS = {
    "animal": ("cat", "dog", "horse"),
    "building": ("castle", "cottage", "tower"),
    "instrument": ("drum", "flute", "guitar"),
    "vehicle": ("boat", "tractor", "truck"),
}
ACTIVITIES = {
    "driving a vehicle": ("driving a boat", "driving a tractor", "driving a truck"),
    "making a drink": ("making coffee", "making lemonade", "making tea"),
    "playing a sport": ("playing football", "playing hockey", "playing tennis"),
    "playing an instrument": ("playing the drum", "playing the flute", "playing the guitar"),
}
# word -> the next wider one; nothing at all is wider than a colour or a city.
WIDER = {word: kind for kinds in (THINGS, ACTIVITIES) for kind, words in kinds.items() for word in words}
WIDER |= dict.fromkeys(CITIES + COLOURS, "")
# comparative -> (what is compared, whether the first one named has more of it)
COMPARATIVES = {
    "taller": ("height", True),
    "shorter": ("height", False),
    "older": ("age", True),
    "younger": ("age", False),
}

Count = tuple[float, float]  # the least and the greatest number of things which a claim allows
ANY_MORE = float("inf")
POLARITIES: dict[str, tuple[Count, ...]] = {"is": ((1, ANY_MORE),), "is not": ((0, 0),)}


def _quantities() -> dict[str, tuple[Count, ...]]:
    """Every quantity phrase with its possible readings; phrases of two or more readings are ambiguous."""
    table: dict[str, tuple[Count, ...]] = {"no": ((0, 0),), "some": ((1, ANY_MORE), (2, ANY_MORE))}
    for number, word in enumerate(("two", "three", "four"), start=2):
        table[word] = ((number, number), (number, ANY_MORE))
        table[f"exactly {word}"] = ((number, number),)
        table[f"at least {word}"] = ((number, ANY_MORE),)
        table[f"at most {word}"] = ((0, number),)
    return table


QUANTITIES = _quantities()


@dataclass(frozen=True)
class Claim:
    """A sentence and its meaning: the number of things about `topic` which fit all `slots` lies in `counts`."""

    text: str
    topic: tuple[str, ...]  # claims on different topics say nothing about each other
    slots: tuple[str, ...]  # the description; an empty slot leaves that side open
    counts: tuple[Count, ...]  # one per reading of the sentence
    single: bool = True  # the topic has one value per slot: one gift is not a dog and a cat, an owner may own both


def _covers(wide: str, narrow: str) -> bool:
    """Whether all that fits `narrow` fits `wide` too."""
    return wide in (narrow, WIDER.get(narrow))


def _project(count: Count, premise: Claim, hypothesis: Claim) -> Count:
    """What a premise of `count` things says about the number of things which fit the hypothesis."""
    if premise.topic != hypothesis.topic:
        return 0, ANY_MORE
    slots = list(zip(premise.slots, hypothesis.slots, strict=True))
    low, high = count
    clash = any(not _covers(p, h) and not _covers(h, p) for p, h in slots)
    if clash and premise.single and low > 0:
        return 0, 0
    # All dogs are animals, so at least two dogs make at least two animals, and at most two animals at most two dogs.
    wider = all(_covers(h, p) for p, h in slots)
    narrower = all(_covers(p, h) for p, h in slots)
    return (low if wider else 0), (high if narrower else ANY_MORE)


def _compare(known: Count, claimed: Count) -> int:
    """The label of a claimed count given the known one."""
    if known[0] > claimed[1] or known[1] < claimed[0]:
        return CONTRADICTION
    return ENTAILMENT if claimed[0] <= known[0] and known[1] <= claimed[1] else NEUTRAL


def judge(premise: Claim, hypothesis: Claim) -> int | None:
    """The label of a pair of one frame, or None where the readings of the two sentences disagree about it."""
    readings = itertools.product(premise.counts, hypothesis.counts)
    labels = {_compare(_project(known, premise, hypothesis), claimed) for known, claimed in readings}
    return labels.pop() if len(labels) == 1 else None


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part) + "."


def _gift(person: str, polarity: str, colour: str, noun: str) -> Claim:
    article = "an" if (colour + noun)[0] in "aeiou" else "a"
    return Claim(_words(person + "'s gift", polarity, article, colour, noun), (person,), (colour, noun), POLARITIES[polarity])


def _activity(person: str, polarity: str, activity: str, city: str) -> Claim:
    return Claim(_words(person, polarity, activity, city), (person,), (activity, city), POLARITIES[polarity])


def _possession(person: str, quantity: str, colour: str, noun: str) -> Claim:
    text = _words(person, "owns", quantity, colour, noun + "s")
    return Claim(text, (person,), (colour, noun), QUANTITIES[quantity], single=False)


def _comparison(people: tuple[str, str], comparative: str) -> Claim:
    first, second = people
    trait, first_has_more = COMPARATIVES[comparative]
    # "Anna is taller than Ben" and "Ben is shorter than Anna" get the same meaning: the taller one is Anna.
    winner = first if first_has_more else second
    return Claim(_words(first, "is", comparative, "than", second), (trait, *sorted(people)), (winner,), POLARITIES["is"])


THING_WORDS = (*THINGS, *itertools.chain(*THINGS.values()))
ACTIVITY_WORDS = (*ACTIVITIES, *itertools.chain(*ACTIVITIES.values()))
# A frame is a sentence maker with the values which each of its arguments may take.
FRAMES = (
    (_gift, (PEOPLE, tuple(POLARITIES), ("", *COLOURS), THING_WORDS)),
    (_activity, (PEOPLE, tuple(POLARITIES), ACTIVITY_WORDS, ("", *CITIES))),
    (_possession, (PEOPLE, tuple(QUANTITIES), ("", *COLOURS), THING_WORDS)),
    (_comparison, (tuple(itertools.permutations(PEOPLE, 2)), tuple(COMPARATIVES))),
)


def _neighbours(value: Any, options: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """The other values by relation: the wider ones, the narrower ones, the rest."""
    if isinstance(value, tuple):
        return (value[::-1],),
    wider = tuple(o for o in options if o == WIDER.get(value))
    narrower = tuple(o for o in options if WIDER.get(o) == value)
    rest = tuple(o for o in options if o not in (value, *wider, *narrower))
    return tuple(group for group in (wider, narrower, rest) if group)


@functools.cache
def _moves(index, place):
    options = FRAMES[index][1][place]
    return {value: _neighbours(value, options) for value in options}


CH=(1,1,1,2)
WN=1
def _vary(values: list[Any], index, rng: random.Random) -> list[Any]:
    changed = list(values)
    first=0 if index==3 else 1
    for place in rng.sample(range(first, len(values)), rng.choice(CH)):
        changed[place] = rng.choice(rng.choice(_moves(index,place)[values[place]]))
    return changed


def _source(frame: Callable[..., Claim], premise: list[Any], hypothesis: list[Any]) -> str:
    """The phenomenon which a reader has to master to see the label."""
    if frame in (_possession, _comparison):
        return "quantity" if frame is _possession else "role"
    if "is not" in (premise[1], hypothesis[1]):
        return "negation"
    word = 3 if frame is _gift else 2
    return "modifier" if premise[word] == hypothesis[word] else "lexical"

FW=(1,1,1,1)
def _draw(options, rng):
    g=[o for o in options if o in WIDER]
    if not g: return rng.choice(options)
    h=[o for o in options if o not in WIDER]
    return rng.choice(rng.choice((g,h)))
def _triple(rng: random.Random) -> list[dict[str, Any]]:
    """One hypothesis with a premise for each label: three rows in label order, fewer where no premise turned up."""
    index = rng.choices(range(4),FW)[0]
    frame, options = FRAMES[index]
    values = [_draw(option,rng) for option in options]
    hypothesis = frame(*values)
    rows: dict[int, dict[str, Any]] = {}
    for _ in range(20):
        varied = _vary(values, index, rng)
        premise = frame(*varied)
        label = judge(premise, hypothesis)
        if label is None or label in rows or premise.text == hypothesis.text:
            continue
        rows[label] = {"premise": premise.text, "hypothesis": hypothesis.text, "label": label,
                       "source": _source(frame, varied, values)}
        if len(rows) == len(LABEL_NAMES):
            break
    return [rows[label] for label in sorted(rows)]


def _triples() -> Iterator[list[dict[str, Any]]]:
    """Endless complete triples of which no pair was seen before."""
    rng = random.Random(2024)
    seen: set[tuple[str, str]] = set()
    while True:
        triple = _triple(rng)
        keys = {(row["premise"], row["hypothesis"]) for row in triple}
        if len(triple) == len(LABEL_NAMES) and not keys & seen:
            seen |= keys
            yield triple


@functools.cache
def _splits() -> dict[str, list[dict[str, Any]]]:
    """All splits; one stream cut in pieces, so that distinct in the stream means disjoint across the splits."""
    triples = _triples()
    return {
        split: list(itertools.chain.from_iterable(itertools.islice(triples, size)))
        for split, size in SPLIT_SIZES.items()
    }


def pairs(split: str) -> list[dict[str, Any]]:
    """The pairs of a split ("train", "dev" or "test"): 12,000, 1,002 and 1,002 of them.

    Each is {"premise": str, "hypothesis": str, "label": int, "source": str}; the label is an index in `LABEL_NAMES`
    and the source the phenomenon which decides it: "lexical", "modifier", "negation", "quantity" or "role".
    The rows are the caller's own copies, three in a row for each hypothesis: shuffle before training.
    Raises ValueError for any other split.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLIT_SIZES)}")
    return [dict(row) for row in _splits()[split]]


def _vocabulary() -> dict[str, int]:
    """Word piece -> id: the special tokens, all printable ASCII as pieces, the words of the training split."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    pieces = [*letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    texts = (row[side] for row in pairs("train") for side in ("premise", "hypothesis"))
    words = sorted({word for text in texts for word in re.findall("[a-z]+", text.lower())})
    return {piece: number for number, piece in enumerate(dict.fromkeys(specials + pieces + words))}


def _tokenizer(max_length: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary()
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def write_model(folder: Path, seed: int = 42) -> Path:
    """Write a tiny untrained cross-encoder with its tokenizer to `folder` (made if missing) and return `folder`.

    Both load with the Auto classes of transformers; the logits have shape (pairs, 3) in the order of `LABEL_NAMES`.
    The same seed gives the same weights; the caller's random state stays as it was. Raises OSError where the folder
    cannot be written.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = _tokenizer(max_length=128)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id, id2label=dict(enumerate(LABEL_NAMES)),
        label2id={name: number for number, name in enumerate(LABEL_NAMES)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
