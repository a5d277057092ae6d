"""What a device operation is for, told by the innermost frame of Python that is known here."""

from types import FrameType

from benchmarks.common import ROOT

# (end of the file's path, function or "" for all of them, cause). The first rule that fits a frame decides.
RULES = (
    ("trainer/model/products.py", "", "linear"),
    ("trainer/model/dropout.py", "", "dropout"),
    ("trainer/model/masks.py", "", "dropout"),
    ("trainer/model/calls.py", "", "dropout"),
    ("torch/nn/modules/dropout.py", "", "dropout"),
    ("torch/nn/functional.py", "dropout", "dropout"),
    ("trainer/model/layout.py", "", "layout"),
    ("trainer/model/attention.py", "grouped", "layout"),
    ("trainer/model/attention.py", "residual_forward", "residual"),
    ("trainer/model/attention.py", "", "attention"),
    ("trainer/model/deberta.py", "distances", "layout"),
    ("trainer/model/deberta.py", "", "attention"),
    ("trainer/model/batch.py", "", "batch"),
    ("trainer/model/embedding.py", "", "embeddings"),
    ("trainer/model/cross_encoder.py", "", "layout"),
    ("trainer/run/state.py", "", "window"),
    ("trainer/backends/single.py", "_clip", "clipping"),
    ("trainer/backends/single.py", "step", "optimizer"),
    ("torch/nn/utils/clip_grad.py", "", "clipping"),
    ("torch/optim/", "", "optimizer"),
    ("torch/nn/modules/linear.py", "", "linear"),
    ("torch/nn/modules/normalization.py", "", "norm"),
    ("torch/nn/modules/activation.py", "", "activation"),
    ("torch/nn/modules/sparse.py", "", "embeddings"),
    ("torch/nn/functional.py", "cross_entropy", "loss"),
    ("trainer/step/plain.py", "", "loss"),
    ("trainer/step/static.py", "update", "optimizer"),
    ("trainer/step/static.py", "", "loss"),
    ("transformers/activations.py", "", "activation"),
    ("transformers/masking_utils.py", "", "layout"),
    ("transformers/modeling_attn_mask_utils.py", "", "layout"),
    ("transformers/integrations/", "", "attention"),
    ("fakecuda/device.py", "fused_attention", "attention"),
    ("sentence_transformers/util/tensor.py", "batch_to_device", "batch"),
    ("transformers/tokenization_utils_base.py", "", "batch"),
    ("accelerate/utils/operations.py", "send_to_device", "batch"),
    ("losses/cross_entropy.py", "", "loss"),
    ("transformers/loss/", "", "loss"),
    ("transformers/trainer.py", "", "trainer"),
    ("accelerate/", "", "trainer"),
)
# In the library's files of models, its classes' names tell.
CLASSES = (
    ("Rotary", "rotary"),
    ("Embedding", "embeddings"),
    ("SelfOutput", "residual"),
    ("Attention", "attention"),
    ("Norm", "norm"),
    ("Activation", "activation"),
)
FUNCTIONS = {"eager_attention_forward": "attention", "rotate_half": "rotary", "apply_rotary_pos_emb": "rotary"}


def cause_of(frame: FrameType | None) -> str:
    """Of an operation that is dispatched below `frame`; "rest" where no frame is known, as of a sum of gradients."""
    while frame is not None:
        if cause := _of_one(frame):
            return cause
        frame = frame.f_back
    return "rest"


def _of_one(frame: FrameType) -> str | None:
    path, function = frame.f_code.co_filename, frame.f_code.co_name
    for place, name, cause in RULES:
        fits = place in path if place.endswith("/") else path.endswith(place)
        if fits and name in ("", function):
            return cause
    if "/transformers/models/" not in path:
        return None
    if function in FUNCTIONS:
        return FUNCTIONS[function]
    kind = type(frame.f_locals.get("self")).__name__
    # What a layer does between its modules is to add.
    return next((cause for part, cause in CLASSES if part in kind), "residual")


def place_of(frame: FrameType | None) -> str:
    """FILE:LINE FUNCTION of the innermost frame outside torch and this package: where a reader would look."""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "/fakecuda/" not in path:
            short = path.partition("/site-packages/")[2] or path.removeprefix(f"{ROOT}/")
            return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"
