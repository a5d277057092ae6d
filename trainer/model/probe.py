"""What a few pairs tell about a model before it is trained: which of its parameters have no part in its logits, and of
an unknown family its dropout, and what padding does to it."""

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.base.arrays import counted, places
from trainer.base.errors import UserError, first_line, out_of_memory
from trainer.base.log import log
from trainer.data.tokens import Tokens
from trainer.model.cross_encoder import CrossEncoder

OTHER_RUN = "so another number of ranks, or of micro-batches, gives another run"


def examine(model: CrossEncoder, tokens: Tokens, attention_is_given: bool, device: str | None = None) -> None:
    """Settles how a model is trained, and says what a user would not expect.

    Args:
        attention_is_given: whether the user chose the attention implementation.
        device: kind of the one that it is trained on; None = where it is.

    Raises UserError where the model cannot take the pairs.
    """
    name = model.model.config.model_type
    try:
        if unused := freeze_unused(model, tokens):
            log.info(f"{len(unused)} tensors get no gradient, such as {unused[0]}: they are frozen")
        if model.layout is None:
            _examine_dropout(model, tokens, attention_is_given, device or next(model.parameters()).device.type)
    except (ValueError, IndexError, TypeError, NotImplementedError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        advice = "leave --attn_implementation out" if attention_is_given else "look at its config.json"
        raise UserError(f"{name} cannot take these pairs ({first_line(error)}); {advice}") from None


def _examine_dropout(model: CrossEncoder, tokens: Tokens, attention_is_given: bool, device: str) -> None:
    name = model.model.config.model_type
    if size := seen_padding(model.eval(), tokens, device):
        model.one_length = True
        log.warning(f"{name} sees padding: a pair's scores depend on its batch, by up to {size:.0e} of the largest, so "
                    "other programs, and another --per_device_eval_batch_size, give others")  # fmt: skip
    model.draws = not key_dropout(model, tokens, attention_is_given)
    if not model.draws:
        # Some dropout's coordinates, as those of relative positions, can depend on the longest pair.
        model.one_length = model.one_length or seen_padding(model.train(), tokens, device) > 0
        if seen_padding(model, tokens, device):
            log.warning(f"{name}: a pair's dropout depends on its batch, {OTHER_RUN}")


def key_dropout(model: CrossEncoder, tokens: Tokens, attention_is_given: bool) -> bool:
    """Makes every dropout belong to the sample. Returns whether all is; what stays random in another way is said."""
    longest, shortest = int(tokens.lengths.argmax()), int(tokens.lengths.argmin())

    @torch.no_grad()
    def forward(pairs: int, row: int = longest) -> None:
        model.train()(_batch(model, tokens, np.full(pairs, row)))

    def draws() -> bool:
        before = _random_state()
        model.calls.shapes(lambda: forward(2))
        return before != _random_state()

    name = model.model.config.model_type
    if draws() and not attention_is_given:
        # Fused attention draws its masks inside; the library's plain one calls dropout.
        model.model.set_attn_implementation("eager")
    if not model.calls.probe(forward, lambda: forward(2, shortest)):
        log.warning(f"{name}: which of its dropouts belong to which pair cannot be told; {OTHER_RUN}")
        return False
    if draws():
        advice = "; leave --attn_implementation out" if attention_is_given else ""
        log.warning(f"{name} draws random numbers in another way than by dropout, {OTHER_RUN}{advice}")
        return False
    return True


def _random_state() -> list[Any]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return [random.getstate(), str(np.random.get_state()), *(state.tolist() for state in states)]


@torch.no_grad()
def seen_padding(model: CrossEncoder, tokens: Tokens, device: str) -> float:
    """How much pairs' scores differ from those that each has by itself when they are in one batch, as convolutions
    make them, relative to the largest; 0 = not, but for rounding on this kind of device: a run is the same whether it
    is looked at there or, sharded, on the CPU."""
    rows = _some(tokens)
    together = model(_batch(model, tokens, rows))  # the longest first
    alone = torch.cat([model(_batch(model, tokens, rows[i : i + 1])) for i in range(len(rows))])
    # TF32 rounds more than some models differ.
    noise = 1e-3 if device == "cuda" else 1e-5
    difference = float((together - alone).abs().max() / alone.abs().max())
    return difference if difference > noise else 0.0


def _some(tokens: Tokens) -> np.ndarray:
    """Rows of pairs of many lengths, the longest first and the shortest last."""
    lengths, rows = tokens.lengths, []
    longest = int(lengths.max())
    ends = np.cumsum(counted(lengths, longest + 1)[::-1])  # of the pairs of each length among all, the longest first
    for place in np.unique(np.linspace(0, len(lengths) - 1, 8).astype(int)):
        number = int(np.searchsorted(ends, place, side="right"))
        alike = places(lengths, partial(np.equal, longest - number))
        rows.append(int(alike[place - (ends[number - 1] if number else 0)]))
    return np.array(rows)


def freeze_unused(model: CrossEncoder, tokens: Tokens) -> list[str]:
    """Freezes the parameters that get no gradient. Returns their names.

    One backend would let weight decay have them, another not, and DDP would wait for them. They are found by a
    backward of some pairs, one by one: memory may allow no more. In a known family one pair tells.
    """
    reached: set[nn.Parameter] = set()

    def note(parameter: nn.Parameter) -> None:
        reached.add(parameter)
        parameter.grad = None  # at once: together they would be as large as the model

    trained = [(name, p) for name, p in model.model.named_parameters() if p.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(note) for _, parameter in trained]
    for row in _some(tokens)[: 8 if model.layout is None else 1]:
        model.train()(_batch(model, tokens, np.array([row]))).sum().backward()
    for hook in hooks:
        hook.remove()
    unused = [(name, p) for name, p in trained if p not in reached]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return [name for name, _ in unused]


def _batch(model: CrossEncoder, tokens: Tokens, rows: np.ndarray) -> Any:
    device = next(model.parameters()).device
    return model.batch(tokens, np.zeros(len(tokens.lengths), np.int64), rows, device, int(tokens.lengths.max()))
