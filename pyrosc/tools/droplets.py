"""Real droplets and made-up ones with two cells, side by side, as any model of counts can read them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyrosc.data import MAIN, DataError, Dataset
from pyrosc.data.errors import listed
from pyrosc.data.matrix import Matrix
from pyrosc.tools.doublet_features import DropletFeatures

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model

_PAIRED = 0.9  # share of cells that must have a partner in their fold


@dataclass(frozen=True)
class Pairs:
    """Which cells make up each simulated doublet.

    Attributes
    ----------
    first, second
        (m,) rows of the two cells.
    fold
        (m,) part of the data that both are from.
    heir
        (m,) bool: whether the doublet inherits the second cell's categories where the two differ.
    capture
        (m,) share of the two cells' molecules that is kept.
    """

    first: np.ndarray
    second: np.ndarray
    fold: np.ndarray
    heir: np.ndarray
    capture: np.ndarray


def deal(strata: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Random folds of equal size, each with its share of each stratum, (n,) int64."""
    order = rng.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    folds = np.empty(len(strata), np.int64)
    folds[order] = np.arange(len(order)) % n_folds
    return folds


def deal_for_pairs(strata: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Folds as `deal` makes them, fewer where cells would be left without a partner of their stratum."""
    for n in range(n_folds, 1, -1):
        folds = deal(strata, n, rng)
        if n == 2 or (_sizes(folds, strata)[1] > 1).mean() >= _PAIRED:
            return folds
    raise ValueError(f"n_folds is at least 2, not {n_folds}")


def _sizes(folds: np.ndarray, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group of each cell by fold and stratum, and the size of its group."""
    groups = np.unique(np.stack([folds, strata]), axis=1, return_inverse=True)[1].reshape(-1)
    return groups, np.bincount(groups)[groups]


def draw_pairs(
    strata: np.ndarray,
    folds: np.ndarray,
    n_pairs: int,
    capture: Sequence[float],
    rng: np.random.Generator,
) -> Pairs:
    """Uniform pairs of different cells of one stratum and one fold.

    Parameters
    ----------
    strata, folds
        (n,) int codes. A stratum gets pairs by its share of the cells; cells without a partner get none.
    n_pairs
        Number of pairs.
    capture
        Ends of the range of the share of molecules kept.
    rng
        Generator.

    Raises
    ------
    DataError
        If no stratum has two cells in one fold.
    """
    groups, _ = _sizes(folds, strata)
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    starts = np.cumsum(sizes) - sizes
    weights = np.where(sizes > 1, sizes, 0)
    if not weights.any():
        raise DataError(
            "no two cells can be paired: every combination of batch and categorical covariates has a single "
            "cell, or nearly so; covariates='inherit' pairs cells that differ in covariates"
        )
    ends = np.round(np.cumsum(weights) / weights.sum() * n_pairs).astype(np.int64)
    group = np.repeat(np.arange(len(sizes)), np.diff(ends, prepend=0))
    here = rng.integers(0, sizes[group])
    there = (here + rng.integers(1, sizes[group])) % sizes[group]
    first, second = order[starts[group] + here], order[starts[group] + there]
    heir = rng.random(n_pairs) < 0.5
    return Pairs(first, second, folds[first], heir, rng.uniform(capture[0], capture[-1], n_pairs))


class _Sums(Matrix):
    """Rows of a matrix, followed by sums of two of its rows each, thinned; none is kept in memory."""

    def __init__(self, matrix: Matrix, rows: np.ndarray, pairs: Pairs, seed: int) -> None:
        self._matrix, self._seed = matrix, seed
        self._first = np.concatenate([rows, rows[pairs.first]])
        self._second = np.concatenate([np.full(len(rows), -1), rows[pairs.second]])
        self._capture = np.concatenate([np.ones(len(rows)), pairs.capture])
        self.on_disk, self.sparse = matrix.on_disk, True
        self.shape = (len(self._first), matrix.shape[1])

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows `index`, dense."""
        return self.sparse_rows(index).toarray()

    def sparse_rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Rows `index`; a droplet's counts are the same whenever and with whatever others it is asked for."""
        first, second = self._first[index], self._second[index]
        out = self._matrix.sparse_rows(first).astype(np.float32)
        two = np.flatnonzero(second >= 0)
        if len(two):
            shape = (len(index), len(two))
            place = sp.csr_matrix((np.ones(len(two), np.float32), (two, np.arange(len(two)))), shape)
            out = sp.csr_matrix(out + place @ self._matrix.sparse_rows(second[two]))
        out.sum_duplicates()  # sorted too: the same values in the same order, whatever the other rows
        for i in np.flatnonzero(self._capture[index] < 1):
            at = slice(out.indptr[i], out.indptr[i + 1])
            rng = np.random.Generator(np.random.PCG64([self._seed, int(index[i])]))
            kept = rng.binomial(out.data[at].astype(np.int64), self._capture[index[i]])
            if kept.any():  # a droplet without counts is none
                out.data[at] = kept
        out.eliminate_zeros()
        return out

    def chunks(self, size: int = 4096) -> Iterator[tuple[int, Any]]:
        """Consecutive blocks of rows."""
        for start in range(0, self.shape[0], size):
            yield start, self.sparse_rows(np.arange(start, min(start + size, self.shape[0])))

    def nonzeros(self) -> int | None:
        """Not counted."""
        return None


class Droplets(Dataset):
    """Cells of a data set, followed by simulated doublets of them.

    Counts (and size factors, totals, proteins) of a doublet are a share of the sums of its two cells'.
    Categories are those of the cells where they agree, else of one of them; continuous covariates are means
    weighted by the cells' total counts. A protein is measured in a doublet if it is in both cells. Labels are
    left out, for doublets and cells alike: a model that reads them would else tell the two apart by them.

    Parameters
    ----------
    cells
        Data set of the parent model, without an ``Index`` field.
    rows
        (n,) rows of it to take.
    pairs
        Doublets, by positions in `rows`.
    seed
        Of the thinning.
    """

    def __init__(self, cells: Dataset, rows: np.ndarray, pairs: Pairs, seed: int = 0) -> None:
        self.registry, self.owner, self.data = cells.registry, cells.owner, cells.data
        self.n_obs = len(rows) + len(pairs.first)
        simulated = [f"simulated_{i}" for i in range(len(pairs.first))]
        self.obs_names = pd.Index([*map(str, cells.obs_names[rows]), *simulated])
        self.matrices: dict[str, Matrix] = {n: _Sums(m, rows, pairs, seed) for n, m in cells.matrices.items()}
        self._summaries, self._fingerprints, self.present = {}, {}, cells.present
        first, second = rows[pairs.first], rows[pairs.second]
        totals = next(iter(cells.matrices.values())).row_sums()
        share = (totals[second] / (totals[first] + totals[second])).astype(np.float32)
        fields = cells.registry.fields
        made: dict[str, np.ndarray] = {}
        for name, state in fields.items():
            if state.kind != "counts":
                values = cells.codes(name)
                a, b = values[first], values[second]
                made[name] = _combined(state.kind, a, b, share, pairs) if state.given else a
        for name, state in fields.items():
            if state.kind == "mask" and state.given and state.of is not None:
                made[state.of] = np.where(made[name], made[state.of], 0).astype(np.float32)
        self._columns = {}
        for name, values in made.items():
            kept = cells.codes(name)[rows]
            if fields[name].kind == "labels":
                kept = np.full_like(kept, -1)
            self._columns[name] = np.concatenate([kept, values])

    def verify(self) -> None:
        """Nothing to check: the cells' own data set is."""


def _combined(kind: str, a: np.ndarray, b: np.ndarray, share: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Column of the doublets of two cells each; `share` is the second's share of their counts."""
    wide = (slice(None),) + (None,) * (a.ndim - 1)
    if kind == "labels":
        return np.full_like(a, -1)
    if kind == "protein":
        return np.round((a + b) * pairs.capture[wide]).astype(a.dtype)
    if kind in ("size_factor", "total"):
        return ((a + b) * pairs.capture[wide]).astype(a.dtype)
    if kind == "mask":
        return a & b
    if kind in ("categorical", "categoricals"):
        return np.where(pairs.heir[wide], b, a)
    return (a + share[wide] * (b - a)).astype(a.dtype)


def strata_of(cells: Dataset, rows: np.ndarray, covariates: Literal["share", "inherit"]) -> np.ndarray:
    """Groups within which cells pair, (n,): batches and, to ``"share"`` them, all categorical covariates."""
    columns = [np.zeros((len(rows), 1), np.int64)]
    for name, state in cells.registry.fields.items():
        covariate = state.given and state.kind in ("categorical", "categoricals")
        if covariate and (covariates == "share" or name == "batch"):
            columns.append(cells.codes(name)[rows].reshape(len(rows), -1))
    return np.unique(np.concatenate(columns, 1), axis=0, return_inverse=True)[1].reshape(-1)


@dataclass
class Material:
    """What a classifier of droplets is made of.

    Attributes
    ----------
    adatas
        Features and folds in ``obsm``, of the real droplets ("main") and the simulated ones ("simulated").
    features
        Computes the features of other droplets.
    cells
        Data set of the parent.
    rows
        Its rows that are the real droplets.
    batch
        Code of the batch that these were restricted to, or None.
    n_folds, cells_per_batch
        As made.
    """

    adatas: dict[str, AnnData]
    features: DropletFeatures
    cells: Dataset
    rows: np.ndarray
    batch: int | None
    n_folds: int
    cells_per_batch: float

    def features_of(self, cells: Dataset) -> AnnData:
        """Features of a data set of the parent model; NaN for cells of batches that were left out.

        The registered cells keep their folds; others are of none.
        """
        same = cells.obs_names.equals(self.cells.obs_names)
        if cells is self.cells or (same and cells.fingerprints() == self.cells.fingerprints()):
            main = self.adatas[MAIN]
            values = np.full((cells.n_obs, main.obsm["features"].shape[1]), np.nan, np.float32)
            folds = np.full((cells.n_obs, 1), -1, np.float32)
            values[self.rows], folds[self.rows] = main.obsm["features"], main.obsm["fold"]
        else:
            values = self.features.transform(cells)
            if self.batch is not None:
                values[cells.codes("batch") != self.batch] = np.nan
            folds = np.full((cells.n_obs, 1), -1, np.float32)
        return _as_adata(self.features.frame(values, cells.obs_names), folds)


def make_droplets(
    model: Model,
    *,
    doublet_ratio: float,
    restrict_to_batch: str | None,
    covariates: Literal["share", "inherit"],
    capture: Sequence[float],
    n_components: int,
    n_folds: int,
    seed: int,
) -> Material:
    """Simulate doublets of a model's cells, and describe both by features; see `pyrosc.Solo.from_model`."""
    if not doublet_ratio > 0:
        raise ValueError(f"doublet_ratio is the number of doublets per droplet, above 0; not {doublet_ratio}")
    if covariates not in ("share", "inherit"):
        raise ValueError(f"covariates is 'share' or 'inherit'; not {covariates!r}")
    if not 0 < capture[0] <= capture[-1] <= 1:
        raise ValueError(f"capture is a share in (0, 1], or two of them in order; not {capture}")
    if n_components < 1:
        raise ValueError(f"n_components is at least 1, not {n_components}")
    cells = model.dataset()
    rows, batch = _restricted(cells, restrict_to_batch)
    if len(rows) < 20:
        raise DataError(f"{len(rows)} cells are too few to tell doublets among; at least 20 are needed")
    rng = np.random.default_rng(seed)
    strata = strata_of(cells, rows, covariates)
    folds = deal_for_pairs(strata, n_folds, rng)
    pairs = draw_pairs(strata, folds, round(doublet_ratio * len(rows)), capture, rng)
    droplets = Droplets(cells, rows, pairs, seed)
    features = DropletFeatures(model, n_components, seed)
    every = np.concatenate([folds, pairs.fold])
    values = features.fit(droplets, len(rows), every)
    n, fold = len(rows), every[:, None].astype(np.float32)
    names = droplets.obs_names
    adatas = {
        MAIN: _as_adata(features.frame(values[:n], cells.obs_names[rows]), fold[:n]),
        "simulated": _as_adata(features.frame(values[n:], names[n:]), fold[n:]),
    }
    adatas["simulated"].obs["cell_1"] = names[pairs.first]
    adatas["simulated"].obs["cell_2"] = names[pairs.second]
    sizes = np.bincount(cells.codes("batch")[rows]) if "batch" in cells.registry.fields else np.array([n])
    cells_per_batch = float((sizes.astype(np.float64) ** 2).sum() / sizes.sum())
    return Material(adatas, features, cells, rows, batch, int(folds.max()) + 1, cells_per_batch)


def _restricted(cells: Dataset, name: str | None) -> tuple[np.ndarray, int | None]:
    """Rows of a batch and its code, or all rows and None."""
    if name is None:
        return np.arange(cells.n_obs), None
    registry = cells.registry
    if "batch" not in registry.fields or not registry.given("batch"):
        raise KeyError(f"restrict_to_batch={name!r}: {cells.owner} was made without batches (batch_key=)")
    names = registry.categories("batch")
    if name not in names:
        raise KeyError(f"there is no batch {name!r}; {cells.owner} has {listed(names, 20)}")
    code = names.index(name)
    return np.flatnonzero(cells.codes("batch") == code), code


def _as_adata(features: pd.DataFrame, folds: np.ndarray) -> AnnData:
    import anndata as ad

    obs = pd.DataFrame(index=features.index.astype(str))
    return ad.AnnData(obs=obs, obsm={"features": features.set_axis(obs.index, axis=0), "fold": folds})


def checksum(model: Model) -> int:
    """Of a model's weights."""
    total = 0
    for name, value in sorted(model.state_dict().items()):
        total = zlib.crc32(
            value.detach().cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), total)
        )
    return total


__all__ = ["Droplets", "Material", "Pairs", "checksum", "deal", "draw_pairs", "make_droplets", "strata_of"]
