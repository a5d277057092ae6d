"""What a forward and backward of some pairs take, counted on the run's real model, without its weights.

The model is made by the same functions as for training, on the meta device, and gets fake tensors, which have a shape
and a number format and no values (torch's FakeTensorMode). torch's own autocast and autograd run over them, so what is
dispatched is what a real step dispatches: every family, padded or not, with adapters, frozen layers or recomputed
activations, is counted by one piece of code. Attention's layout is decided on the host and stays real.

Counted are: FLOPs of matrix products, 2 a multiply-add, by torch.utils.flop_counter's formulas, which are (m, k) x
(k, n) = 2mkn; bytes that all other operations read and write; operations; and the most bytes alive at a time.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from trainer.config import Config
from trainer.data.tokens import Tokens
from trainer.model.attention import input_layers
from trainer.model.batch import Batch, assemble
from trainer.model.cross_encoder import checkpoint_activations
from trainer.model.facts import num_rows
from trainer.model.loading import load_for_training
from trainer.model.precision import autocast
from trainer.model.products import Products
from trainer.plan.counter import Counter, Counts

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model's parameters.

    Attributes:
        total: of the model as it is saved, adapters not.
        held: those in fp32 that a backend may shard and send, adapters among them;
            rows of the table that training cannot change are a buffer.
        trained: those that get gradients and moments.
        tail: of those, the embeddings, whose gradients come last in a backward.
        largest_layer: of the parts that fsdp gathers by themselves, the largest.
        buffers: bytes of what is no parameter, and of each rank in full.
    """

    total: int
    held: int
    trained: int
    tail: int
    largest_layer: int
    buffers: int


class Subject:
    """A run's model with fake tensors.

    Attributes:
        fast: whether steps are static: fused kernels, and copies of weights in bf16.
        likeness: of pairs in a group of attention; see CrossEncoder.batch.
        rows, frozen_rows, width: of the table of tokens, those that training cannot change, and how wide they are.
    """

    def __init__(self, config: Config, label_names: tuple[str, ...]) -> None:
        self.config = config
        with torch.device("meta"):
            self.model = load_for_training(dataclasses.replace(config, init="random"), label_names)
        if config.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.fast, self.likeness, self.rows, self.frozen_rows, self.width = False, 0.8, 0, 0, 0
        with self.fake:
            _fake(self.model)

    @property
    def unpadded(self) -> bool:
        return self.model.layout is not None and self.model.layout.unpad

    def settle(self, tokens: Tokens, fast: bool, on_cpu: bool) -> None:
        """Freezes what training cannot change, as train.freeze does, and takes the form of the run's steps."""
        with self.fake, Counter():
            self._freeze_unused()
            if self.config.weight_decay == 0:
                self._freeze_rows(tokens)
            if fast and self.config.bf16 and self.model.layout is not None and self.unpadded:
                Products(self.model.model, self.model.layout, input_layers(self.model.model), torch.bfloat16)
        self.fast, self.likeness = fast and self.unpadded, 0.8 if on_cpu and self.unpadded else 0.0

    def _freeze_unused(self) -> None:
        """What a backward of one pair leaves without a gradient; see model/probe.py."""
        self.model.train()
        self._backward(self.batch(np.array([8])))
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.requires_grad_(False)
        self.model.zero_grad()

    def _freeze_rows(self, tokens: Tokens) -> None:
        """See model/embedding.py. Which rows are used is known, not which lie where: the table gets fewer rows."""
        table = self.model.model.get_input_embeddings() if self.model.layout else None
        if type(table) is not nn.Embedding or not table.weight.requires_grad:
            return
        used = np.zeros(num_rows(self.model.model), dtype=bool)
        used[tokens.used] = True
        used[[self.model.padding, *([] if table.padding_idx is None else [table.padding_idx])]] = True
        self.rows, self.frozen_rows = len(used), int((~used).sum())
        if self.frozen_rows:
            self.width = table.embedding_dim
            self.model.padding = 0
            with torch.device("meta"):
                smaller = nn.Embedding(int(used.sum()), table.embedding_dim)
            self.model.model.set_input_embeddings(_fake(smaller))

    @property
    def parameters(self) -> Parameters:
        model, frozen = self.model, self.frozen_rows * self.width
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        layers: dict[str, int] = {}
        for name, size in sizes.items():
            parts = name.split(".")
            number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            if number is not None:
                key = ".".join(parts[: number + 1])
                layers[key] = layers.get(key, 0) + size
        tail = sum(size for name, size in trained.items() if "embed" in name)
        buffers = sum(b.untyped_storage().nbytes() for b in model.buffers())
        buffers += 4 * frozen + (8 * self.rows if self.frozen_rows else 0)  # and where each row is
        outside = sum(sizes.values()) - sum(layers.values())
        return Parameters(
            model.num_parameters + frozen,
            sum(sizes.values()),
            sum(trained.values()),
            tail,
            max([*layers.values(), outside]),
            buffers,
        )

    def batch(self, lengths: np.ndarray, num_pairs: int | None = None, longest: int | None = None) -> Batch:
        """Pairs of these lengths (pairs,), of the first token numbers, grouped as on the planned device."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        number = 1 + self.model.padding if self.model.padding + 1 < 3 else 0
        ids = np.full(offsets[-1], number, dtype=np.int32)
        tokens = Tokens.of(ids, offsets, np.zeros(offsets[-1], np.uint8), 0, "")
        rows = np.arange(len(lengths))
        model = self.model
        return assemble(tokens, np.zeros(len(rows), np.int64), rows, CPU, seed=1, step=1, likeness=self.likeness,
                        longest=longest if model.one_length else None, num_pairs=num_pairs, padding=model.padding,
                        first_position=model.first_position)  # fmt: skip

    def count(
        self, lengths: np.ndarray, training: bool = True, num_pairs: int | None = None, bf16: bool | None = None
    ) -> Counts:
        """Of one micro-batch; with `num_pairs` filled up to a static step's shape. `bf16`: None = as the run."""
        bf16 = self.config.bf16 if bf16 is None else bf16
        with unset_fake_temporarily():
            batch = self.batch(lengths, num_pairs if self.fast and training else None)
        with self.fake:
            self.model.zero_grad()
            counter = Counter()
            counter.ignore(self.model)
            hooks = [
                p.register_post_accumulate_grad_hook(counter.done) for p in self.model.parameters() if p.requires_grad
            ]
            self.model.train(training)
            with counter:
                self._backward(batch) if training else self._forward(batch, bf16)
            for hook in hooks:
                hook.remove()
            self.model.zero_grad()
        return Counts(**{own.name: getattr(counter, own.name) for own in dataclasses.fields(Counts)})

    def _forward(self, batch: Batch, bf16: bool) -> torch.Tensor:
        layout = self.model.layout
        with torch.no_grad(), autocast(CPU, bf16):
            logits = self.model(batch)
        if layout is not None:
            layout.forget()
        return logits

    def _backward(self, batch: Batch) -> None:
        layout = self.model.layout
        if layout is not None:
            layout.fast = self.fast
        try:
            with autocast(CPU, self.config.bf16, keep=not self.fast):
                logits = self.model(batch)
            logits.float().square().sum().backward()
        finally:
            if layout is not None:
                layout.fast = False
                layout.forget()


def _fake(module: nn.Module) -> nn.Module:
    """Puts fake tensors in place of all parameters and buffers, inside a FakeTensorMode; one of two names stays one."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for part in module.modules():
        own: dict[str, Any]
        for own in (part._parameters, part._buffers):  # type: ignore[assignment]
            own.update({name: fake(tensor) for name, tensor in own.items() if tensor is not None})
    return module
