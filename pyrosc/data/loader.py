"""Which cells train, in which order, and how minibatches are cut."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def split(n: int, train_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeded split of n cells into training and held-out rows; the same on every device.

    Parameters
    ----------
    n
        Number of cells.
    train_size
        Share that trains, in (0, 1].
    seed
        Seed of the permutation.

    Returns
    -------
    tuple
        Two sorted int64 arrays.
    """
    if not 0 < train_size <= 1:
        raise ValueError(f"train_size is a share in (0, 1], not {train_size}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    n_train = n if train_size == 1 else min(n, max(1, round(n * train_size)))
    return np.sort(order[:n_train]), np.sort(order[n_train:])


def cut(index: np.ndarray, size: int, smallest: int = 3) -> list[np.ndarray]:
    """Consecutive minibatches of `size`; a tail of fewer than `smallest` cells joins its neighbour.

    Examples
    --------
    >>> [len(b) for b in cut(np.arange(9), 4)]
    [4, 5]
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, not {size}")
    parts = [index[i : i + size] for i in range(0, len(index), size)]
    if len(parts) > 1 and len(parts[-1]) < min(smallest, size):
        tail = parts.pop()
        parts[-1] = np.concatenate([parts[-1], tail])
    return parts


def epoch_batches(
    index: np.ndarray,
    size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
) -> list[np.ndarray]:
    """Shuffled minibatches of one epoch, a function of (seed, epoch) alone, so that a run can resume.

    With several processes each takes every `world`-th cell of the common permutation; the permutation is
    cut so that all take equally many steps.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(index)
    if world > 1:
        order = order[: len(order) - len(order) % world][rank::world]
    return cut(order, size)


def cycle_batches(indices: Sequence[np.ndarray], size: int, seed: int, epoch: int) -> list[list[np.ndarray]]:
    """Minibatches of several sources side by side; the shorter sources start over until the longest ends."""
    per_source = [epoch_batches(index, size, seed + i, epoch) for i, index in enumerate(indices)]
    steps = max(len(b) for b in per_source)
    return [[b[t % len(b)] for b in per_source] for t in range(steps)]


def prefetch(load: Callable[[T], object], items: Iterable[T], depth: int = 2) -> Iterator[object]:
    """Load items in a thread ahead of the consumer; worth it where loading waits for a disk or a copy.

    An exception in the thread is raised here; leaving the loop early ends the thread.
    """
    ready: queue.Queue[tuple[bool, object]] = queue.Queue(depth)
    stop = threading.Event()
    done = object()

    def put(entry: tuple[bool, object]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put((True, load(item)))
            put((True, done))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            ok, value = ready.get()
            if not ok:
                raise value  # type: ignore[misc]
            if value is done:
                return
            yield value
    finally:
        stop.set()
        thread.join()
