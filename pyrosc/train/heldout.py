"""The ELBO of held-out cells, and of some that train, between epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch

from pyrosc.data.inputs import load_batch
from pyrosc.infer.modes import evaluating
from pyrosc.train.diagnose import culprit, diagnose

if TYPE_CHECKING:
    from pyrosc.models.base import Model

_TRAIN_SAMPLE = 1024  # training cells on which elbo_train is taken at each epoch


def evaluate(model: Model, rows: dict[str, np.ndarray], seed: int = 0, batch_size: int = 256) -> float:
    """ELBO per cell (nats) of cells at weight 1, by one draw of noise that is the same at each call."""
    total, cells = 0.0, 0
    with evaluating(model, seed), torch.no_grad(), pyro.validation_enabled(False):
        for chosen in parts(rows, batch_size):
            size = sum(len(r) for r in chosen.values())
            total += -model(load_batch(model.datasets, chosen, model.device)).item() * size
            cells += size
    return total / cells


def finite_elbo(model: Model, rows: dict[str, np.ndarray], seed: int, when: str) -> float:
    """What `evaluate` gives, or the error that says why it is not finite.

    Parameters
    ----------
    when
        Which cells and where in training, for the message.

    Raises
    ------
    TrainingError
        If the ELBO is NaN or infinite.
    """
    value = evaluate(model, rows, seed)
    if np.isfinite(value):
        return value
    blame = None
    for chosen in parts(rows, 1024):
        batch = load_batch(model.datasets, chosen, model.device)
        names = {s: model.datasets[s].obs_names[r] for s, r in chosen.items()}
        if blame := culprit(model, batch, names):
            break
    raise diagnose(model, batch, names, when, blame)


def few_of(train: dict[str, np.ndarray], held_out: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Rows that train, of which ``elbo_train`` is taken: at most as many as are held out."""
    chosen = {}
    for source, rows in train.items():
        order = np.random.Generator(np.random.PCG64(seed)).permutation(rows)
        most = len(held_out[source]) or _TRAIN_SAMPLE
        chosen[source] = np.sort(order[: min(_TRAIN_SAMPLE, max(most, 1))])
    return chosen


def parts(rows: dict[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows of each source cut into equally many parts of at most `batch_size`."""
    n = max(-(-len(r) // batch_size) for r in rows.values())
    for part in zip(*(np.array_split(r, n) for r in rows.values()), strict=True):
        yield dict(zip(rows, part, strict=True))
