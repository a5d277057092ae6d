"""config.json and tokenizer, settled: what a forward, a batch and the saved model rely on is there, or is an error."""

from collections.abc import Iterator
from typing import Any

from trainer.base.errors import UserError
from trainer.base.log import log
from trainer.model.facts import first_position, num_rows
from trainer.model.families import FAMILIES

# What changes only how a forward runs or what it returns besides the logits, and would break ours.
PLAIN: dict[str, Any] = {
    "return_dict": True,
    "chunk_size_feed_forward": 0,
    "output_attentions": False,
    "output_hidden_states": False,
}


def settle(settings: Any, place: str) -> None:
    """Raises UserError where the classes of `place`'s config.json are not numbered and named one by one."""
    for name, value in PLAIN.items():
        setattr(settings, name, value)
    if getattr(settings, "use_cache", False):
        settings.use_cache = False  # of a decoder's keys and values, for tokens that a classifier never adds
    if getattr(settings, "attention_type", "") == "block_sparse":
        settings.attention_type = "original_full"
        log.info(f"{place}: attention_type block_sparse is set to original_full: its scores would depend on the batch")
    for part, name, probability in _probabilities(settings):
        if probability is not None and not 0 <= probability <= 1:
            raise UserError(f"{place}: {name} in its config.json must be at least 0 and at most 1, found {probability}")
        if name.endswith("layerdrop") and probability:
            setattr(part, name, 0.0)
            log.info(f"{place}: {name} {probability} is set to 0: which layers it leaves out would depend on the rank")
    for name in ("num_hidden_layers", "num_attention_heads"):
        if isinstance(number := getattr(settings, name, None), int) and number < 1:
            raise UserError(f"{place}: {name} in its config.json must be above 0, found {number}")
    names = settings.id2label or {}
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{place}: id2label in its config.json numbers the classes {', '.join(map(str, sorted(names)))}"
                        f"; number them from 0 to {len(names) - 1}, as the head's outputs are")  # fmt: skip
    twice = [name for name in names.values() if list(names.values()).count(name) > 1]
    if twice:
        raise UserError(f"{place}: id2label in its config.json names {twice[0]!r} twice; give each class its own name")


def set_dropout(settings: Any, dropout: float) -> None:
    """Every dropout probability of the model: hidden_dropout_prob, resid_pdrop, dropout_rate, ..."""
    for part, name, _ in _probabilities(settings):
        if not name.endswith("layerdrop"):
            setattr(part, name, dropout)


def _probabilities(settings: Any) -> Iterator[tuple[Any, str, float | None]]:
    """Each (config, name, value) of a probability to drop something, also in configs inside; None = another one's."""
    for name in settings.to_dict():
        value = getattr(settings, name, None)
        if hasattr(value, "to_dict"):
            yield from _probabilities(value)
        elif "drop" in name and not isinstance(value, bool) and (value is None or isinstance(value, (int, float))):
            yield settings, name, value


def longest_input(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """The longest pair in tokens. Raises UserError where `max_length` is more than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    # Positions that are relative, or computed, have no end: some configs then say -1.
    limit = int(1e9) if limit is None or limit <= 0 else limit - first_position(model)
    if max_length is not None and max_length > limit:
        raise UserError(f"max_length {max_length} is more than the {limit} positions that the model has")
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, (int, float)):
        raise UserError(f"model_max_length in tokenizer_config.json must be a number, found "
                        f"{tokenizer.model_max_length!r}")  # fmt: skip
    length = max_length or min(limit, tokenizer.model_max_length)
    if length < 5:
        where = "max_length" if max_length else "model_max_length in tokenizer_config.json,"
        raise UserError(f"{where} {length} leaves no room for two texts and their special tokens")
    return int(length)


def warn_of_joined_texts(tokenizer: Any, place: str) -> None:
    """Says where a pair is read as one text, as by the tokenizers of GPT-2 and Qwen."""
    if not tokenizer.is_fast:  # which is an error when the pairs are read
        return
    texts = tokenizer("one", "two").sequence_ids(0)  # of each token 0 or 1, None = special
    if 1 in texts and texts[texts.index(1) - 1] == 0:
        log.warning(f"{place}: its tokenizer puts nothing between the two texts of a pair; a post-processor with a "
                    "separator in its tokenizer.json would")  # fmt: skip


def settle_padding(model: Any, tokenizer: Any, place: str) -> None:
    """Gives model and tokenizer one padding token. Raises UserError where there is none to take.

    A model that reads a pair's last token finds it by the number of the padding token.
    """
    config, rows = model.config, num_rows(model)
    known, eos = getattr(config, "pad_token_id", None), tokenizer.eos_token_id
    fits = [n for n in (tokenizer.pad_token_id, known, eos) if isinstance(n, int) and 0 <= n < rows]
    if not fits:
        raise UserError(f"{place}: neither its tokenizer nor its config.json has a padding token that is among the "
                        f"model's {rows} tokens; set pad_token in tokenizer_config.json")  # fmt: skip
    number = fits[0]
    if tokenizer.pad_token_id != number:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)
        log.info(f"{place}: its tokenizer has no padding token of the model's; {tokenizer.pad_token!r} is taken")
    # Where positions begin behind the padding token's number, or the family is ours, that number is not changed.
    mismatch = known != number and config.model_type not in FAMILIES and first_position(model) == 0
    if known not in fits or mismatch:
        config.pad_token_id = number
        log.info(f"{place}: pad_token_id {known} in its config.json is set to {number}, the tokenizer's")
