"""The embedded data set and a tiny model made from scratch: a first training run with no download.

The data come from a small grammar. A sentence describes one scene: where, how many, of what age, who, doing what. A
word in one of these slots means a set of possibilities (`animals` = dogs or cats or horses), a sentence means the
product of its slots' sets, and the label follows from the sets: no label is written by hand. As in SNLI, both sentences
of a pair speak of the same scene.

Invariants:
- `pairs` is pure: a split is the same list in every process and on every machine.
- Each hypothesis gets one premise for every label, so classes are balanced and a hypothesis by itself tells nothing.
- No pair occurs twice, in one split or across splits.
"""

import random
import string
from functools import cache
from typing import Any

LABEL_NAMES = ("entailment", "neutral", "contradiction")
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
SPLIT_SIZES = {"train": 12_000, "dev": 1_002, "test": 1_002}

Words = dict[str, frozenset[Any]]


def _kinds(**kinds: str) -> Words:
    """Words for single things, and the words for their kinds: animals = dogs or cats or horses."""
    members = {kind: things.split(", ") for kind, things in kinds.items()}  # lists: sets have no order to rely on
    single = {thing: frozenset([thing]) for things in members.values() for thing in things}
    return single | {kind: frozenset(things) for kind, things in members.items()}


def _with_negation(words: Words) -> Words:
    everything = frozenset().union(*words.values())
    return {f"are {w}": s for w, s in words.items()} | {f"are not {w}": everything - s for w, s in words.items()}


NUMBERS = ("two", "three", "four", "five")
SLOTS: dict[str, Words] = {
    "place": _kinds(
        outside="in a park, in a garden, on a beach, in a field",
        inside="in a kitchen, in an office, in a museum, in a library",
    ),
    "quantity": {number: frozenset([number]) for number in NUMBERS}
    | {"some": frozenset(NUMBERS), "at least three": frozenset(NUMBERS[1:]), "two or three": frozenset(NUMBERS[:2])},
    "modifier": {"young": frozenset(["young"]), "old": frozenset(["old"]), "": frozenset(["young", "old"])},
    "lexical": _kinds(animals="dogs, cats, horses", people="men, women"),
    "negation": _with_negation(_kinds(moving="walking, running, swimming", resting="sitting, sleeping")),
}
Scene = tuple[str, ...]  # one word a slot


@cache
def _judge_word(slot: str, premise: str, hypothesis: str) -> int:
    p, h = SLOTS[slot][premise], SLOTS[slot][hypothesis]
    if p.isdisjoint(h):
        return CONTRADICTION
    return ENTAILMENT if p <= h else NEUTRAL


def judge(premise: Scene, hypothesis: Scene) -> int:
    """Whether all scenes that fit the premise fit the hypothesis (entailment), some do (neutral), or none does."""
    # The classes' numbers stand in this order: one slot is enough to contradict.
    return max(map(_judge_word, SLOTS, premise, hypothesis))


@cache
def _others(slot: str, word: str) -> list[str]:
    return [other for other in SLOTS[slot] if other != word]


def sentence(scene: Scene) -> str:
    text = " ".join(word for word in scene if word)
    return text[0].upper() + text[1:] + "."


def _vary(hypothesis: Scene, rng: random.Random) -> tuple[Scene, str]:
    """A premise that differs from the hypothesis in one or two slots, and the slot that decides the label."""
    premise, names = list(hypothesis), list(SLOTS)
    changed = rng.sample(range(len(names)), rng.choice((1, 1, 2)))
    for slot in changed:
        premise[slot] = rng.choice(_others(names[slot], hypothesis[slot]))
    # By itself, the deciding slot gives the label of the pair; its number is the first where several do.
    label = judge(tuple(premise), hypothesis)
    for slot in sorted(changed):
        single = (*hypothesis[:slot], premise[slot], *hypothesis[slot + 1 :])
        if judge(single, hypothesis) == label:
            return tuple(premise), names[slot]
    raise AssertionError("a label that no slot decides")


def _triple(rng: random.Random) -> list[dict[str, Any]]:
    """One hypothesis with a premise for each label; nothing where a label is hard to meet, as in all-wide sentences."""
    hypothesis = tuple(rng.choice(list(words)) for words in SLOTS.values())
    rows: dict[int, dict[str, Any]] = {}
    for _ in range(60):
        premise, source = _vary(hypothesis, rng)
        label = judge(premise, hypothesis)
        if label in rows:
            continue
        texts = {"premise": sentence(premise), "hypothesis": sentence(hypothesis)}
        rows[label] = texts | {"label": label, "source": source}
        if len(rows) == len(LABEL_NAMES):
            return [rows[label] for label in range(len(LABEL_NAMES))]
    return []


@cache
def _splits() -> dict[str, list[dict[str, Any]]]:
    """All splits, cut from one stream of distinct pairs."""
    rng = random.Random(2024)
    seen: set[tuple[str, str]] = set()
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLIT_SIZES}
    for name, size in SPLIT_SIZES.items():
        while len(splits[name]) < size:
            triple = _triple(rng)
            texts = {(row["premise"], row["hypothesis"]) for row in triple}
            if not texts & seen:
                seen |= texts
                splits[name] += triple
    return splits


def pairs(split: str) -> list[dict[str, Any]]:
    """The rows {premise, hypothesis, label, source} of "train", "dev" or "test".

    `label` is a position in LABEL_NAMES, `source` the slot that decides it. Raises ValueError for another split.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"unknown split {split!r}; valid: {', '.join(SPLIT_SIZES)}")
    return [dict(row) for row in _splits()[split]]


def make_tokenizer() -> Any:
    """A word-piece tokenizer whose vocabulary is the grammar's words, and letters for all other text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    letters = string.ascii_lowercase + string.digits
    words = sorted({word for slot in SLOTS.values() for phrase in slot for word in phrase.split()})
    pieces = [*special.values(), *letters, *(f"##{letter}" for letter in letters), *string.punctuation, *words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    rust = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    rust.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=rust, model_max_length=128, model_input_names=inputs, **special)


def make_config() -> Any:
    """The architecture of the tiny model: a BERT of two layers, a third of a million parameters."""
    from transformers import BertConfig

    tokenizer = make_tokenizer()
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABEL_NAMES)),
        label2id={name: number for number, name in enumerate(LABEL_NAMES)},
    )


def make_model(config: Any, seed: int) -> Any:
    """A sequence classifier of `config` (see make_config) with weights drawn from `seed`; torch's own stream stays.

    Keys start as queries and words outweigh positions, so that tokens attend to like tokens from the first step on.
    With a usual initialisation, the model spends most of its time finding out that it has to compare words.
    """
    import torch
    from transformers import BertForSequenceClassification

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = BertForSequenceClassification(config)
        model.bert.embeddings.word_embeddings.weight.mul_(2.0)
        model.bert.embeddings.position_embeddings.weight.mul_(0.3)
        for layer in model.bert.encoder.layer:
            layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)
    return model
