"""What ranks of the tests are forked with: everything imported, and the embedded data made."""

import evaluate
import sklearn.metrics
import transformers.models.bert.modeling_bert

import trainer.backends.ddp
import trainer.predict
import trainer.train
from trainer.data.builtin import pairs

pairs("train")
__all__ = ["evaluate", "sklearn", "trainer", "transformers"]
