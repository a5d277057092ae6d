import os
import socket
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.base.errors import UserError
from trainer.config import BatchConfig, OptimisationConfig
from trainer.data import orders as orders_module
from trainer.data import sampler
from trainer.data.orders import KEPT
from trainer.data.sampler import (
    Deal,
    GlobalBatchSampler,
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


def deal(lengths, num_parts):
    """The definition: all parts, longest first, back and forth."""
    by_length = np.argsort(-lengths, kind="stable")
    row, column = np.divmod(np.arange(len(lengths)), num_parts)
    part = np.empty(len(lengths), dtype=np.int64)
    part[by_length] = np.where(row % 2 == 0, column, num_parts - 1 - column)
    return np.split(np.argsort(part, kind="stable"), np.bincount(part, minlength=num_parts)[:-1].cumsum())


@given(st.lists(st.integers(3, 200) | st.sampled_from([70_000, 2**33]), max_size=150), st.integers(1, 9))
def test_a_deal_is_a_balanced_partition(lengths, num_parts):
    lengths = np.array(lengths, dtype=np.int64)
    dealt = Deal(lengths, num_parts)
    parts = [dealt.part(number) for number in range(num_parts)]
    assert [part.tolist() for part in parts] == [part.tolist() for part in deal(lengths, num_parts)]
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == dealt.largest
    totals = [lengths[part].sum() for part in parts]
    # Back and forth over falling lengths: parts differ by no more than two of the longest.
    assert max(totals) - min(totals) <= 2 * lengths.max(initial=0)
    measured = [(len(part), lengths[part].max(), lengths[part].sum()) for part in parts if len(part)]
    assert list(dealt.measures()) == measured
    assert not len(lengths) or dealt.longest == lengths.max()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_a_deal_of_any_type_of_lengths(dtype):
    lengths = np.random.default_rng(0).integers(1, 256, 1000)
    for number, part in enumerate(deal(lengths, 7)):
        assert Deal(lengths.astype(dtype), 7).part(number).tolist() == part.tolist()


def test_a_deal_evens_out_tokens():
    rng = np.random.default_rng(0)
    dealt, plain = [], []
    for _ in range(200):
        lengths = rng.poisson(27, 64)
        parts = map(Deal(lengths, 4).part, range(4))
        dealt.append(max(lengths[p].sum() for p in parts) * 4 / lengths.sum())
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


@pytest.mark.parametrize(("chunk", "num_steps"), [(1, 30), (32, 30), (1 << 20, 30), (32, 17)])
def test_the_largest_steps(chunk, num_steps, monkeypatch):
    monkeypatch.setattr(sampler, "CHUNK", chunk)
    lengths = np.random.default_rng(1).integers(1, 200, 100).astype(np.uint8)
    made = make(num_steps=num_steps)
    steps = list(made.steps())
    heaviest, longest = made.extremes(lengths)
    sums = [lengths[step.rows].sum() for step in steps]
    assert heaviest.step == np.argmax(sums)
    assert heaviest.rows.tolist() == steps[heaviest.step].rows.tolist()
    assert longest.step == np.argmax([lengths[step.rows].max() for step in steps])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Where orders of more than 50 pairs lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sampler, "MAPPED", 50)
    return tmp_path / f"crossrank-{os.geteuid()}" / "orders"


def orders(files) -> set[str]:
    return {path.name for path in files.iterdir()} - {"lock"}


def test_an_order_in_a_file(files, said):
    """It is drawn once, is that of memory, and goes with the epoch; a damaged one is drawn again."""
    list(make(num_samples=49).steps())
    assert not files.exists()
    expected = [epoch_order(100, 42, epoch) for epoch in range(3)]
    steps, seen = make().steps(), []
    for step in steps:
        seen.append(step.rows)
        assert len(orders(files)) == 1, step
    assert not orders(files)
    assert np.concatenate(seen).tolist() == np.concatenate(expected)[: len(np.concatenate(seen))].tolist()
    one, other = make(), make()
    order = one.order(2)
    assert isinstance(order, np.memmap)
    [path] = files.glob("*.npy")
    written = path.stat().st_ino
    assert other.order(2).tolist() == expected[2].tolist()
    assert path.stat().st_ino == written
    path.write_bytes(path.read_bytes()[:200])
    assert make().order(2).tolist() == expected[2].tolist()
    assert not said


def test_files_of_killed_runs_do_not_add_up(files):
    for seed in range(9):
        make(seed=seed).order(0)
        (files / f".x.npy.host.{seed}").touch()
        assert len([*files.glob("*.npy")]) == min(seed + 1, KEPT)
        assert len(orders(files)) <= KEPT + 1
    assert make(seed=8).at(12).rows.tolist() == epoch_order(100, 8, 0)[96:].tolist()


def test_no_room_for_an_order(files, said):
    """A disk that is full stands for any that cannot be written."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    files.mkdir(parents=True)
    files.parent.chmod(0o700)
    identity = make()._name(0)
    path = orders_module._path(identity)
    (files / f".{path.name}.{socket.gethostname()}.{os.getpid()}").symlink_to("/dev/full")
    assert make().order(0).tolist() == epoch_order(100, 42, 0).tolist()
    assert "each rank holds it in memory: " in said[0]
    assert "No space left on device" in said[0]
