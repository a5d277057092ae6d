"""LoRA: adapters and head are trained, the base is left as it is, and what is saved is a plain model."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import crossrank, events, losses, weights_equal
from families import save_encoder
from safetensors.torch import load_file
from test_loading import PAIRS, change_config, start

from trainer.api import predict
from trainer.base.errors import UserError
from trainer.data.builtin import LABEL_NAMES
from trainer.model.lora import is_adapter

peft = pytest.importorskip("peft")


def load_base(folder, model):
    """What a user of the adapter loads: the base model, with as many classes and the same padding token."""
    from transformers import AutoModelForSequenceClassification

    padding = model.model.config.pad_token_id
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=padding)


def probabilities(model, tokenizer) -> np.ndarray:
    """(pairs, classes) of PAIRS, each by itself."""
    texts = (tokenizer(*pair, return_tensors="pt", truncation=True, max_length=100) for pair in PAIRS)
    with torch.no_grad():
        return np.concatenate([model.eval()(**text).logits.softmax(-1).numpy() for text in texts])


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "t5", "gpt2", "qwen3"])
def test_adapter_and_merged_model(family, tmp_path):
    """Both score alike, here and elsewhere; peft's own merge gives the same bits, and needs no name twice."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = save_encoder(tmp_path / "encoder", family)
    model = start(encoder, lora_r=3, lora_alpha=5, attn_implementation="eager")  # with which it takes plain inputs
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save(model.model.state_dict(), tmp_path / "model")
    ours = predict(tmp_path / "model", PAIRS)
    assert np.abs(ours - probabilities(model.model, model.tokenizer)).max() < 1e-5
    theirs = sentence_transformers.CrossEncoder(str(tmp_path / "model")).predict(PAIRS, apply_softmax=True)
    assert np.abs(theirs - ours).max() < 1e-5

    loaded = peft.PeftModel.from_pretrained(load_base(encoder, model), tmp_path / "adapter")
    assert np.abs(probabilities(loaded, model.tokenizer) - ours).max() < 1e-5
    merged, base = loaded.merge_and_unload().state_dict(), load_base(encoder, model).state_dict()
    saved = weights(tmp_path / "model")
    assert all(torch.equal(merged[name], value) for name, value in saved.items())
    assert sum(not torch.equal(base[name], value) for name, value in saved.items()) >= len(model.lora.layers) > 5
    names = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == len({name.rpartition(".")[2] for name in model.lora.layers})


def test_what_is_trained(tmp_path):
    """Adapters and the head; not an embedding row, also where unused ones would be frozen."""
    encoder = save_encoder(tmp_path, "roberta")
    model = start(encoder, lora_r=2, lora_target_modules=["query", "attention.output.dense"])
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
    layers = [f"roberta.encoder.layer.{i}.attention.{name}" for i in (0, 1) for name in ("self.query", "output.dense")]
    head = {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
    assert trained == head | {f"{name}.lora_{m}.default.weight" for name in layers for m in "AB"}
    assert model.num_parameters == start(encoder).num_parameters
    again, other = (start(encoder, lora_r=2, seed=seed).model.state_dict() for seed in (42, 43))
    drawn = "roberta.encoder.layer.0.attention.self.query.lora_A.default.weight"
    assert torch.equal(again[drawn], model.model.state_dict()[drawn])
    assert not torch.equal(again[drawn], other[drawn])


RUN = ["--recipe", "demo", "--max_train_samples", "90", "--train_batch_size", "16", "--max_eval_samples", "40",
       "--max_test_samples", "20", "--max_steps", "9", "--num_train_epochs", "2", "--logging_steps", "1",
       "--learning_rate", "0.02", "--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--max_grad_norm", "0.5",
       "--eval_strategy", "steps", "--eval_steps", "3", "--load_best_model_at_end", "true",
       "--metric_for_best_model", "loss", "--save_steps", "2", "--save_total_limit", "null", "--max_length", "64",
       "--lora_r", "4", "--track_emissions", "false", "--write_report", "false"]  # fmt: skip
BACKENDS = {"ddp": [], "fsdp": ["--backend", "fsdp"], **{name: ["--deepspeed", name] for name in ("zero2", "zero3")}}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """An encoder that runs unpadded, with dropout, and a decoder."""
    folder = tmp_path_factory.mktemp("encoders")
    save_encoder(folder / "roberta", "roberta", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    save_encoder(folder / "qwen3", "qwen3")
    return folder


@pytest.fixture(scope="module")
def single(encoders, tmp_path_factory):
    """Both, trained by one process."""
    folder = tmp_path_factory.mktemp("single")
    for family in ("roberta", "qwen3"):
        crossrank("train", *RUN, "--model_name_or_path", encoders / family, "--output_dir", folder / family)
    return folder


def interrupted(folder, whole):
    """A copy of the whole run as it was when its process died in step 5."""
    shutil.copytree(whole, folder)
    for step in (6, 8, 9):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
    (folder / "results.json").unlink()
    return folder


CASES = [("ddp", "roberta"), ("zero3", "roberta"), ("fsdp", "qwen3")]
MORE = [("zero2", "qwen3"), ("fsdp", "roberta"), ("zero2", "roberta"), ("ddp", "qwen3"), ("zero3", "qwen3")]


@pytest.mark.parametrize(("backend", "family"), [*CASES, *(pytest.param(*c, marks=pytest.mark.full) for c in MORE)])
def test_the_same_run(encoders, single, tmp_path, backend, family):
    """Losses, weights, and the best evaluation's model at the end, of one process; resumed, the same bits."""
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = ["train", *RUN, *BACKENDS[backend], "--model_name_or_path", encoders / family, "--output_dir"]
    whole, reference = tmp_path / "whole", single / family
    said = crossrank(*run, whole, ranks=2).said
    assert "rows are frozen" not in said
    assert len(losses(whole)) == 9
    assert np.allclose(losses(whole), losses(reference), rtol=0, atol=1e-6)
    weights_equal(whole, reference, within=1e-4)

    crossrank(*run, interrupted(tmp_path / "resumed", whole), ranks=2)
    assert losses(tmp_path / "resumed") == losses(whole)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "resumed" / file).read_bytes() == (whole / file).read_bytes()


def test_the_best_model_comes_back(single):
    """A rate that wrecks the model; what is scored last is what was best, and lies in both folders."""
    *during, final = [event for event in events(single / "qwen3", "eval") if event["split"] == "builtin-dev"]
    best = min(during, key=lambda event: event["loss"])
    assert final["step"] == best["step"] < 9
    assert final["loss"] == best["loss"] < during[-1]["loss"]
    at_end = load_file(single / "qwen3/checkpoints/step-000009/tensors.safetensors")
    best_head = load_file(single / "qwen3/adapter/adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(weights(single / "qwen3" / "model")["score.weight"], best_head)
    assert not torch.equal(at_end["weight/model.score.weight"], best_head)


def test_a_checkpoint_is_small(single, encoders):
    """It holds adapters and head, three times."""
    tensors = load_file(single / "qwen3/checkpoints/step-000009/tensors.safetensors")
    names = {name.partition("/")[2] for name in tensors}
    assert all(is_adapter(name) or name == "model.score.weight" for name in names)
    assert len(tensors) == 3 * len(names) == 3 * (2 * 7 * 2 + 1)
    base = weights(encoders / "qwen3")
    merged = weights(single / "qwen3" / "model")
    kept = [name for name in base if torch.equal(base[name], merged[f"model.{name}"])]
    assert "embed_tokens.weight" in kept
    assert len(base) - len(kept) == 7 * 2


def test_recomputed_and_padded_are_the_same_run(encoders, single, tmp_path):
    model = ["--model_name_or_path", encoders / "roberta"]
    for name in ("gradient_checkpointing", "unpad"):
        value = "true" if name == "gradient_checkpointing" else "false"
        crossrank("train", *RUN, *model, f"--{name}", value, "--output_dir", tmp_path / name)
        assert np.allclose(losses(tmp_path / name), losses(single / "roberta"), rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_base_is_refused(encoders, single, tmp_path):
    """Its adapters would change other weights, or count more."""
    other = shutil.copytree(encoders / "qwen3", tmp_path / "other")
    changed = weights(other)
    changed["layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    from safetensors.torch import save_file

    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    there = ["--resume_from_checkpoint", single / "qwen3" / "checkpoints" / "step-000004"]
    for model, options in ((other, []), (encoders / "qwen3", ["--lora_alpha", "9"])):
        command = [*RUN, *there, "--model_name_or_path", model, *options, "--output_dir", tmp_path / "run"]
        result = crossrank("train", *command, check=False)
        assert result.returncode == 2
        assert "all of another model, under LoRA" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_card_says_so(encoders, tmp_path):
    options = ["--write_report", "true", "--max_steps", "2", "--lora_target_modules", "q_proj,v_proj"]
    result = crossrank(
        "train", *RUN, *options, "--model_name_or_path", encoders / "qwen3", "--output_dir", tmp_path / "run"
    )
    assert "LoRA: r 4, alpha 8, on q_proj, v_proj; 1,120 parameters are trained" in result.stderr
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert ("- **LoRA:** 1,120 parameters were trained: adapters of rank 4, alpha 8, on <code>q_proj</code>, "
            "<code>v_proj</code>; and the classification head.") in card  # fmt: skip
    assert f"- **Number of Parameters:** {start(encoders / 'qwen3').num_parameters:,}" in card


BAD = {
    "q_prj": "'q_prj' is the name of no linear layer of qwen3 outside its head; there are down_proj, gate_proj, k_proj",
    "q_proj,embed_tokens": "'embed_tokens' is the name of no linear layer",
    "score": "'score' is the name of no linear layer of qwen3 outside its head",
}


@pytest.mark.parametrize("names", BAD)
def test_target_modules_that_are_not_there(encoders, names):
    with pytest.raises(UserError, match=BAD[names]):
        start(encoders / "qwen3", lora_r=2, lora_target_modules=names)


def test_all_linear_is_what_none_means(encoders):
    named, unnamed = (start(encoders / "qwen3", lora_r=2, lora_target_modules=n).lora for n in ("all-linear", None))
    assert named.layers == unnamed.layers
    assert len(named.layers) == 14


def test_without_peft(encoders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "crossrank\[lora\]"'):
        start(encoders / "qwen3", lora_r=2)
    start(encoders / "qwen3")


def test_an_adapter_is_no_model(single, tmp_path):
    """Neither by itself nor beside a model, where transformers would load both."""
    own = single / "qwen3" / "adapter"
    for use in (lambda: predict(own, PAIRS), lambda: start(own)):
        with pytest.raises(UserError, match=rf"not a model: give its base model, .*/qwen3; {own.parent}/model has it"):
            use()
    both = shutil.copytree(single / "qwen3" / "model", tmp_path / "both")
    shutil.copy(own / "adapter_config.json", both)
    change_config(both, "adapter_config.json", base_model_name_or_path="Qwen/Qwen3-0.6B")
    for use in (lambda: predict(both, PAIRS), lambda: start(both, lora_r=2)):
        with pytest.raises(UserError, match=r"give its base model, Qwen/Qwen3-0\.6B, or merge it first by peft"):
            use()
    (both / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="which it does not name"):
        start(both)


def test_a_trained_model_goes_on(single, tmp_path):
    """A classifier with a head of its own, its classes in another order, is a base model too."""
    model = start(single / "roberta" / "model", lora_r=2, max_length=64)
    assert model.label_names == list(LABEL_NAMES)
    model.save(model.model.state_dict(), tmp_path / "model")
    assert np.array_equal(predict(tmp_path / "model", PAIRS), predict(single / "roberta" / "model", PAIRS))
