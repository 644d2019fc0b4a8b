"""What a report is about: the model, its cells, and what several parts of the report need of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrosc.criticism.predictive import PredictiveChecks, predictive_checks
from pyrosc.data import encode as enc
from pyrosc.data.schema import MAIN

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.data import Dataset
    from pyrosc.models.base import Model


class LeftOut(Exception):
    """The model or the data lack what a part is about; the message says what."""


@dataclass
class Subject:
    """What a report is about.

    Attributes
    ----------
    model, adata
        The model, and other cells than the registered ones, if any.
    batch_key, labels_key
        Columns of obs, or None.
    max_cells
        Most cells that a part looks at.
    seed
        Of everything random.
    """

    model: Model
    adata: AnnData | None
    batch_key: str | None
    labels_key: str | None
    max_cells: int
    seed: int

    @cached_property
    def dataset(self) -> Dataset:
        return self.model.dataset(self.adata)

    @cached_property
    def held_out(self) -> np.ndarray | None:
        """Rows that were held out; None where there are none, or for other cells."""
        rows = self.model.split.get(MAIN, (None, np.arange(0)))[1]
        return rows if self.adata is None and len(rows) else None

    @cached_property
    def shown(self) -> np.ndarray:
        """Rows of the cells in pictures."""
        return self._some(np.arange(self.dataset.n_obs))

    @cached_property
    def checked(self) -> np.ndarray:
        """Rows of the cells that fit is judged by: those held out, where there are some."""
        rows = np.arange(self.dataset.n_obs) if self.held_out is None else self.held_out
        return self._some(rows)

    @cached_property
    def which(self) -> str:
        """In words, the cells of `checked`."""
        n = len(self.checked)
        if self.adata is not None:
            return f"{n:,} cells that were passed to the report"
        return f"{n:,} held-out cells" if self.held_out is not None else f"{n:,} cells that trained the model"

    @cached_property
    def checks(self) -> PredictiveChecks:
        return predictive_checks(
            self.model, self.adata, self.checked, max_cells=self.max_cells, seed=self.seed
        )

    @cached_property
    def latent(self) -> np.ndarray:
        """Latent space of the cells shown."""
        found = self.model.get_latent_representation(self.adata, self.shown, seed=self.seed)
        return np.asarray(found)

    def column(self, key: str) -> pd.Series:
        return enc.column(self.dataset.data, key)

    def _some(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) <= self.max_cells:
            return rows
        return np.sort(np.random.default_rng(self.seed).choice(rows, self.max_cells, replace=False))
