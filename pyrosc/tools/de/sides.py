"""Draws of the mean expression of both sides of a comparison, from cells or from donors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pyrosc.tools.de.groups import Comparison, Donors, Groups
from pyrosc.tools.de.means import PRIOR_COUNTS, Pass, Store, Sums, calibrated, sample_rows, unit_sums

if TYPE_CHECKING:
    from pyrosc.data import Dataset
    from pyrosc.models.base import Model

_TINY = 1e-30
#: Both sides of a comparison, (s, genes of the block) each.
Pair = Callable[[Comparison], tuple[np.ndarray, np.ndarray]]


def n_measured(dataset: Dataset, rows: np.ndarray, mask: str | None) -> np.ndarray:
    """Number of the cells in which each feature was measured: (g,), or (1,) where all were in all."""
    if mask is None:
        return np.array([len(rows)], np.float64)
    return dataset.codes(mask)[rows].sum(0, dtype=np.float64)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of (u, g) values over units, with weights (u, 1) or (u, g)."""
    return (values * weights).sum(0) / np.maximum(weights.sum(0), _TINY)


class CellMeans:
    """Group means with Bayesian-bootstrap weights over cells.

    Parameters
    ----------
    model, dataset, groups, plan
        What is asked.
    max_cells
        Cells of a group that are decoded, drawn at random; None for all.
    """

    def __init__(
        self, model: Model, dataset: Dataset, groups: Groups, plan: Pass, max_cells: int | None
    ) -> None:
        rng = np.random.default_rng([plan.seed, 0])
        used = groups.used()
        self._unit = {g: i for i, g in enumerate(used)}
        everything = [groups.rows(g) for g in used]
        rows = [sample_rows(r, max_cells, rng) for r in everything]
        self.n_sampled = sum(map(len, rows))
        n_genes = model.registry.n_vars(plan.field)
        self._store = Store(len(used), plan.n_draws, n_genes)
        width = 1 if plan.mask is None else n_genes
        self._weight = np.zeros((len(used), plan.n_draws, width), np.float32)
        self._scale = np.zeros((len(used), n_genes))
        self._sizes = np.stack([n_measured(dataset, r, plan.mask) for r in everything])
        for i, sums in enumerate(unit_sums(model, dataset, rows, plan, bootstrap=True)):
            prior = np.random.default_rng([plan.seed, 2, i])
            mean = calibrated(sums.expression, sums.weight, sums.observed, sums.expected, prior)
            self._store.put(i, mean)
            self._scale[i] = mean.mean(0)
            # groups of which not all cells were taken weigh as if they had been
            taken = np.maximum(n_measured(dataset, rows[i], plan.mask), _TINY)
            self._weight[i] = sums.weight * (self._sizes[i] / taken)

    def _mean(self, side: tuple[int, ...]) -> np.ndarray:
        units = [self._unit[g] for g in side]
        return weighted_mean(self._scale[units], self._sizes[units])

    def scales(self, c: Comparison) -> tuple[np.ndarray, np.ndarray]:
        """(g,) mean expression of both sides, over draws."""
        return self._mean(c.first), self._mean(c.second)

    def blocks(self) -> Iterator[tuple[slice, Pair]]:
        """Blocks of genes with a function that gives both sides of a comparison."""
        for genes, means in self._store.read():
            total: np.ndarray | None = None
            own = self._weight if self._weight.shape[2] == 1 else self._weight[:, :, genes]

            def weighted(units: list[int], means: np.ndarray = means, own: np.ndarray = own) -> np.ndarray:
                found = np.zeros(means.shape[1:], np.float32)
                for u in units:
                    found += own[u] * means[u]
                return found

            def side(groups: tuple[int, ...], own: np.ndarray = own) -> np.ndarray:
                nonlocal total
                units = [self._unit[g] for g in groups]
                weight = np.maximum(own[units].sum(0), _TINY)
                if len(units) == 1:
                    return means[units[0]]  # noqa: B023  # used before the next block
                if 2 * len(units) <= len(self._unit):
                    return weighted(units) / weight
                if total is None:
                    total = weighted(list(self._unit.values()))
                others = sorted(set(self._unit.values()) - set(units))
                return np.maximum(total - weighted(others), 0) / weight

            yield genes, lambda c: (side(c.first), side(c.second))

    def close(self) -> None:
        """Free what is stored."""
        self._store.close()


def donor_weights(n_donors: int, n_used: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Bootstrap weights of donors, Gamma(α) with α = (n − 2)/n, before normalisation.

    Normalised, n of them are Dirichlet(α, …, α): the weighted mean of values y has variance
    Σ(y − ȳ)²/n / (nα + 1), which is the unbiased Σ(y − ȳ)²/(n(n − 1)) where nα + 1 = n − 1. The Bayesian
    bootstrap (α = 1) is too small by (n − 1)/(n + 1).

    Parameters
    ----------
    n_donors
        n: of the side with fewer donors, three or more.
    n_used
        Donors that get weights.
    shape
        Shape of the draws.
    rng
        Generator.

    Returns
    -------
    numpy.ndarray
        (\\*shape, n_used) float64.
    """
    return rng.standard_gamma((n_donors - 2) / n_donors, (*shape, n_used))


class DonorMeans:
    """Group means with bootstrap weights over donors, shared by all cells of a donor.

    Weights of a donor are the same in both groups, so that in paired designs what donors have in common
    cancels. Cells of a donor are not weighted on their own: the variance between donors holds theirs.

    Parameters
    ----------
    model, dataset, groups, plan
        What is asked.
    donors
        Donor of each cell.
    max_cells
        Cells of a group that are decoded, dealt evenly to its donors; None for all.
    """

    def __init__(
        self,
        model: Model,
        dataset: Dataset,
        groups: Groups,
        donors: Donors,
        plan: Pass,
        max_cells: int | None,
    ) -> None:
        rng = np.random.default_rng([plan.seed, 0])
        everything, self._group, self._donor = [], [], []
        rows = []
        for g in groups.used():
            mine = groups.rows(g)
            present = np.unique(donors.codes[mine])
            most = None if max_cells is None else -(-max_cells // len(present))
            for d in present:
                here = mine[donors.codes[mine] == d]
                everything.append(here)
                rows.append(sample_rows(here, most, rng))
                self._group.append(g)
                self._donor.append(int(d))
        self.n_sampled = sum(map(len, rows))
        self._plan, self._k = plan, plan.n_samples
        self._number = {c.name: i for i, c in enumerate(groups.comparisons)}
        n_genes = model.registry.n_vars(plan.field)
        counted = plan.counts is not None
        self._store = Store(len(rows), (2 * self._k + 1) if counted else self._k, n_genes)
        self._scale = np.zeros((len(rows), n_genes))
        self._size = np.stack([n_measured(dataset, r, plan.mask) for r in everything])
        for i, sums in enumerate(unit_sums(model, dataset, rows, plan, bootstrap=False)):
            factor = self._size[i] / np.maximum(sums.weight[0], _TINY)
            self._store.put(i, factor.astype(np.float32) * _stacked(sums))
            mean = sums.expression.mean(0) / np.maximum(sums.weight[0], _TINY)
            if counted:
                assert sums.observed is not None
                assert sums.expected is not None
                mean = mean * (sums.observed[0] + PRIOR_COUNTS) / (sums.expected.mean(0) + PRIOR_COUNTS)
            self._scale[i] = mean

    def _mean(self, side: tuple[int, ...]) -> np.ndarray:
        units = self._units(side)
        return weighted_mean(self._scale[units], self._size[units])

    def scales(self, c: Comparison) -> tuple[np.ndarray, np.ndarray]:
        """(g,) mean expression of both sides, over draws."""
        return self._mean(c.first), self._mean(c.second)

    def n_donors(self, side: tuple[int, ...]) -> int:
        """Donors with cells in a side."""
        return len({self._donor[u] for u in self._units(side)})

    def freedom(self, c: Comparison) -> int:
        """Degrees of freedom of a variance: n − 1 of n donors in both sides, n + m − 2 of n and m in one."""
        one, two = ({self._donor[u] for u in self._units(side)} for side in (c.first, c.second))
        return len(one) + len(two) - 2 - max(len(one & two) - 1, 0)

    def _units(self, side: tuple[int, ...]) -> list[int]:
        return [u for u, g in enumerate(self._group) if g in side]

    def blocks(self) -> Iterator[tuple[slice, Pair]]:
        """Blocks of genes with a function that gives both sides of a comparison."""
        for genes, sums in self._store.read():

            def pair(
                c: Comparison, sums: np.ndarray = sums, genes: slice = genes
            ) -> tuple[np.ndarray, np.ndarray]:
                n = min(self.n_donors(c.first), self.n_donors(c.second))
                number = self._number[c.name]
                rng = np.random.default_rng([self._plan.seed, 3, number])
                shape = (self._k, self._plan.n_bootstrap)
                weights = donor_weights(n, max(self._donor) + 1, shape, rng)
                prior = np.random.default_rng([self._plan.seed, 4, number, genes.start])
                sizes = self._size if self._size.shape[1] == 1 else self._size[:, genes]
                return (
                    self._side(c.first, sums, sizes, weights, prior),
                    self._side(c.second, sums, sizes, weights, prior),
                )

            yield genes, pair

    def _side(
        self,
        side: tuple[int, ...],
        sums: np.ndarray,
        sizes: np.ndarray,
        weights: np.ndarray,
        prior: np.random.Generator,
    ) -> np.ndarray:
        k, units = self._k, self._units(side)
        w = weights[..., [self._donor[u] for u in units]]  # (k, b, units)
        weight = (w @ sizes[units]).reshape(-1, sizes.shape[1])
        own = sums[units].astype(np.float64)  # (units, rows, genes)

        def total(values: np.ndarray) -> np.ndarray:
            return (w @ values.swapaxes(0, 1)).reshape(len(weight), -1)

        expression = total(own[:, :k])
        if self._plan.counts is None:
            return calibrated(expression, weight, None, None, prior)
        observed = np.broadcast_to(own[:, 2 * k :], (len(units), k, own.shape[2]))
        return calibrated(expression, weight, total(observed), total(own[:, k : 2 * k]), prior)

    def close(self) -> None:
        """Free what is stored."""
        self._store.close()


def _stacked(sums: Sums) -> np.ndarray:
    parts = [p for p in (sums.expression, sums.expected, sums.observed) if p is not None]
    return np.concatenate(parts)
