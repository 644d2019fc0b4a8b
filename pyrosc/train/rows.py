"""Before training: which cells train, which are held out, and what cannot be annealed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyrosc.data.dataset import Dataset
from pyrosc.data.errors import listed
from pyrosc.data.inputs import as_rows
from pyrosc.data.loader import split
from pyrosc.infer.structure import enumerated_sites

if TYPE_CHECKING:
    from pyrosc.models.base import Model
    from pyrosc.train.plan import Plan


def choose_rows(
    model: Model,
    plan: Plan,
    train: Sequence[int] | np.ndarray | None,
    held_out: Sequence[int] | np.ndarray | None,
    seed: int,
    asked: bool,
) -> None:
    if model.knows_cells:
        if asked or train is not None or held_out is not None:
            raise ValueError(
                f"{type(model).__name__} has parameters of its own for each cell, so that all cells train "
                "and none is held out; leave out train_size, train_indices and validation_indices"
            )
        model.split = {s: (np.arange(d.n_obs), np.arange(0)) for s, d in model.datasets.items()}
    elif train is not None or held_out is not None:
        if len(model.datasets) > 1:
            raise ValueError("train_indices and validation_indices are for models of one data source")
        source, dataset = next(iter(model.datasets.items()))
        model.split = {source: _given_split(dataset, train, held_out)}
    elif model.split and asked:
        raise ValueError(
            f"{type(model).__name__} keeps the split of its first fit; leave out train_size, or give "
            "train_indices"
        )
    elif not model.split:
        model.split = {s: split(d.n_obs, plan.train_size, seed) for s, d in model.datasets.items()}
    model.n_train = {s: len(rows) for s, (rows, _) in model.split.items()}
    for source, n in model.n_train.items():
        if n == 0:
            raise ValueError(f"no cell of '{source}' trains")


def check_annealing(model: Model, plan: Plan) -> None:
    both = set(model.annealed or ()) & enumerated_sites(model)
    if both and plan.warmup > 0:
        raise ValueError(
            f"{type(model).__name__} sums out {listed(sorted(both))} in the model, and its KL cannot be "
            "annealed: all that depends on such a site needs one scale. Leave it out of `annealed`, or "
            "fit(warmup=0)"
        )


def _given_split(
    dataset: Dataset, train: Sequence[int] | np.ndarray | None, held_out: Sequence[int] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    every = np.arange(dataset.n_obs)
    if train is None:
        second = as_rows(held_out, dataset)
        first = np.setdiff1d(every, second)
    else:
        first = as_rows(train, dataset)
        second = np.setdiff1d(every, first) if held_out is None else as_rows(held_out, dataset)
    both = np.intersect1d(first, second)
    if len(both):
        raise ValueError(
            f"{len(both):,} cells both train and are held out (first: {dataset.obs_names[both[0]]!r})"
        )
    return np.unique(first), np.unique(second)
