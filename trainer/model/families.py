"""The model families whose layout crossrank knows, without a copy of their code.

A model of a known family runs its own forward. What changes comes in through the library's extension points, through
modules and methods put in place of others, and through forward hooks:

- Dropout masks follow the samples (KeyedDropout), so they do not depend on ranks or padding.
- Unpadded, a batch is one row of its real tokens: linear layers, norms, activations and dropout see no padding.
  Only attention lays the tokens out per pair, in groups of like length.
- Where only the first token's vector reaches the classifier, the last layer is fed the first tokens, and only its keys
  and values are computed from all of them. This is exact: what is left out never reached the logits.

A model of any other family runs padded, with its own attention and the dropout of calls.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from trainer.model.attention import (
    AttentionSite,
    attention,
    bert_forward,
    distilbert_forward,
    mpnet_forward,
    residual_forward,
)
from trainer.model.deberta import adopt_deberta, disentangled_forward
from trainer.model.dropout import KeyedDropout
from trainer.model.layout import Layout

NAME = "crossrank"


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts.

    Attributes:
        end: in the base model, the layers, or the module that ends with the last of them.
        attention: how the names of attention modules end.
        trims: whether keys and values can be computed apart from queries; if not, the last layer computes every token,
            and hands on the first ones.
        inputs: in an attention module, the linear layers of queries, keys and values that its `forward` takes.
        norm: in a layer, what is applied before attention, if that is so.
        forward: takes the place of an attention module's own, where the last layer's queries are fed apart from its
            keys and values, or where that does not use the library's interface.
        settle: gives other parts of the base model what they need to know of the layout.
    """

    end: str = "encoder.layer"
    attention: str = "attention.self"
    trims: bool = True
    inputs: tuple[str, ...] = ("query", "key", "value")
    norm: str = ""
    forward: Callable[..., Any] | None = None
    settle: Callable[[Any, Layout], None] | None = None


def _mpnet(base: Any, layout: Layout) -> None:
    """Positions are relative: those of the longest pair serve all."""
    positions = base.encoder.compute_position_bias
    base.encoder.compute_position_bias = lambda hidden: positions(hidden.new_empty(1, layout.longest))


def _albert(base: Any, layout: Layout) -> None:
    """The same layers are computed again and again, each time with masks of their own."""

    def count(module: nn.Module, args: Any) -> None:
        layout.dropout.passes += 1

    for group in base.encoder.albert_layer_groups:
        group.register_forward_pre_hook(count)


BERT = Family(forward=bert_forward)
ROTARY = Family("layers", "self_attn", trims=False)  # queries and keys are turned together
FAMILIES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "ernie": BERT,
    "data2vec-text": BERT,
    "distilbert": Family(
        "transformer.layer", "attention", inputs=("q_lin", "k_lin", "v_lin"), forward=distilbert_forward
    ),
    "albert": Family("encoder", "attention", trims=False, settle=_albert),
    "rembert": BERT,
    "megatron-bert": Family(norm="attention.ln", forward=bert_forward),
    "roberta-prelayernorm": Family(norm="attention.LayerNorm", forward=bert_forward),
    "xlm-roberta-xl": Family(norm="attention.self_attn_layer_norm", forward=bert_forward),
    "mpnet": Family(attention="attention.attn", inputs=("q", "k", "v"), forward=mpnet_forward, settle=_mpnet),
    "deberta-v2": Family(forward=disentangled_forward, settle=adopt_deberta),
    "modernbert": Family("layers", "attn", trims=False),
    "nomic_bert": ROTARY,
    "gte": ROTARY,
    "jina_embeddings_v3": ROTARY,
    "eurobert": ROTARY,
    "ultrabert": ROTARY,
}
FIRST = ("cls", "bos")
RESIDUAL = {"dense", "dropout", "LayerNorm"}  # parts of a module that ends a layer's half


def adopt(model: PreTrainedModel, unpad: bool) -> tuple[Layout | None, str]:
    """Gives `model` crossrank's attention, dropout and layout, as far as its architecture allows.

    Returns:
        The layout, None where the model stays untouched; and why the model runs padded, if it does so unasked.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    own_code = not type(model).__module__.startswith("transformers.models.")
    odd_positions = getattr(config, "position_embedding_type", None) not in (None, "absolute", "rotary")
    # It turns queries and keys by the length of the longest pair in the batch.
    odd_positions |= "longrope" in str(getattr(config, "rope_parameters", ""))
    if family is None or own_code or odd_positions or getattr(config, "is_decoder", False):
        what = "this kind of " if family else ""
        return None, f"{what}{config.model_type} runs padded, with its own attention"
    note = _why_padded(config) if unpad else ""
    layout = Layout(unpad and not note)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    if family.forward is None:
        model.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:  # as that of ModernBERT before transformers 5.7: the library only warns
            return None, f"{config.model_type} runs padded: this version of transformers keeps its attention to itself"
    base: Any = model.base_model
    end = base.get_submodule(family.end)
    layers = list(end.children()) if isinstance(end, nn.ModuleList) else [end]
    trimmed = layout.unpad and _pooling(config) in FIRST and family.trims
    for name, module in base.named_modules():
        if name.endswith(f".{family.attention}"):
            inside_last = any(module is part for part in layers[-1].modules())
            module.site = AttentionSite(layout, layout.dropout.new_site(), trimmed and inside_last, family.inputs)
            if family.forward is not None:
                module.forward = partial(family.forward, module)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, KeyedDropout(child.p, layout.dropout))
        if {name for name, _ in parent.named_children()} == RESIDUAL:
            parent.forward = partial(residual_forward, parent, layout)
    if family.settle is not None:
        family.settle(base, layout)
    if trimmed:
        _compute_first_only(layers[-1], family, layout)
    elif layout.unpad:
        _pool_in_pairs(model, layers[-1], layout)
    return layout, note


def _pooling(config: Any) -> str:
    """What of a pair's tokens the classifier reads."""
    return str(getattr(config, "classifier_pooling", "cls"))


def _why_padded(config: Any) -> str:
    """Why a model of a known family runs padded, or ""."""
    if (pooling := _pooling(config)) not in (*FIRST, "mean", "late"):
        return f"runs padded: its classifier is fed by {pooling} pooling"
    if config.num_hidden_layers == 1 and getattr(config, "conv_kernel_size", 0):
        # DeBERTa-v2's follows the first layer, and needs all of its tokens, of which the last one has no more.
        return "runs padded: a convolution follows its only layer"
    return ""


def _pool_in_pairs(model: Any, last: nn.Module, layout: Layout) -> None:
    """Has each pair's first token, or the mean of its tokens, take the place of all: (pairs, 1, ...)."""
    pooling = _pooling(model.config)
    module: Any = {"mean": model.base_model, "late": getattr(model, "classifier", None)}.get(pooling, last)
    change = layout.first_tokens if pooling in FIRST else layout.means
    module.register_forward_hook(lambda module, args, output: _changed(output, change))


def _changed(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A module's output, with its hidden states changed."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, tuple):
        return change(output[0]), *output[1:]
    output.last_hidden_state = change(output.last_hidden_state)
    return output


def _compute_first_only(layer: nn.Module, family: Family, layout: Layout) -> None:
    """Makes the last layer's output that of the first tokens, as (pairs, 1, hidden).

    It is fed the first tokens; only its keys and values are computed from all tokens.
    """
    norm = layer.get_submodule(family.norm) if family.norm else nn.Identity()

    def take_first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        layout.hidden = norm(args[0])
        return layout.first_tokens(args[0]), *args[1:]

    layer.register_forward_pre_hook(take_first)
