"""Counts what is dispatched to the device: operations by cause, values that the host waits for, copies."""

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fakecuda.causes import cause_of, place_of
from benchmarks.fakecuda.host import devices_of, name_of, waits

# Allocations, and what only looks at a tensor: the device gets nothing to do. Views say so themselves.
FREE = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "record_stream",
    "is_pinned", "set_", "resize_",
}  # fmt: skip
# Operations, by name (with the namespace where it is not aten), of which a card is sent several, or none. Every other
# one is counted as one, a custom one too, whatever it is made of.
LAUNCHES = {"crossrank::add_norm_backward": 2}  # rows, then the sums over them


@dataclass
class Counted:
    """Attributes:
    operations: how many of each (cause, "forward" or "backward", operation).
    host_reads: where the host waits for a value of the device, in order.
    copies: of each copy from the host to the device, the place.
    shapes: SHA-256 of all operations in order, with the shapes of what they are given.
    """

    operations: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    host_reads: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    shapes: Any = field(default_factory=hashlib.sha256)

    def to_json(self) -> dict[str, Any]:
        """Total, by cause (the most first), by operation, reads and copies."""
        causes: dict[str, Counter[str]] = {}
        names: Counter[str] = Counter()
        for (cause, phase, name), number in self.operations.items():
            causes.setdefault(cause, Counter())[phase] += number
            names[name] += number
        return {
            "operations": self.operations.total(),
            "host_reads": self.host_reads,
            "copies_to_device": self.copies,
            "shapes": self.shapes.hexdigest(),
            "by_cause": {k: dict(v) for k, v in sorted(causes.items(), key=lambda item: -item[1].total())},
            "by_operation": dict(names.most_common()),
        }


class Count(TorchDispatchMode):
    """Counts while it is active, inside `fake_cuda`; `taken()` gives what has been counted since it was last asked.

    A backward operation's cause is its forward operation's: autograd numbers its nodes in the order in which they are
    made, and each is made just before its operation is dispatched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        self.causes: dict[int, str] = {}  # of autograd's nodes, by number
        self.next_node = 0

    def taken(self) -> Counted:
        counted, self.counted, self.causes = self.counted, Counted(), {}
        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions to the tensor itself, such as for its device
            return func(*args, **kwargs)
        name = name_of(func)
        cause, phase = self._cause(name)
        given = devices_of((args, kwargs))
        reads = waits(func, args, kwargs)
        if reads:
            self.counted.host_reads.append(f"{name} at {place_of(sys._getframe(1))}")
        result = func(*args, **kwargs)
        devices = given | devices_of(result)
        if "cuda" not in devices or func.is_view or name in FREE:
            return result
        if name in ("_to_copy", "copy_") and given != {"cuda"} and not reads:
            self.counted.copies.append(place_of(sys._getframe(1)))
        sizes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.counted.shapes.update(f"{name} {sizes}".encode())
        self.counted.operations[cause, phase, name] += LAUNCHES.get(name, 1)
        return result

    def _cause(self, name: str) -> tuple[str, str]:
        """What the operation is for, and "forward" or "backward"."""
        if torch._C._current_graph_task_id() != -1:
            node = torch._C._current_autograd_node()
            # The sums of gradients have no node, and those of parameters none that a forward made.
            return self.causes.get(node._sequence_nr(), "gradients") if node else "gradients", "backward"
        cause = cause_of(sys._getframe(2))
        if name == "_to_copy" and cause == "linear":
            cause = "casts of linear"
        upcoming = torch._C._autograd._get_sequence_nr()
        self.causes.update(dict.fromkeys(range(self.next_node, upcoming), cause))
        self.next_node = upcoming
        return cause, "forward"
