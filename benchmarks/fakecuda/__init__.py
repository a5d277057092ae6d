"""A CUDA device on a machine without one: what a step does on it can be counted, though nothing is computed.

`python -m benchmarks.fakecuda` prints, as JSON, the counts that tests/model/test_launches.py holds.

Tensors are torch's fake ones, which have a shape, a number format and the device "cuda", and no values. Autocast,
autograd and the choice of the fused optimizer are torch's own, as on a real card: which operations are dispatched is
what a real card would be sent. What is not seen: how many kernels an operation is, and how long they take.

The device is registered once a process and stays: use a process of its own.
"""
