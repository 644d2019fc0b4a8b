"""Do counts drawn from the model look like the counts?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from pyrosc.pl import _style as style

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from pyrosc.models.base import Model
    from pyrosc.models.results import Indices


class _Moments(NamedTuple):
    """Per gene, each (g,)."""

    mean: np.ndarray
    variance: np.ndarray
    zeros: np.ndarray


def predictive_check(
    model: Model,
    adata: AnnData | None = None,
    n_samples: int = 5,
    axes: Any = None,
    *,
    indices: Indices = None,
    max_cells: int = 5000,
    batch_size: int = 512,
    seed: int = 0,
) -> np.ndarray:
    """Mean, variance and share of zeros of each gene, in the data and in data replicated by the model.

    Left: variance against mean, both logarithmic; where the model fits, the two clouds lie on each other.
    Right: the share of zeros; where it fits, genes lie on the diagonal.

    Parameters
    ----------
    model
        A trained model of counts.
    adata
        Cells; default those the model was made with.
    n_samples
        Replicates of the data; the replicated moments are averages over them.
    axes
        Two axes; default a new figure.
    indices
        Which cells (positions or a mask), such as those held out; default all.
    max_cells
        Of more cells than this, as many are drawn at random.
    batch_size
        Cells decoded at a time.
    seed
        Of the choice of cells and the replicates.

    Returns
    -------
    numpy.ndarray
        The two axes.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples is the number of replicates, at least 1; not {n_samples}")
    from pyrosc.data.inputs import as_rows

    dataset = model.dataset(adata)
    rows = as_rows(indices, dataset)
    if len(rows) < 2:
        raise ValueError(f"a variance needs at least two cells; there are {len(rows)}")
    if len(rows) > max_cells:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
    if axes is None:
        axes = style.new_axes(1, 2, size=(4.6, 4.2))
    left, right = style.some_axes(axes, 2, "predictive_check")
    matrix = next(iter(dataset.matrices.values()))
    observed = _moments([sp.csr_matrix(matrix.sparse_rows(r)) for r in _parts(rows)])
    draws = model.posterior_predictive_sample(
        adata, rows, n_samples=n_samples, batch_size=batch_size, seed=seed
    )
    each = [_moments([draw]) for draw in (draws if isinstance(draws, list) else [draws])]
    replicated = _Moments(*(np.mean(values, axis=0) for values in zip(*each, strict=True)))
    _mean_variance(left, observed, replicated)
    _zeros(right, observed, replicated)
    return np.array([left, right], dtype=object)


def _parts(rows: np.ndarray, size: int = 2048) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _moments(parts: list[sp.csr_matrix]) -> _Moments:
    n = sum(p.shape[0] for p in parts)
    first, second, nonzero = (np.zeros(parts[0].shape[1]) for _ in range(3))
    for part in parts:
        x = part.astype(np.float64)
        first += np.asarray(x.sum(0)).ravel()
        second += np.asarray(x.multiply(x).sum(0)).ravel()
        x.eliminate_zeros()
        nonzero += x.getnnz(axis=0)
    mean = first / n
    variance = np.maximum(second / n - mean**2, 0) * n / (n - 1)
    return _Moments(mean, variance, 1 - nonzero / n)


def _mean_variance(ax: Axes, observed: _Moments, replicated: _Moments) -> None:
    points, colours = [], []
    for moments, colour, name in (
        (observed, style.GREY, "observed"),
        (replicated, style.ORANGE, "replicated"),
    ):
        shown = (moments.mean > 0) & (moments.variance > 0)
        points.append(np.stack([moments.mean[shown], moments.variance[shown]], axis=1))
        colours += [colour] * int(shown.sum())
        ax.scatter([], [], s=24, color=colour, linewidths=0, label=name)
    xy = np.concatenate(points)
    order = np.random.default_rng(0).permutation(len(xy))  # neither cloud hides the other
    draw: dict[str, Any] = {"s": _area(len(order) // 2), "alpha": 0.6, "linewidths": 0, "rasterized": True}
    ax.scatter(xy[order, 0], xy[order, 1], c=[colours[i] for i in order], **draw)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends = np.array(ax.get_xlim())
    ax.plot(ends, ends, color="0.6", lw=1, ls="--", zorder=0, label="Poisson: variance = mean")
    ax.set_xlim(*ends)
    ax.set_xlabel("mean of the gene (counts per cell)")
    ax.set_ylabel("variance of the gene")
    ax.set_title("Mean and variance", fontsize=11)
    ax.legend(frameon=False, loc="upper left", fontsize=style.SMALL, handletextpad=0.4)
    both = (observed.variance > 0) & (replicated.variance > 0)
    ratio = np.log2(replicated.variance[both] / observed.variance[both])
    if len(ratio):
        text = f"variance, replicated / observed:\nmedian {2 ** np.median(ratio):.2f}"
        text += f", 90 % of genes {2 ** np.quantile(ratio, 0.05):.2f}–{2 ** np.quantile(ratio, 0.95):.2f}"
        style.note(ax, text, x=0.97, y=0.03)
    style.despine(ax)


def _zeros(ax: Axes, observed: _Moments, replicated: _Moments) -> None:
    x, y = observed.zeros, replicated.zeros
    ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", zorder=0)
    ax.scatter(x, y, s=_area(len(x)), color=style.BLUE, alpha=0.55, linewidths=0, rasterized=True)
    low = max(0.0, min(x.min(), y.min()) - 0.03)
    ax.set_xlim(low, 1.01)
    ax.set_ylim(low, 1.01)
    ax.set_xlabel("observed share of cells with no count")
    ax.set_ylabel("replicated share")
    ax.set_title("Zeros", fontsize=11)
    style.note(ax, f"{style.count(x, 'gene')}\n{_agreement(x, y)}")
    style.despine(ax)


def _agreement(x: np.ndarray, y: np.ndarray) -> str:
    text = f"mean deviation {np.abs(y - x).mean():.3f}"
    if x.std() > 0 and y.std() > 0:
        text = f"correlation {np.corrcoef(x, y)[0, 1]:.3f}\n{text}"
    return text


def _area(n: int) -> float:
    return float(np.clip(12_000 / max(n, 1), 3.0, 14.0))
