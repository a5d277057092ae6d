"""Learning rates, by transformers' own schedulers."""

import pytest
import torch
from transformers import get_scheduler

from trainer.base.errors import UserError
from trainer.config import Config
from trainer.options import Scheduler
from trainer.schedules import SETTINGS, Schedule

STEPS, RATE = 23, 3e-5
GIVEN = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "cosine_with_min_lr": [{"min_lr": 1e-6}, {"min_lr_rate": 0.1, "num_cycles": 1.5}],
    "cosine_warmup_with_min_lr": [{"min_lr": 1e-6}, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}],
    "polynomial": [{}, {"power": 2.0, "lr_end": 1e-6}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 30}],
    "warmup_stable_decay": [
        {"num_decay_steps": 7},
        {"num_decay_steps": 7, "num_stable_steps": 4, "min_lr_ratio": 0.1, "warmup_type": "cosine"},
        {"num_decay_steps": 9, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"},
        {"num_decay_steps": 9, "decay_type": "linear", "num_cycles": 0.7},
    ],
}


def made(kind: str, values: dict, warmup: int = 0, rate: float = RATE) -> Schedule:
    given = {name: str(value) for name, value in values.items()} or None
    config = Config(train_file="x", learning_rate=rate, lr_scheduler_type=kind, warmup_steps=warmup,
                    lr_scheduler_kwargs=given)  # fmt: skip
    return Schedule(config, STEPS)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("kind", "values"), [(kind, values) for kind in GIVEN for values in GIVEN[kind]])
def test_rates_are_those_of_transformers(kind, values, warmup):
    """To the last bit."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=RATE)
    theirs, expected = get_scheduler(kind, optimizer, warmup, STEPS, values), []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert list(map(made(kind, values, warmup), range(STEPS))) == expected


def test_a_rate_below_what_is_usual():
    with pytest.raises(UserError, match=r"lr_scheduler_type polynomial: lr_end \(1e-07\) must be smaller.*_kwargs"):
        made("polynomial", {}, rate=5e-8)
    assert [made(kind, GIVEN[kind][0] if kind != "cosine_with_min_lr" else {"min_lr_rate": 0.1}, rate=0.0)(3)
            for kind in GIVEN if kind != "cosine_warmup_with_min_lr"] == [0.0] * 9  # fmt: skip


def test_every_scheduler_is_here():
    assert set(GIVEN) == set(SETTINGS) == set(Scheduler.__args__)


@pytest.mark.parametrize(("kind", "values", "said"), [
    ("cosine", {"num_cycle": 2}, "there is no num_cycle; cosine takes num_cycles (number)"),
    ("linear", {"power": 2}, "there is no power; linear takes none"),
    ("cosine_with_restarts", {"num_cycles": 1.5}, "num_cycles must be a whole number"),
    ("cosine_with_min_lr", {}, "it needs one of min_lr and min_lr_rate; cosine_with_min_lr takes num_cycles"),
    ("cosine_with_min_lr", {"min_lr": 1, "min_lr_rate": 1}, "it needs one of"),
    ("cosine_with_min_lr", {"min_lr": 1}, "min_lr must be at most the learning_rate 3e-05, got 1"),
    ("cosine_with_min_lr", {"min_lr_rate": 2}, "min_lr_rate must be at most 1"),
    ("polynomial", {"lr_end": 1}, "lr_end must be below the learning_rate"),
    ("polynomial", {"power": "nan"}, "power must be at least 0, got nan"),
    ("inverse_sqrt", {"timescale": 0}, "timescale must be at least 1"),
    ("warmup_stable_decay", {}, "num_decay_steps is missing; warmup_stable_decay takes num_decay_steps (whole number, "
     "needed), num_stable_steps (whole number), warmup_type (linear|cosine|1-sqrt)"),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "sqrt"}, "decay_type must be one of linear, cosine"),
    ("warmup_stable_decay", {"num_decay_steps": 24}, "are more than the 23 steps of the run"),
    ("reduce_lr_on_plateau", {}, "reduce_lr_on_plateau: its rate follows the scores"),
])  # fmt: skip
def test_bad_settings(kind, values, said):
    with pytest.raises(UserError) as caught:
        made(kind, values)
    assert said in str(caught.value)
