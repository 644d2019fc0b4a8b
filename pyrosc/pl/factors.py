"""What the factors of a linear model are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.pl import _style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyrosc.models import LinearSCVI

_COLUMNS = 5


def loadings(
    model: LinearSCVI,
    factors: Sequence[str | int] | str | int | None = None,
    n_genes: int = 12,
    axes: Any = None,
    *,
    credible_interval: float = 0.9,
) -> np.ndarray:
    """Genes with the largest loadings of each factor, positive or negative.

    Where the loadings are Bayesian, bars are credible intervals, and genes are ranked by how far from zero
    their interval's nearer end is, so that genes of which little is known do not come first.

    Parameters
    ----------
    model
        A trained `LinearSCVI`.
    factors
        Names (``"Z_0"``) or numbers of factors; default all.
    n_genes
        Genes per factor.
    axes
        As many axes as factors; default a new figure.
    credible_interval
        Probability of the intervals.

    Returns
    -------
    numpy.ndarray
        The axes, one per factor.
    """
    if not hasattr(model, "get_loadings"):
        raise TypeError(f"{type(model).__name__} has no loadings; its decoder is not linear")
    if n_genes < 1:
        raise ValueError(f"n_genes is at least 1; not {n_genes}")
    table = model.get_loadings()
    chosen = _factors(factors, list(table.columns))
    low = high = table
    if model.bayesian:
        tidy = model.get_loadings(credible_interval)
        low, high = (
            tidy.pivot(index="gene", columns="factor", values=end).loc[table.index, table.columns]
            for end in ("lower", "upper")
        )
    if axes is None:
        rows = -(-len(chosen) // _COLUMNS)
        size = (2.5, 0.8 + 0.19 * min(n_genes, len(table)))
        axes = style.panels(len(chosen), -(-len(chosen) // rows), size=size)
    found = style.some_axes(axes, len(chosen), "loadings")
    for ax, factor in zip(found, chosen, strict=True):
        _panel(ax, table[factor], low[factor], high[factor], n_genes)
        ax.set_title(factor, fontsize=11)
    return np.array(found, dtype=object)


def _factors(wanted: Sequence[str | int] | str | int | None, names: list[str]) -> list[str]:
    if wanted is None:
        return names
    several = [wanted] if isinstance(wanted, str | int) else list(wanted)
    chosen = [names[f] if not isinstance(f, str) and -len(names) <= f < len(names) else f for f in several]
    if strange := [f for f in chosen if f not in names]:
        raise KeyError(f"the model has no factors {strange}; it has {names}")
    if not chosen:
        raise ValueError("factors is empty; name some, or leave it out for all")
    return [str(f) for f in chosen]


def _panel(ax: Axes, values: pd.Series, low: pd.Series, high: pd.Series, n_genes: int) -> None:
    # the end of the interval nearer to zero; 0 where the interval holds it
    sure = np.where(values > 0, low.clip(lower=0), -high.clip(upper=0))
    order = np.lexsort((values.abs().to_numpy(), sure))[::-1][:n_genes]
    shown = values.iloc[order].sort_values()
    y = np.arange(len(shown))
    ax.axvline(0, color="0.75", lw=1, zorder=0)
    colours = np.where(shown > 0, style.BLUE, style.ORANGE)
    ends = (low.loc[shown.index], high.loc[shown.index])
    if (ends[1] > ends[0]).any():
        ax.hlines(y, *ends, color=colours, lw=1.6, alpha=0.6)
    else:
        ax.hlines(y, 0, shown, color=colours, lw=1.6, alpha=0.35)
    ax.scatter(shown, y, s=16, c=colours, linewidths=0, zorder=3)
    ax.set_yticks(y, shown.index, fontsize=8)
    ax.set_ylim(-0.7, len(shown) - 0.3)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.08)
    ax.set_xlabel("loading (log fold)", fontsize=style.SMALL)
    style.despine(ax)
