"""Which cells, in which order, in which minibatches."""

import threading
import time

import numpy as np
import pytest
import torch

from pyrosc.data.loader import cut, cycle_batches, epoch_batches, prefetch, split


def test_a_split_is_a_function_of_its_seed():
    first = split(100, 0.9, 3)
    np.random.seed(1)  # noqa: NPY002 (a global generator must not matter)
    torch.manual_seed(1)
    second = split(100, 0.9, 3)
    other = split(100, 0.9, 4)
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(("n", "share", "n_train"), [(100, 0.9, 90), (10, 1, 10), (3, 0.1, 1), (7, 0.5, 4)])
def test_a_split_takes_every_cell_once(n, share, n_train):
    train, held_out = split(n, share, 0)
    assert len(train) == n_train
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(n))
    assert (np.diff(train) > 0).all()


@pytest.mark.parametrize("share", [0, -0.1, 1.5, 90])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
        split(10, share, 0)


@pytest.mark.parametrize("n", [1, 2, 8, 9, 10, 11, 12, 17])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_a_tail_of_one_or_two_joins_its_neighbour(n, size):
    parts = cut(np.arange(n), size)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(n))
    assert all(len(p) == size for p in parts[:-1])
    if n > size:
        assert min(3, size) <= len(parts[-1]) <= size + 2


def test_a_small_tail_stays_where_that_is_wanted():
    assert [len(p) for p in cut(np.arange(9), 4, smallest=1)] == [4, 4, 1]


def test_batches_of_no_cell_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        cut(np.arange(3), 0)


@pytest.mark.parametrize("n", [10, 96, 97, 98, 99])
def test_every_cell_once_per_epoch(n):
    index = np.arange(n) * 3
    batches = epoch_batches(index, 32, seed=0, epoch=5)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), index)


def test_epochs_differ_and_repeat():
    one, two = (np.concatenate(epoch_batches(np.arange(50), 16, 0, e)) for e in (1, 2))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, np.concatenate(epoch_batches(np.arange(50), 16, 0, 1)))


@pytest.mark.parametrize("n", [64, 65, 66, 67, 101])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_cells_and_take_equally_many_steps(n, world):
    ranks = [epoch_batches(np.arange(n), 8, 0, 0, rank, world) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1
    assert len({tuple(len(b) for b in r) for r in ranks}) == 1
    cells = np.concatenate([np.concatenate(r) for r in ranks])
    assert len(np.unique(cells)) == len(cells) == n - n % world


def test_the_shorter_source_starts_over():
    long, short = np.arange(40), np.arange(100, 110)
    steps = cycle_batches([long, short], 4, seed=0, epoch=0)
    assert len(steps) == 10
    np.testing.assert_array_equal(np.sort(np.concatenate([s[0] for s in steps])), long)
    assert {int(i) for s in steps for i in s[1]} == set(short.tolist())
    np.testing.assert_array_equal(steps[0][1], steps[2][1])


def _threads():
    return [t for t in threading.enumerate() if t is not threading.main_thread() and "work" in t.name]


def test_prefetch_keeps_the_order():
    def load(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(prefetch(load, range(20))) == [i * i for i in range(20)]
    assert not _threads()


def test_prefetch_raises_what_the_thread_raised():
    def load(i):
        if i == 3:
            raise OSError("the file is gone")
        return i

    seen = []
    with pytest.raises(OSError, match="the file is gone"):
        seen.extend(prefetch(load, range(10)))
    assert not _threads()


def test_prefetch_ends_its_thread_when_the_loop_is_left():
    loaded = []
    values = prefetch(lambda i: loaded.append(i), range(10**6))
    next(values)
    assert _threads()
    values.close()
    assert not _threads()
    assert len(loaded) < 10


def test_prefetch_loads_ahead():
    loaded = []
    values = prefetch(loaded.append, range(10), depth=2)
    next(values)
    deadline = time.monotonic() + 5
    while len(loaded) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    values.close()
    assert len(loaded) >= 3
