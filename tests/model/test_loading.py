"""Models of many families as they come: loaded, trained, saved, and scored alike by others; or refused in one line."""

import json

import numpy as np
import pytest
import torch
from conftest import crossrank, losses, weights_equal
from families import SHAPES, save_encoder
from safetensors.torch import load_file, save_file

from tests.made_pairs import made_pairs, tokenize
from trainer.api import evaluate, predict
from trainer.base.errors import TrainingFailed, UserError
from trainer.config import Config
from trainer.data.builtin import LABEL_NAMES, make_tokenizer, pairs
from trainer.model.loading import load_for_training
from trainer.model.probe import examine, seen_padding
from trainer.model.settings import longest_input

ROWS = pairs("dev")[:30]
LONG = " ".join(row["premise"] for row in ROWS[:20])  # more than a pair may have
PAIRS = [(row["premise"], row["hypothesis"]) for row in ROWS]
PAIRS += [(LONG, "Cats sleep."), ("A [PAD] and [UNK] here.", "Two old [UNK] cats [PAD]"), ("Dogs.", LONG)]


def start(folder, **fields):
    fields = {"max_length": 100, "train_file": "none.csv"} | fields
    return load_for_training(Config(model_name_or_path=str(folder), **fields), LABEL_NAMES)


def save_classifier(folder, family, **changes):
    """The folder of a trained model, as a run writes it."""
    model = start(save_encoder(folder / "encoder", family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save(model.model.state_dict(), folder / "model")
    return folder / "model"


def change_config(folder, file="config.json", **changes):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("trained"), "bert")


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of `trained`, to be damaged."""
    import shutil

    return shutil.copytree(trained, tmp_path / "copy")


@pytest.mark.parametrize("family", sorted(SHAPES.keys() - {"convbert"}))
def test_an_encoder_gets_a_head(family, tmp_path):
    """Its own weights are all taken, and it is scored alike by sentence_transformers and by a pipeline."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import pipeline

    model = save_classifier(tmp_path, family)
    tokenizer = json.loads((tmp_path / "encoder" / "tokenizer_config.json").read_text())
    assert "token_type_ids" in tokenizer["model_input_names"]  # also where the model would take them for tokens
    ours = predict(model, PAIRS)
    assert np.abs(ours - ours.mean(0)).max() > 1e-3
    theirs = sentence_transformers.CrossEncoder(str(model)).predict(PAIRS, apply_softmax=True)
    assert np.abs(theirs - ours).max() < 1e-5
    classify = pipeline("text-classification", str(model), top_k=None)
    texts = [{"text": premise, "text_pair": hypothesis} for premise, hypothesis in PAIRS]
    for row, mine in zip(classify(texts, truncation=True), ours, strict=True):
        assert [{c["label"]: c["score"] for c in row}[name] for name in LABEL_NAMES] == pytest.approx(mine, abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "gpt2"])
def test_padding_on_the_left_is_not_saved(family, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = save_encoder(tmp_path / "encoder", family)
    change_config(folder, "tokenizer_config.json", padding_side="left")
    change_config(folder, task_specific_params={"text-classification": {"problem_type": "regression"}})
    model = start(folder)
    model.save(model.model.state_dict(), tmp_path / "model")
    theirs = sentence_transformers.CrossEncoder(str(tmp_path / "model")).predict(PAIRS, apply_softmax=True)
    assert np.abs(theirs - predict(tmp_path / "model", PAIRS)).max() < 1e-5
    assert json.loads((tmp_path / "model" / "config.json").read_text()).get("task_specific_params") is None


@pytest.mark.parametrize(("family", "lost"), [("bert", "encoder.layer.1.output.dense.weight"),
                                              ("deberta-v2", "encoder.layer.1.output.dense.weight"),
                                              ("t5", "encoder.final_layer_norm.weight")])  # fmt: skip
def test_a_part_of_the_encoder_is_missing(family, lost, tmp_path):
    folder = save_encoder(tmp_path, family)
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lack 1 tensors of the encoder, such as .*{lost}"):
        start(folder)


def test_every_dropout_and_no_switch(tmp_path):
    for family in ("gpt2", "esm", "bart", "t5"):
        config = start(save_encoder(tmp_path / family, family), dropout=0.25).model.config.to_dict()
        given = {name: value for name, value in config.items() if "drop" in name and value is not None}
        expected = {"token_dropout": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
        assert given == {name: expected.get(name, 0.25) for name in given}
        assert len(given) > 1


def test_layers_are_not_left_out_by_chance(tmp_path, said):
    model = start(save_encoder(tmp_path, "bart", encoder_layerdrop=0.5))
    assert model.model.model.encoder.layerdrop == 0
    assert "encoder_layerdrop 0.5 is set to 0" in said[0]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(copied, number):
    weights = load_file(copied / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    weights[name][3, 5] = number
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    for use in (lambda: predict(copied, PAIRS), lambda: start(copied)):
        with pytest.raises(UserError, match=f"{name} holds numbers that are not finite"):
            use()


def test_scores_that_are_no_numbers(copied, tmp_path):
    """Finite weights, of which one token's are too large."""
    weights = load_file(copied / "model.safetensors")
    number = make_tokenizer().convert_tokens_to_ids("museum")
    weights["bert.embeddings.word_embeddings.weight"][number] = 3e38
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    sound, overflowing = "A cat.,A dog.,entailment", "A museum.,A dog.,neutral"
    (tmp_path / "test.csv").write_text("\n".join(["premise,hypothesis,label", sound, overflowing, sound, overflowing]))
    expected = r"rows 1, 3: the model's scores are not finite \(2 of 4 pairs\)"
    with pytest.raises(TrainingFailed, match=expected):
        predict(copied, [("A cat.", "A dog."), ("A museum.", "A dog.")] * 2)
    with pytest.raises(TrainingFailed, match=expected):
        evaluate(copied, test_file=str(tmp_path / "test.csv"))
    result = crossrank("predict", copied, "--input", tmp_path / "test.csv", ranks=2, check=False)
    assert result.returncode == 1
    assert result.stderr.count("rows 1, 3: ") == 1
    assert result.stdout == ""


SETTINGS = {
    "from 1": ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "numbers the classes 1, 2, 3"),
    "gap": ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "numbers the classes 0, 1, 3"),
    "twice": ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "names 'a' twice"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_classes_that_are_unclear(copied, case):
    changes, expected = SETTINGS[case]
    change_config(copied, **changes)
    for use in (lambda: predict(copied, PAIRS), lambda: start(copied)):
        with pytest.raises(UserError, match=expected):
            use()


# What config.json says and the weights do not, or what no model can be made of. {} is the folder.
FAULTS = {
    "a layer less": ({"num_hidden_layers": 1}, "{}: its weights hold 16 tensors of the encoder that its config.json"),
    "a layer more": ({"num_hidden_layers": 3}, "{}: its weights lack 16 tensors of the encoder, .* by its config.json"),
    "no layer": ({"num_hidden_layers": 0}, "{}: num_hidden_layers in its config.json must be above 0"),
    "another width": (
        {"intermediate_size": 40},
        r"{}: .*has the shape \[48\] in its weights, and \[40\] by its config.json",
    ),
    "heads": ({"num_attention_heads": 5}, "{}: .*config.json .*multiple of the number of attention heads"),
    "activation": ({"hidden_act": "foo"}, "{}: .*config.json .*KeyError: 'foo'"),
    "dropout": ({"hidden_dropout_prob": 1.5}, "{}: hidden_dropout_prob in its config.json must be at least 0"),
    "text": ({"hidden_size": "32"}, "{} has no config.json that can be loaded .*expected int, got str"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_the_config_is_not_blamed_on_the_weights(copied, case):
    changes, expected = FAULTS[case]
    change_config(copied, **changes)
    for use in (lambda: predict(copied, PAIRS), lambda: start(copied)):
        with pytest.raises(UserError, match=expected.format(copied)):
            use()


def test_a_head_of_other_classes_is_named(copied):
    change_config(copied, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(UserError, match=r"config\.json names 2 classes, its weights are of 3"):
        predict(copied, PAIRS)


@pytest.mark.parametrize("family", ["roberta", "bart", "gpt2", "xlnet", "esm"])
def test_layers_that_the_config_leaves_out_are_not_lost_in_silence(family, tmp_path):
    """An encoder's file names its tensors otherwise than a classifier's. Heads of pretraining may go, and poolers."""
    from transformers import AutoConfig

    folder = save_encoder(tmp_path / "encoder", family)
    weights = load_file(folder / "model.safetensors")
    more = {name: torch.ones(3) for name in ("lm_head.weight", "cls.predictions.bias", "pooler.dense.weight")}
    save_file({**more, **weights}, folder / "model.safetensors", metadata={"format": "pt"})
    start(folder)
    layers = AutoConfig.for_model(family).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    change_config(folder, **{layers: 1})
    with pytest.raises(UserError, match="tensors of the encoder that its config"):
        start(folder)


@pytest.mark.parametrize("length", ["128", [3], True])
def test_a_length_that_is_no_number(copied, length):
    change_config(copied, "tokenizer_config.json", model_max_length=length)
    with pytest.raises(UserError, match=r"model_max_length in tokenizer_config\.json must be a number"):
        predict(copied, PAIRS)


@pytest.mark.parametrize(
    ("name", "value"), [("return_dict", False), ("chunk_size_feed_forward", 7), ("output_hidden_states", True)]
)
def test_settings_that_change_no_score(trained, copied, name, value):
    change_config(copied, **{name: value})
    assert np.array_equal(predict(copied, PAIRS), predict(trained, PAIRS))


@pytest.mark.parametrize(("longest", "expected"), [(64.0, 64), (1e30, 130), (int(1e30), 130)])
def test_longest_input(tmp_path, longest, expected):
    folder = save_encoder(tmp_path, "bert")
    change_config(folder, "tokenizer_config.json", model_max_length=longest)
    model = start(folder, max_length=None)
    assert (model.max_length, type(model.max_length)) == (expected, int)
    model.model.config.max_position_embeddings = -1
    assert longest_input(model.model, model.tokenizer, None) == (64 if longest == 64 else int(1e9))


def test_no_room(tmp_path):
    folder = save_encoder(tmp_path, "bert")
    change_config(folder, "tokenizer_config.json", model_max_length=0)
    with pytest.raises(UserError, match=r"model_max_length in tokenizer_config\.json, 0 leaves no room"):
        start(folder, max_length=None)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_padding_token_is_found(family, tmp_path, said):
    """The tokenizer's; without one, the end of the text."""
    folder = save_encoder(tmp_path / "encoder", family)
    assert start(folder).model.config.pad_token_id == 0
    assert "pad_token_id None in its config.json is set to 0" in said[-1]
    change_config(folder, "tokenizer_config.json", pad_token=None)
    model = start(folder)
    assert model.tokenizer.pad_token_id == model.model.config.pad_token_id == 3
    assert "'[SEP]' is taken" in said[-2]
    change_config(folder, "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="set pad_token in"):
        start(folder)


def test_a_token_that_the_model_does_not_have(copied, tmp_path):
    """Training sees only its own tokens."""
    weights = load_file(copied / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    number = make_tokenizer().convert_tokens_to_ids("young")
    weights[name] = weights[name][:number].clone()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    change_config(copied, vocab_size=number)
    predict(copied, [("a b c", "b c d")])
    with pytest.raises(UserError, match=f"row 1: the tokenizer gives token {number}, and the model has {number} "):
        predict(copied, [("a b c", "b c d"), ("young men", "men")])


def test_a_token_type_that_the_model_does_not_have(tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = save_classifier(tmp_path, "bert")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS]:2 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="row 0: the tokenizer gives token type 2, and the model has 2 token types"):
        predict(folder, PAIRS)


def test_an_end_that_is_not_found(tmp_path):
    model = save_classifier(tmp_path, "bart")
    with pytest.raises(UserError, match="row 2: the model finds the end by token 3, and this one has 3 of it, not 2"):
        predict(model, [*PAIRS[:2], ("A cat [SEP] sleeps.", "A cat."), *PAIRS[2:4]])


@pytest.mark.parametrize("family", ["bert", "convbert", "deberta"])
def test_a_model_that_sees_padding(family, tmp_path):
    model = start(save_encoder(tmp_path, family), attn_implementation="eager" if family == "bert" else None)
    seen = seen_padding(model.eval(), tokenize(labelled(PAIRS), model.tokenizer, 100), "cpu")
    assert (seen > 0) == (family == "convbert")


def test_padding_is_looked_for_as_on_the_runs_device(tmp_path):
    """On the CPU, where a sharded model is looked at, a difference that a GPU's rounding would hide counts for none."""
    model = start(save_encoder(tmp_path, "bert"), attn_implementation="eager")
    tokens = tokenize(labelled(PAIRS), model.tokenizer, 100)
    model.model.classifier.register_forward_hook(lambda module, args, out: out * (1 + 1e-5 * len(out)))
    assert 1e-5 < seen_padding(model.eval(), tokens, "cpu") < 1e-3
    for device, expected in ((None, True), ("cpu", True), ("cuda", False)):
        model.one_length = False
        examine(model, tokens, True, device)
        assert model.one_length == expected, device


def labelled(texts):
    return made_pairs(texts, names=LABEL_NAMES)


@pytest.mark.parametrize(("family", "tokenizer", "expected"), [
    ("canine", "CanineTokenizer", "CanineTokenizer has no Rust tokenizer"),
    ("perceiver", "PerceiverTokenizer", "PerceiverTokenizer has no Rust tokenizer"),
    ("canine", None, "canine has no table of tokens"),
])  # fmt: skip
def test_models_that_read_no_tokens(family, tokenizer, expected, tmp_path):
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.AutoConfig.for_model(family, **small if family == "canine" else {}).save_pretrained(tmp_path)
    (getattr(transformers, tokenizer)() if tokenizer else make_tokenizer()).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(UserError, match=expected):
        start(tmp_path, init="random")


def test_a_padding_token_that_is_out_of_range(tmp_path):
    folder = save_encoder(tmp_path, "bert")
    change_config(folder, pad_token_id=10**6)
    with pytest.raises(UserError, match="transformers cannot make this model"):
        start(folder, init="random")


def test_special_tokens_as_text(tmp_path):
    """A tokenizer can be told to read them as any other text."""
    folder = save_encoder(tmp_path, "bert")
    change_config(folder, "tokenizer_config.json", split_special_tokens=True)
    tokenizer = start(folder).tokenizer
    tokens = tokenize(labelled(PAIRS[-2:-1]), tokenizer, 100)
    assert tokens.ids.tolist() == tokenizer(*PAIRS[-2])["input_ids"]


def test_code_of_its_own(tmp_path):
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForSequenceClassification": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    with pytest.raises(UserError, match="--trust_remote_code true"):
        start(tmp_path)


class Other:
    """What a pickle may hold beside weights."""


def test_a_pickle_that_is_no_plain_one(tmp_path):
    folder = save_encoder(tmp_path, "bert")
    torch.save(load_file(folder / "model.safetensors") | {"other": Other()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        start(folder)
    assert "model.safetensors" in str(error.value)
    assert "weights_only" not in str(error.value)


RUN = ["--recipe", "demo", "--max_train_samples", "48", "--train_batch_size", "16", "--max_eval_samples", "20",
       "--max_test_samples", "20", "--max_steps", "3", "--logging_steps", "1", "--eval_strategy", "epoch",
       "--weight_decay", "0.1", "--track_emissions", "false", "--write_report", "false",
       "--max_length", "64"]  # fmt: skip


def test_no_gradient_checkpointing(tmp_path):
    folder = save_encoder(tmp_path, "xlm")
    result = crossrank("train", *RUN, "--model_name_or_path", folder, "--gradient_checkpointing", "true", check=False)
    assert result.returncode == 2
    assert "xlm has no gradient checkpointing" in result.stderr
    assert "Traceback" not in result.stderr


UNUSED = [("luke", "ddp"), ("luke", "zero2"), ("mbart", "fsdp")]
UNUSED += [pytest.param(*case, marks=pytest.mark.full) for case in (("luke", "fsdp"), ("roformer", "ddp"),
                                                                    ("big_bird", "ddp"))]  # fmt: skip


@pytest.mark.parametrize(("family", "backend"), UNUSED)
def test_tensors_without_a_gradient(family, backend, tmp_path):
    """They are frozen: no backend waits for them, or lets them decay. Any resumes what another saved."""
    folder = save_encoder(tmp_path / "encoder", family)
    wiring = ["--deepspeed", backend] if backend.startswith("zero") else ["--backend", backend]
    run = [*RUN, "--model_name_or_path", folder, "--save_strategy", "steps", "--save_steps", "2",
           "--load_best_model_at_end", "true"]  # fmt: skip
    said = crossrank("train", *run, "--output_dir", tmp_path / "one").stderr
    assert ("get no gradient" in said) == (family != "mbart")
    crossrank("train", *run, *wiring, "--output_dir", tmp_path / "two", ranks=2)
    assert np.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)
    weights_equal(tmp_path / "two", tmp_path / "one", within=1e-4)
    if backend == "zero2":
        there = ["--resume_from_checkpoint", tmp_path / "one" / "checkpoints" / "step-000002"]
        crossrank("train", *run, *wiring, *there, "--output_dir", tmp_path / "three", ranks=2)
        weights_equal(tmp_path / "three", tmp_path / "one", within=1e-4)


@pytest.mark.parametrize(
    ("family", "backend", "more"),
    [("deberta-v2", "zero3", []), ("deberta", "fsdp", ["--gradient_checkpointing", "true"]), ("gpt2", "ddp", [])],
)
def test_dropout_is_the_same_on_two_ranks(family, backend, more, tmp_path):
    """Also in several forwards a step, recomputed, and where ranks have different numbers of groups."""
    folder = save_encoder(tmp_path / "encoder", family)
    wiring = ["--deepspeed", backend] if backend.startswith("zero") else ["--backend", backend]
    run = [*RUN, "--model_name_or_path", folder, "--dropout", "0.1", "--eval_strategy", "no"]
    crossrank("train", *run, "--output_dir", tmp_path / "one")
    small = ["--per_device_train_batch_size", "3"]
    crossrank("train", *run, *wiring, *more, *small, "--output_dir", tmp_path / "two", ranks=2)
    assert np.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-6)


def test_a_head_of_other_classes_is_said(tmp_path, said):
    """With as many classes it goes on from its weights, with another number it is new."""
    folder = save_classifier(tmp_path, "bert")
    trained = start(folder).model.classifier.weight
    assert not said
    for names, what in ((["x", "y", "z"], "goes on as that of"), (["x", "y"], "is drawn anew for")):
        config = Config(model_name_or_path=str(folder), train_file="t.csv")
        model = load_for_training(config, names).model
        assert said[-1].endswith(f"; the head {what} {', '.join(names)}")
        assert torch.equal(model.classifier.weight, trained) == (len(names) == 3)


def test_a_head_keeps_its_classes_whatever_their_case(tmp_path, said):
    folder = save_classifier(tmp_path, "bert")
    old = start(folder)
    names = [name.upper() for name in reversed(old.label_names)]
    model = load_for_training(Config(model_name_or_path=str(folder), train_file="t.csv"), names)
    assert (model.label_names, said) == (names, [])
    assert torch.equal(model.model.classifier.weight, old.model.classifier.weight.flip(0))
