"""The ELBO of cells that do not train, between epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch

from pyrosc.data.inputs import load_batch
from pyrosc.infer.modes import evaluating

if TYPE_CHECKING:
    from pyrosc.models.base import Model


def evaluate(model: Model, rows: dict[str, np.ndarray], seed: int = 0, batch_size: int = 256) -> float:
    """ELBO per cell (nats) of cells at weight 1, by one draw of noise that is the same at each call."""
    total, cells = 0.0, 0
    with evaluating(model, seed), torch.no_grad(), pyro.validation_enabled(False):
        for chosen in parts(rows, batch_size):
            size = sum(len(r) for r in chosen.values())
            total += -model(load_batch(model.datasets, chosen, model.device)).item() * size
            cells += size
    return total / cells


def parts(rows: dict[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows of each source cut into equally many parts of at most `batch_size`."""
    n = max(-(-len(r) // batch_size) for r in rows.values())
    for part in zip(*(np.array_split(r, n) for r in rows.values()), strict=True):
        yield dict(zip(rows, part, strict=True))
