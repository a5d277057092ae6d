"""A model that is sharded before it has values begins, and goes on, as one that every rank has loaded whole."""

import json

import pytest
import torch
from conftest import crossrank
from families import SHAPES, save_encoder

from trainer.config import Config
from trainer.model.loading import load_for_training
from trainer.model.scattered import lay_aside, load_scattered, stray
from trainer.ranks import World

SOME = ("qwen3", "deberta-v2")
OPTIONS = {
    "plain": [],
    "lora": ["--lora_r", "4"],
    "frozen": ["--freeze_embeddings", "true", "--freeze_layers", "1", "--weight_decay", "0.01"],
    "checkpointing": ["--gradient_checkpointing", "true", "--init", "random"],
}
# For each folder, a run of three steps with the model scattered, and one with it whole.
SCRIPT = """
import json, sys, torch
from pathlib import Path
from trainer import ranks, train
from trainer.backends import fsdp, deepspeed
from trainer.cli import parse_train

def state(command, name, scattered):
    kind = fsdp.FSDP if "fsdp" in command else deepspeed.DeepSpeed
    scatters = kind.scatters
    if not scattered:
        kind.scatters = property(lambda self: False)
    config = parse_train([*command, "--output_dir", f"{sys.argv[1]}/{name}-{scattered}"])
    trainer = train.prepare(config, world)
    kind.scatters = scatters
    buffers = {key: value.clone() for key, value in trainer.model.named_buffers()}
    whole = trainer.backend.full_weights(trainer.model.model)
    whole = {key: value.clone() for key, value in whole.items()}
    trainer.loop()
    parts = {key: run for key, (_, run) in trainer.backend.save_state().runs.items()}
    trainer.output.close()
    return buffers, whole, parts

world = ranks.start(600)
for name, command in json.loads(Path(sys.argv[2]).read_text()).items():
    for ours, theirs in zip(state(command, name, True), state(command, name, False), strict=True):
        assert ours.keys() == theirs.keys(), name
        differing = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not differing, (name, differing[:5])
    print(f"same: {name}", flush=True)
ranks.stop()
"""


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
@pytest.mark.parametrize(
    "families", [pytest.param(SOME, id="some"), pytest.param((*SHAPES,), id="all", marks=pytest.mark.full)]
)
def test_it_is_the_same_model(tmp_path, backend, families):
    if backend == "zero3":
        pytest.importorskip("deepspeed")
    wiring = ["--backend", "fsdp"] if backend == "fsdp" else ["--deepspeed", "zero3"]
    cases = {}
    for family in families:
        save_encoder(tmp_path / family, family)
        cases[family] = ["--model_name_or_path", str(tmp_path / family)]
    for name, options in OPTIONS.items():
        cases[name] = ["--model_name_or_path", str(tmp_path / families[-1]), *options]
    cases["builtin"] = []
    run = ["--recipe", "demo", "--max_train_samples", "60", "--train_batch_size", "20", "--num_train_epochs", "1",
           "--max_eval_samples", "20", "--max_test_samples", "20", "--save_strategy", "no", "--eval_strategy", "no",
           "--load_best_model_at_end", "false", "--track_emissions", "false", *wiring]  # fmt: skip
    cases = {name: [*run, *options] for name, options in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "both.py").write_text(SCRIPT)
    result = crossrank(tmp_path, tmp_path / "cases.json", ranks=2, script=tmp_path / "both.py")
    assert result.stdout.count("same: ") == 2 * len(cases)
    assert " 0 parameters" not in result.stderr
    assert "each rank loads the whole model" not in result.stderr


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"torch_compile": True}, "torch_compile needs them"),
        ({"attn_implementation": "flash_attention_2"}, "attention flash_attention_2 may need them on the device"),
    ],
)
def test_where_each_rank_needs_the_values_it_says_so(builtin_model, said, monkeypatch, fields, why):
    config = Config(model_name_or_path=str(builtin_model), train_file="x", **fields)
    world, loaded = World(0, 1, 0, torch.device("cpu")), []
    monkeypatch.setattr("trainer.model.scattered.load_for_training", lambda *given: loaded.append(given) or whole)
    whole = load_for_training(Config(model_name_or_path=str(builtin_model), train_file="x"), ("a", "b", "c"))
    assert not load_scattered(config, world, ("a", "b", "c")).hollow
    assert said[-1] == f"each rank loads the whole model before it is sharded: {why}"
    assert len(loaded) == 1


def test_a_hollow_model_keeps_its_ties_and_says_what_it_cannot_replace(tmp_path):
    config = Config(model_name_or_path=str(save_encoder(tmp_path, "bart")), train_file="x", max_length=100)
    model = load_for_training(config, ("a", "b", "c"))
    before = [[name for name, own in model.named_parameters(remove_duplicate=False) if own is p] for p in
              model.parameters()]  # fmt: skip
    values = lay_aside(model)
    assert all(own.is_meta for own in [*model.parameters(), *model.buffers()])
    after = [[name for name, own in model.named_parameters(remove_duplicate=False) if own is p] for p in
             model.parameters()]  # fmt: skip
    assert before == after
    assert max(map(len, after)) > 1
    assert values.keys() >= {names[0] for names in after}
    assert stray(model) is None
    model.model.table = torch.ones(1)
    assert stray(model) == "model.table is a tensor, and neither a parameter nor a buffer"
