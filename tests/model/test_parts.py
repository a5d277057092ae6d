"""Embeddings, layers and head of every family, what of them is frozen, and what of the learning rate each gets."""

import numpy as np
import pytest
import torch
from families import SHAPES, save_encoder
from test_attention import make, make_tokens

from trainer.backends.optim import make_optimizer, parameter_groups, set_rate
from trainer.base.errors import UserError
from trainer.config import Config
from trainer.model.cross_encoder import CrossEncoder, checkpoint_activations
from trainer.model.families import FAMILIES
from trainer.model.parts import freeze_lowest, levels

CPU = torch.device("cpu")


def config(**fields: object) -> Config:
    return Config(train_file="x", **fields)


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [*((family, False) for family in FAMILIES if family != "albert"), ("bert", True), ("modernbert", True)],
)
def test_nothing_is_computed_below_what_is_trained(family, checkpointing):
    """Frozen parameters get no gradient, the others the same one, and the backward ends above the frozen layers."""
    tokens, rows = make_tokens([7, 12, 5, 30]), np.arange(4)
    found = []
    for frozen in (0, 2):
        model = make(family, dropout=0.1)
        freeze_lowest(model, config(freeze_layers=frozen))
        encoder = CrossEncoder(model).train()
        if checkpointing:
            checkpoint_activations(encoder)
        needs_gradient = []
        table = model.get_input_embeddings()
        table.register_forward_hook(lambda m, args, output, seen=needs_gradient: seen.append(output.requires_grad))
        batch = encoder.batch(tokens, rows % 3, rows, CPU, seed=1, step=2)
        torch.nn.functional.cross_entropy(encoder(batch), batch.labels).backward()
        found.append((levels(model), {n: p.grad for n, p in model.named_parameters()}, needs_gradient))
    (level, whole, _), (_, part, needs_gradient) = found
    assert level.num_layers == 3
    assert needs_gradient[0] is False
    for name, gradient in part.items():
        if level.of[name] <= 2:
            assert gradient is None, name
        elif whole[name] is not None:
            assert torch.equal(gradient, whole[name]), name


@pytest.mark.parametrize("family", SHAPES)
def test_parts(family, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(save_encoder(tmp_path, family))
    found = levels(model)
    stacks = {"bart": 2, "mbart": 2, "t5": 2}.get(family, 1)
    assert found.num_layers == (0 if family == "albert" else 2 * stacks)
    table = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert found.of[table] == 0
    for name, level in found.of.items():
        place = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if place is not None and stacks == 1 and found.num_layers and "classif" not in name:
            assert level == place + 1, name
        if "classif" in name or "pooler" in name:
            assert level == found.num_layers + 1, name


def test_rates_fall_from_layer_to_layer():
    model = CrossEncoder(make("bert"))
    settings = config(layerwise_lr_decay=0.5, weight_decay=0.1)
    optimizer = make_optimizer(parameter_groups(model, settings), settings)
    set_rate(optimizer, 8.0)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = {"embeddings": 1.0, "layer.0": 2.0, "layer.1": 4.0, "layer.2": 8.0, "pooler": 8.0, "classifier": 8.0}
    for name, p in model.model.named_parameters():
        rate = next(rate for part, rate in expected.items() if part in name)
        assert rates[id(p)] == (rate, 0.1 if p.ndim > 1 else 0.0), name


def test_a_frozen_base_is_known():
    model = make("roberta")
    assert CrossEncoder(model).frozen_fingerprint is None
    freeze_lowest(model, config(freeze_embeddings=True))
    encoder = CrossEncoder(model)
    encoder.freeze_unused_rows(make_tokens([5]))
    assert encoder.used_rows is None
    before = encoder.frozen_fingerprint
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[3, 3] += 1
    assert None not in (before, encoder.frozen_fingerprint)
    assert before != encoder.frozen_fingerprint
    assert {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad} == {"embeddings"}


@pytest.mark.parametrize(("family", "fields", "said"), [
    ("bert", {"freeze_layers": 4}, "freeze_layers 4: bert has 3 layers here"),
    ("albert", {"freeze_layers": 1}, "freeze_layers: albert has no list of all its layers"),
    ("albert", {"layerwise_lr_decay": 0.9}, "layerwise_lr_decay: albert has no list"),
    ("bert", {"freeze_embeddings": True, "lora_r": 4}, "leave out freeze_embeddings or lora_r"),
    ("bert", {"freeze_layers": 1, "lora_r": 4}, "leave out freeze_layers or lora_r"),
    ("bert", {"layerwise_lr_decay": 1.1}, "layerwise_lr_decay must be above 0 and at most 1"),
])  # fmt: skip
def test_what_cannot_be(family, fields, said):
    with pytest.raises(UserError) as caught:
        freeze_lowest(make(family), config(**fields))
    assert said in str(caught.value)


def test_albert_can_freeze_its_embeddings():
    model = make("albert")
    freeze_lowest(model, config(freeze_embeddings=True))
    assert {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad} == {"embeddings"}
