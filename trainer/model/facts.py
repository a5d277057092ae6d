"""What a model of any family says of its inputs: its tokens, token types and positions."""

from typing import Any

from trainer.base.errors import UserError
from trainer.model.embedding import UsedRows


def num_rows(model: Any) -> int:
    """The tokens that the model has, frozen rows included. Raises UserError where it has no table of them."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        raise UserError(f"{model.config.model_type} has no table of tokens, which crossrank needs") from None
    return len(table.place) if isinstance(table, UsedRows) else int(table.weight.shape[0])


def number_of_types(model: Any) -> int:
    """How many token types the model tells apart."""
    if model.config.model_type == "xlnet":
        return int(1e9)  # it compares them, and has no table
    return getattr(model.config, "type_vocab_size", None) or 0


def pads_left(model: Any) -> bool:
    """Whether the model takes the last place for a pair's last token, as XLNet does."""
    return getattr(model.config, "summary_type", "") == "last" and hasattr(model, "sequence_summary")


def first_position(model: Any) -> int:
    """The position of a pair's first token: 0, or in RoBERTa's kind the padding token's number + 1."""
    positions = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    padding = getattr(positions, "padding_idx", None)
    return 0 if padding is None else padding + 1
