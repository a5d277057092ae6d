"""What a step and an evaluation's batch send to a GPU, on fake CUDA tensors: see benchmarks/fakecuda.

A GPU step of this size waits for the host, which launches each operation: one more is a slower step, and a value that
the host reads, or a second copy, is a stall. Where a change takes operations away, lower its numbers here; where it has
to add some, raise them, and say in the commit what they bring.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks.fakecuda import library

# Device operations at most, in bf16 with dropout: of a plain step, of the static one without and with kernels, and of a
# batch of an evaluation. Of the versions in constraints.txt.
FORMS = ("plain", "static", "kernels", "evaluation")
CEILINGS = {
    "distilroberta": (805, 575, 236, 181),
    "bert": (329, 271, 129, 80),
    "distilbert": (312, 254, 140, 78),
    "deberta-v2": (443, 379, 331, 106),
    "modernbert": (300, 271, 228, 134),
    "roformer": (528, None, None, 122),
}
COUNTED = [(case, form) for case, numbers in CEILINGS.items() for form, n in zip(FORMS, numbers, strict=True) if n]


@pytest.fixture(scope="module")
def counted():
    """Of each case. In a process of its own, since torch has a CUDA device from then on."""
    if reason := library.why_not():
        pytest.skip(f"no fake CUDA device: {reason}")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.fakecuda", *CEILINGS]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(("case", "form"), COUNTED)
def test_no_more_operations_than_before_and_one_copy(counted, case, form):
    found = counted[case][form]
    assert len(found["copies_to_device"]) == 1, found["copies_to_device"]
    assert found["operations"] <= CEILINGS[case][FORMS.index(form)], found["by_cause"]
    assert found["host_reads"] == []


def test_a_shape_is_all_that_operations_depend_on(counted):
    """Other pairs, of other lengths, and fewer of them: what is recorded once is right for all of a shape."""
    shapes = {form: found["shapes"] for form, found in counted["bert"].items()}
    assert shapes["others"] == shapes["kernels"] != shapes["static"]


@pytest.mark.parametrize("case", [case for case in CEILINGS if case != "roformer"])
def test_without_triton_no_operator_of_ours_runs(counted, case):
    assert not [name for name in counted[case]["static"]["by_operation"] if "crossrank" in name]


def test_the_count_sees_the_parts_of_a_step(counted):
    """A part that is not counted, or not told from the rest, would let the others pass."""
    causes = counted["distilroberta"]["plain"]["by_cause"]
    for part in ("linear", "dropout", "attention", "norm", "activation", "embeddings"):
        assert causes[part].keys() == {"forward", "backward"}
    assert {"batch", "loss", "clipping", "optimizer", "window"} <= causes.keys()
