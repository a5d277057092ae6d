"""A CUDA device on a machine without one: what a step does on it can be counted, though nothing is computed.

`python -m benchmarks.fakecuda` prints, as JSON, the counts that tests/model/test_launches.py holds.

Tensors are torch's fake ones, which have a shape, a number format and the device "cuda", and no values. Autocast,
autograd and the choice of the fused optimizer are torch's own, as on a real card: which operations are dispatched is
what a real card would be sent. Fused attention, whose kernel torch chooses by the card, is chosen in device.py.

What is not seen: how many kernels an operation is, how long they take, and a kernel that is launched past torch's
dispatcher.

The device is registered once a process and stays: use a process of its own.
"""
