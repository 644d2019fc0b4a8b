"""The minibatches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyrosc.data.inputs import load_batch
from pyrosc.data.loader import cycle_batches, prefetch

if TYPE_CHECKING:
    from pyrosc.models.base import Model


def minibatches(
    model: Model, rows: dict[str, np.ndarray], batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Tensor]]]:
    """Cells that train, in the order of this seed and epoch, on the model's device.

    Yields
    ------
    tuple
        Names of the cells by source, and tensors by argument name.
    """
    sources, device = list(rows), model.device
    order = cycle_batches(list(rows.values()), batch_size, seed, epoch)

    def load(part: list[np.ndarray]) -> Any:
        chosen = dict(zip(sources, part, strict=True))
        names = {s: model.datasets[s].obs_names[r] for s, r in chosen.items()}
        return names, load_batch(model.datasets, chosen, device)

    # a thread pays where loading waits (disk, copies); in memory it only competes for the cores
    waits = device.type != "cpu" or any(d.on_disk for d in model.datasets.values())
    yield from prefetch(load, order) if waits else map(load, order)  # type: ignore[misc]
