import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.base.errors import UserError
from trainer.config import BatchConfig, OptimisationConfig
from trainer.data.sampler import (
    GlobalBatchSampler,
    deal,
    epoch_order,
    global_batch_size,
    num_forwards,
    total_steps,
)


def make(num_samples=100, batch_size=8, seed=42, num_steps=30, fingerprint="f"):
    return GlobalBatchSampler(num_samples, batch_size, seed, num_steps, fingerprint)


@pytest.mark.parametrize("seed", [7, 42])
@pytest.mark.parametrize("epoch", [0, 1])
def test_order_is_the_reference_trainers(seed, epoch):
    """The order that accelerate's sampler, which sentence-transformers trains with, draws."""
    accelerate = pytest.importorskip("accelerate.data_loader")
    reference = accelerate.SeedableRandomSampler(range(1000), data_seed=seed)
    reference.set_epoch(epoch)
    assert list(reference) == epoch_order(1000, seed, epoch).tolist()


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 5))
def test_an_epoch_sees_every_row_once(num_samples, batch_size, seed):
    sampler = make(num_samples, batch_size, seed, num_steps=-(-num_samples // batch_size))
    steps = list(sampler.steps())
    assert sorted(np.concatenate([s.rows for s in steps])) == list(range(num_samples))
    assert all(len(s.rows) == batch_size for s in steps[:-1])
    assert [s.step for s in steps] == list(range(len(steps)))


@given(st.lists(st.integers(3, 200), max_size=150), st.integers(1, 9))
def test_deal_is_a_balanced_partition(lengths, num_parts):
    lengths = np.array(lengths, dtype=np.int64)
    parts = deal(lengths, num_parts)
    assert len(parts) == num_parts
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    totals = [lengths[part].sum() for part in parts]
    # Back and forth over falling lengths: parts differ by no more than two of the longest.
    assert max(totals) - min(totals) <= 2 * lengths.max(initial=0)


def test_deal_evens_out_tokens():
    rng = np.random.default_rng(0)
    dealt, plain = [], []
    for _ in range(200):
        lengths = rng.poisson(27, 64)
        dealt.append(max(lengths[p].sum() for p in deal(lengths, 4)) * 4 / lengths.sum())
        plain.append(max(part.sum() for part in np.split(lengths, 4)) * 4 / lengths.sum())
    assert np.mean(dealt) < 1.01 < np.mean(plain)


@given(st.integers(0, 29))
def test_resuming_seeks(done):
    whole = [s.rows.tolist() for s in make().steps()]
    start = make().seek(make().position(done))
    assert start == done
    assert [s.rows.tolist() for s in make().steps(start)] == whole[done:]


def test_epochs_differ_and_the_short_batch_is_kept():
    steps = list(make(num_samples=20, batch_size=8, num_steps=6).steps())
    assert [len(s.rows) for s in steps] == [8, 8, 4, 8, 8, 4]
    assert [s.epoch for s in steps] == [0, 0, 0, 1, 1, 1]
    assert steps[0].rows.tolist() != steps[3].rows.tolist()


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 9}, {"num_samples": 99}, {"fingerprint": "other"}])
def test_another_run_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        make(**change).seek(make().position(3))


def test_batch_sizes():
    assert global_batch_size(BatchConfig(per_device_train_batch_size=8, gradient_accumulation_steps=3), 4) == 96
    assert global_batch_size(BatchConfig(train_batch_size=64), 4) == 64
    assert num_forwards(8, 64, 2) == 4
    assert num_forwards(64, 3, 4) == 1


def test_total_steps_counts_short_batches():
    assert total_steps(OptimisationConfig(num_train_epochs=2), 65, 64) == 4
    assert total_steps(OptimisationConfig(num_train_epochs=0.5), 640, 64) == 5
    assert total_steps(OptimisationConfig(max_steps=7), 65, 64) == 7
