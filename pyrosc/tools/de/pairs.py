"""Random pairs of cells, as differential expression of deep models was first defined (Lopez 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pyrosc.data.errors import DataError
from pyrosc.data.inputs import apply_do, encode_do
from pyrosc.infer.draws import draws_of
from pyrosc.infer.modes import evaluating
from pyrosc.infer.posterior import SharedDraws
from pyrosc.tools.de.groups import Comparison, Groups
from pyrosc.tools.de.means import Pass, Store
from pyrosc.tools.de.sides import Pair

if TYPE_CHECKING:
    from pyrosc.data import Dataset
    from pyrosc.models.base import Model


class PairDraws:
    """Expression of random cells of both sides, a draw from the posterior of each: (pairs, g) per side.

    Parameters
    ----------
    model, dataset, groups, plan
        What is asked; ``plan.n_samples`` is the number of pairs.
    """

    def __init__(self, model: Model, dataset: Dataset, groups: Groups, plan: Pass) -> None:
        rng = np.random.default_rng([plan.seed, 0])
        n_genes = model.registry.n_vars(plan.field)
        measured = None if plan.mask is None else dataset.codes(plan.mask).any(1)
        self._number = {c.name: i for i, c in enumerate(groups.comparisons)}
        self._store = Store(2 * len(groups.comparisons), plan.n_samples, n_genes)
        self._scale = np.zeros((2 * len(groups.comparisons), n_genes))
        self.n_sampled = 2 * plan.n_samples * len(groups.comparisons)
        unit = 0
        for c in groups.comparisons:
            for side in (c.first, c.second):
                here = np.isin(groups.codes, side)
                cells = np.flatnonzero(here if measured is None else here & measured)
                if not len(cells):
                    raise DataError(f"{c.name}: in one of the groups '{plan.field}' was measured in no cell")
                rows = rng.choice(cells, plan.n_samples)
                values = _expression(model, dataset, rows, plan, int(rng.integers(2**31)))
                self._store.put(unit, values)
                self._scale[unit] = values.mean(0, dtype=np.float64)
                unit += 1

    def scales(self, c: Comparison) -> tuple[np.ndarray, np.ndarray]:
        """(g,) mean expression of both sides, over draws."""
        i = 2 * self._number[c.name]
        return self._scale[i], self._scale[i + 1]

    def blocks(self) -> Iterator[tuple[slice, Pair]]:
        """Blocks of genes with a function that gives both sides of a comparison."""
        for genes, values in self._store.read():

            def pair(c: Comparison, values: np.ndarray = values) -> tuple[np.ndarray, np.ndarray]:
                i = 2 * self._number[c.name]
                return values[i], values[i + 1]

            yield genes, pair

    def close(self) -> None:
        """Free what is stored."""
        self._store.close()


def _expression(model: Model, dataset: Dataset, rows: np.ndarray, plan: Pass, seed: int) -> np.ndarray:
    """One draw of each row's expression, (rows, g)."""
    worlds = [encode_do(model.registry, world, len(rows)) for world in plan.worlds]
    shared = SharedDraws()
    out: np.ndarray | None = None
    with evaluating(model, seed):
        for at, batch in model.batches(dataset, rows):
            here = [apply_do(batch, world, at) for world in worlds]
            value, *_ = draws_of(
                model,
                plan.expression,
                batch,
                len(at),
                25 if plan.resample else 1,  # of which one is taken
                shared,
                worlds=here,
                shares=plan.shares,
                resample=plan.resample,
            )
            found = value[0].cpu().numpy()
            if out is None:
                out = np.zeros((len(rows), found.shape[1]), np.float32)
            out[at] = found
    assert out is not None
    return out
