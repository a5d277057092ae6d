import pytest
import torch

from trainer.config import Config
from trainer.model.precision import Bf16ProductsInFp32
from trainer.predict import InferenceConfig, Predictor
from trainer.ranks import World
from trainer.train import build_model


def agree(ours: torch.Tensor, exact: torch.Tensor) -> bool:
    """Equal after rounding, but for the few that lie so near to a tie that the order of the sum decides."""
    return ours.dtype == torch.bfloat16 and (ours != exact.bfloat16()).float().mean().item() < 1e-3


def test_bf16_products_on_a_cpu_without_them():
    """What stands in for bfloat16 hardware gives its numbers: exact products, summed in fp32."""
    torch.manual_seed(0)
    a, b = torch.randn(200, 300).bfloat16(), torch.randn(300, 100).bfloat16()
    bias = torch.randn(100).bfloat16()
    with Bf16ProductsInFp32():
        product, affine = a @ b, torch.addmm(bias, a, b)
        batched = torch.bmm(a.view(2, 100, 300), b.expand(2, 300, 100))
        assert (a.float() @ b.float()).dtype == torch.float32
    exact = a.double() @ b.double()
    assert agree(product, exact)
    assert agree(affine, exact + bias.double())
    assert agree(batched.view(200, 100), exact)


def test_and_their_gradients():
    torch.manual_seed(0)
    inputs, weight = torch.randn(200, 300), torch.randn(50, 300, requires_grad=True)
    with Bf16ProductsInFp32():
        with torch.autocast("cpu", torch.bfloat16):
            output = torch.nn.functional.linear(inputs, weight)
        output.backward(torch.ones_like(output))
    assert agree(output, inputs.bfloat16().double() @ weight.bfloat16().double().T)
    column_sums = inputs.bfloat16().double().sum(0).expand(50, 300)
    assert agree(weight.grad.bfloat16(), column_sums)


@pytest.mark.parametrize("verb", ["train", "predict"])
def test_sums_of_16_bit_products_are_in_fp32(builtin_model, verb):
    matmul, world = torch.backends.cuda.matmul, World(0, 1, 0, torch.device("cpu"))
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True  # torch's own
    torch.backends.cuda.enable_cudnn_sdp(True)
    if verb == "train":
        build_model(Config(model_name_or_path=str(builtin_model), train_file="x"), world, ("a", "b", "c"))
    else:
        Predictor(str(builtin_model), InferenceConfig(), world)
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert verb == "predict" or not torch.backends.cuda.cudnn_sdp_enabled()
