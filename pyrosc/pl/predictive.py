"""Do counts drawn from the model look like the counts?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyrosc.pl import _style as style
from pyrosc.pl.criticism import area, mean_variance

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from pyrosc.criticism import PredictiveChecks
    from pyrosc.models.base import Model
    from pyrosc.models.results import Indices


def predictive_check(
    model: Model | PredictiveChecks,
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
        A trained model of counts; or what `pyrosc.criticism.predictive_checks` found, to which the other
        arguments but `axes` do not matter.
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
    from pyrosc.criticism.predictive import PredictiveChecks, predictive_checks

    if isinstance(model, PredictiveChecks):
        checks = model
    else:
        checks = predictive_checks(
            model,
            adata,
            np.arange(model.dataset(adata).n_obs) if indices is None else indices,
            n_samples=n_samples,
            max_cells=max_cells,
            calibration=False,
            batch_size=batch_size,
            seed=seed,
        )
    if axes is None:
        axes = style.new_axes(1, 2, size=(4.6, 4.2))
    left, right = style.some_axes(axes, 2, "predictive_check")
    mean_variance(checks, left)
    zeros = checks.statistic("zeros").dropna()
    _zeros(right, zeros["observed"].to_numpy(), zeros["replicated"].to_numpy())
    return np.array([left, right], dtype=object)


def _zeros(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", zorder=0)
    ax.scatter(x, y, s=area(len(x)), color=style.BLUE, alpha=0.55, linewidths=0, rasterized=True)
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
