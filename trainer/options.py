"""What a run learns from what: the fields of model, data, batch and optimisation."""

from dataclasses import dataclass
from typing import Literal

from trainer.base.fields import Fields, option

Objective = Literal["cross_entropy", "binary_cross_entropy", "mse"]
# The scores of each objective, the main ones first; see metrics.py.
SCORES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("f1_macro", "f1_micro", "f1_weighted", "accuracy"),
    "binary_cross_entropy": ("average_precision", "f1", "auc", "accuracy"),
    "mse": ("spearman", "pearson"),
}
# As a person reads them.
TITLES = {"f1_macro": "F1 Macro", "f1_micro": "F1 Micro", "f1_weighted": "F1 Weighted", "accuracy": "Accuracy",
          "average_precision": "Average Precision", "f1": "F1", "auc": "AUC", "spearman": "Spearman",
          "pearson": "Pearson"}  # fmt: skip
MAIN_SCORE = {objective: scores[0] for objective, scores in SCORES.items()}
Metric = Literal["accuracy", "f1_macro", "f1_micro", "f1_weighted", "f1", "average_precision", "auc", "pearson",
                 "spearman", "loss"]  # fmt: skip
Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
                    "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
                    "cosine_warmup_with_min_lr"]  # fmt: skip
FOLLOWS_SCORES = "its rate follows the scores of the run, so it is no function of the step; use linear or cosine"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Fields):
    """Model"""

    model_name_or_path: str = option("distilbert/distilroberta-base", path=True)
    """Encoder to start from: a hub name, a local folder, or `builtin` (a tiny BERT made from scratch)."""
    model_revision: str | None = None
    """Branch, tag or commit on the hub."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the architecture and the tokenizer, and draws the weights from `seed`."""
    max_length: int | None = option(None, above=0)
    """Longest pair in tokens, longest text cut first; None = the tokenizer's own limit."""
    dropout: float | None = option(None, at_least=0, below=1)
    """Every dropout probability of the model; None = the model's own."""
    attn_implementation: str | None = None
    """Attention kernel of transformers (sdpa, eager, flash_attention_2 ...); None = crossrank's own where it knows
    the family, whose dropout masks do not depend on the number of ranks."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Fields):
    """Data"""

    dataset_name: list[str] | None = option(None, path=True, kind="source")
    """Hub name, a folder of `save_to_disk`, or `builtin`; several as `a,b`, each also as `name:config`. Only a name in
    reports where *_file fields are given."""
    dataset_config_name: str | None = option(None, kind="source")
    """Configuration of a hub data set that has none after its name, such as `pair-class`."""
    dataset_revision: str | None = option(None, kind="source")
    """Branch, tag or commit on the hub."""
    train_file: list[str] | None = option(None, path=True, kind="source")
    """Training pairs: parquet, csv, tsv, jsonl (each also .gz), SNLI's or MultiNLI's own txt, jsonl or tsv, or a
    `save_to_disk` folder; also /dev/stdin and other pipes. Several as `a,b`, as a glob, or as a folder of them; each is
    a source, called by its file's name, or its folder's, or as in `NAME=PATH`. Where any *_file is given, nothing comes
    from the hub."""
    validation_file: list[str] | None = option(None, path=True, kind="source")
    """Pairs of the dev split; several make one, and are scored also by source."""
    test_file: list[str] | None = option(None, path=True, kind="source")
    """Pairs to test on. Of several, each is a test set by itself."""
    premise_column: list[str] | None = None
    """None = `premise`, else `sentence1`, `sentence_A` or `context`. Of several, as `a,b`, a file's first counts."""
    hypothesis_column: list[str] | None = None
    """None = `hypothesis`, else `sentence2`, `sentence_B` or `query`."""
    label_column: list[str] | None = None
    """None = `label`, else `gold_label`, `entailment_judgment`, `entailment_label` or `gold`; of numbers `score`,
    `similarity` or `relatedness_score`."""
    label_names: list[str] | None = None
    """Class names, in the order of the integer labels, as `a,b,c`; None = from the data. Integers without names mean
    entailment, neutral, contradiction where those are the classes."""
    label_map: list[str] | None = option(None, mapping=True)
    """Classes that are taken as another one, in training and in scoring: `neutral,contradiction=not_entailment`. Of
    numbers their names. NLI's three classes and a set of entailment and not_entailment need no map to be scored."""
    eval_label_map: list[str] | None = option(None, mapping=True)
    """The same in scoring only, of sets whose names are not all classes of the model: it keeps its classes, and the
    probabilities of what is mapped together add up."""
    max_samples_per_source: int | None = option(None, above=0)
    """Use the first N pairs of each source of the training split."""
    source_weights: list[str] | None = option(None, mapping=True)
    """How often an epoch has each pair of a source, as `snli=0.5,fever=2`: half of them, others in each epoch; each
    twice. Sources that are not named count 1."""
    max_train_samples: int | None = option(None, above=0)
    """Use the first N pairs of the training split."""
    max_eval_samples: int | None = option(None, above=0)
    """Use the first N pairs of the dev split."""
    max_test_samples: int | None = option(None, above=0)
    """Use the first N pairs of the test split."""
    verify_data: bool = option(False, kind="upkeep")
    """Read all text again and compare it with the cache, which else takes a file of the same size and modification time
    for the same."""

    def files(self, role: str) -> list[str] | None:
        """Of the role train, dev or test."""
        return {"train": self.train_file, "dev": self.validation_file, "test": self.test_file}[role]

    @property
    def has_files(self) -> bool:
        return any((self.train_file, self.validation_file, self.test_file))


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Fields):
    """Batch"""

    per_device_train_batch_size: int = option(64, above=0, kind="method")
    """Largest number of pairs in one forward of one rank."""
    per_device_eval_batch_size: int = option(64, above=0, kind="method")
    """Pairs in one forward of evaluation and prediction."""
    gradient_accumulation_steps: int = option(1, above=0, kind="method")
    """Forwards of a rank before an optimizer step."""
    train_batch_size: int | None = option(None, above=0)
    """Pairs in one optimizer step, over all ranks. When given, gradient_accumulation_steps is derived, and the run is
    the same on any number of ranks; None = per_device_train_batch_size * gradient_accumulation_steps * ranks."""


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig(Fields):
    """Optimisation"""

    objective: Objective = "cross_entropy"
    """What is learned: cross_entropy = classes; binary_cross_entropy = one score, of labels 0 and 1; mse = one score,
    of numbers such as STS-B's."""
    class_weights: list[str] | None = option(None, numbers=True)
    """Weight of each class in the training loss, in the classes' order, as `1,2,1`; balanced = in inverse proportion to
    their pairs."""
    pos_weight: float | None = option(None, above=0)
    """Weight of label 1 in binary cross-entropy."""
    learning_rate: float = option(5e-5, at_least=0)
    """Peak learning rate of AdamW."""
    layerwise_lr_decay: float = option(1.0, above=0, at_most=1)
    """Learning rate of a layer relative to the one above it, such as 0.9; 1 = all alike. The head and the top layer
    have the full one."""
    freeze_embeddings: bool = False
    """Leave the embeddings as they are."""
    freeze_layers: int = option(0, at_least=0)
    """Leave the embeddings and so many of the lowest layers as they are."""
    weight_decay: float = option(0.0, at_least=0)
    """Decoupled weight decay; never on biases and norms."""
    adam_beta1: float = option(0.9, at_least=0, below=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = option(0.999, at_least=0, below=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: float = option(1e-8, above=0)
    """AdamW's epsilon."""
    max_grad_norm: float = option(1.0, at_least=0)
    """Clip the global gradient norm to this; 0 = do not clip."""
    num_train_epochs: float = option(1.0, above=0)
    """Passes over the training data."""
    max_steps: int = -1
    """Optimizer steps; overrides num_train_epochs when positive."""
    lr_scheduler_type: Scheduler = option(
        "linear", refused=dict.fromkeys(("reduce_lr_on_plateau", "greedy"), FOLLOWS_SCORES)
    )
    """Course of the learning rate after warmup, by transformers' names."""
    lr_scheduler_kwargs: list[str] | None = option(None, mapping=True)
    """Its settings by transformers' names, such as `num_cycles=2` or `min_lr_rate=0.1`."""
    warmup_ratio: float = option(0.0, at_least=0, below=1)
    """Part of all steps over which the learning rate rises from 0."""
    warmup_steps: int = option(0, at_least=0)
    """The same in steps; overrides warmup_ratio when positive."""
    label_smoothing_factor: float = option(0.0, at_least=0, below=1)
    """Probability mass spread evenly over all classes."""
    lora_r: int = option(0, at_least=0)
    """LoRA, by peft: rank of the adapters that are trained, with the head, in the model's place; 0 = no LoRA."""
    lora_alpha: int | None = option(None, above=0)
    """What the adapters add is scaled by lora_alpha / lora_r; None = 2 * lora_r."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get an adapter, such as `q_proj,v_proj`; None = every linear layer but the head's."""
