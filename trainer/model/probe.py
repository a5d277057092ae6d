"""What a few pairs tell about a model of an unknown family before it is trained: its dropout, what padding does to it,
and which of its parameters have no part in its logits."""

import random
from typing import Any

import numpy as np
import torch

from trainer.base.log import log
from trainer.data.tokens import Tokens
from trainer.model.cross_encoder import CrossEncoder

OTHER_RUN = "so another number of ranks, or of micro-batches, gives another run"


def examine(model: CrossEncoder, tokens: Tokens, attention_is_given: bool) -> None:
    """Settles how such a model is trained, and says what a user would not expect.

    `attention_is_given`: whether the user chose the attention implementation.
    """
    if model.layout is not None:
        return
    name = model.model.config.model_type
    if unused := freeze_unused(model, tokens):
        log.info(f"{len(unused)} tensors get no gradient, such as {unused[0]}: they are frozen")
    if sees_padding(model, tokens):
        model.one_length = True
        log.warning(f"{name} sees padding: a pair's scores depend a little on its batch, so other programs, and "
                    "another --per_device_eval_batch_size, give others")  # fmt: skip
    key_dropout(model, tokens, attention_is_given)


def key_dropout(model: CrossEncoder, tokens: Tokens, attention_is_given: bool) -> None:
    """Makes every dropout belong to the sample. What stays random in another way is said."""
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
    elif draws():
        advice = "; leave --attn_implementation out" if attention_is_given else ""
        log.warning(f"{name} draws random numbers in another way than by dropout, {OTHER_RUN}{advice}")
    model.one_length |= model.calls.one_length


def _random_state() -> list[Any]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return [random.getstate(), str(np.random.get_state()), *(state.tolist() for state in states)]


@torch.no_grad()
def sees_padding(model: CrossEncoder, tokens: Tokens) -> bool:
    """Whether the longest pair, in one batch with the shortest, changes its scores, as convolutions do."""
    rows = tokens.lengths.argsort()[[0, -1]]
    both, single = (model.eval()(_batch(model, tokens, part)) for part in (rows, rows[:1]))
    # TF32 rounds more than some models differ.
    noise = 1e-3 if both.device.type == "cuda" else 1e-5
    return bool((both[-1] - single[0]).abs().max() > noise * single.abs().max())


def freeze_unused(model: CrossEncoder, tokens: Tokens) -> list[str]:
    """Freezes the parameters that get no gradient. Returns their names.

    One backend would let weight decay have them, another not, and DDP would wait for them. They are found by a
    backward of some pairs, the longest and the shortest among them, one by one: memory may allow no more.
    """
    order = np.argsort(-tokens.lengths, kind="stable")
    for row in order[np.unique(np.linspace(0, len(order) - 1, 8).astype(int))]:
        model.train()(_batch(model, tokens, np.array([row]))).sum().backward()
    unused = [(name, p) for name, p in model.model.named_parameters() if p.requires_grad and p.grad is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    model.zero_grad()
    return [name for name, _ in unused]


def _batch(model: CrossEncoder, tokens: Tokens, rows: np.ndarray) -> Any:
    device = next(model.parameters()).device
    return model.batch(tokens, np.zeros(len(tokens.lengths), np.int64), rows, device)
