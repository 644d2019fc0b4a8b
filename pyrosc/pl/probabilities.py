"""Predicted classes beside what is known of the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.data.encode import category_names, category_order, encode
from pyrosc.pl import _style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERED = 400  # fields up to which each shows its number


def probabilities(
    soft: pd.DataFrame,
    groups: pd.Series | Sequence[Any] | np.ndarray,
    ax: Axes | None = None,
    *,
    cmap: str = "Blues",
    title: str | None = None,
) -> Axes:
    """Mean probability of each predicted class in groups of cells: clusters, batches, or known types.

    With known types as groups it is a confusion matrix that keeps the doubt of each call.

    Parameters
    ----------
    soft
        Probabilities (n, k), as ``model.predict(soft=True)`` gives them.
    groups
        Group of each cell, (n,): a column of ``obs``, say. A Series is matched by the names of the cells;
        cells without a group are left out.
    ax
        Where to draw; default a new figure.
    cmap
        Colour map, from probability 0 to 1.
    title
        Default: the number of cells.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into; rows are groups with their numbers of cells, columns are classes.

    Raises
    ------
    ValueError
        If groups and probabilities are of different cells.
    """
    if isinstance(groups, pd.Series):
        if absent := len(soft.index.difference(groups.index)):
            raise ValueError(f"groups lack {absent:,} of the {len(soft):,} cells")
        values = groups.reindex(soft.index)
    else:
        values = pd.Series(groups)
        if len(values) != len(soft):
            raise ValueError(f"there are {len(values):,} groups for {len(soft):,} cells")
    names = category_order(values)
    codes = encode(category_names(values), names)
    sizes = np.array([(codes == i).sum() for i in range(len(names))])
    means = np.stack([soft.to_numpy()[codes == i].mean(0) for i in range(len(names))])
    if ax is None:
        width, height = 2.2 + 0.55 * soft.shape[1], 1.4 + 0.42 * len(names)
        ax = style.new_axes(size=(max(width, 3.4), max(height, 2.4)))[0, 0]
    image = ax.imshow(means, vmin=0, vmax=1, cmap=cmap, aspect="auto")
    if means.size <= _NUMBERED:
        for row, col in np.ndindex(*means.shape):
            value = means[row, col]
            ink = "white" if value > 0.6 else style.GREY
            ax.text(col, row, f"{value:.2f}", ha="center", va="center", fontsize=style.SMALL - 1, color=ink)
    classes = [str(c) for c in soft.columns]
    turned: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, classes)) > 4 else {}
    )
    ax.set_xticks(range(len(classes)), classes, fontsize=style.SMALL, **turned)
    labels = [f"{n} ({size:,})" for n, size in zip(names, sizes, strict=True)]
    ax.set_yticks(range(len(names)), labels, fontsize=style.SMALL)
    ax.set_xlabel("predicted", fontsize=style.SMALL)
    if isinstance(groups, pd.Series) and groups.name is not None:
        ax.set_ylabel(str(groups.name), fontsize=style.SMALL)
    ax.set_title(title if title is not None else style.count(int(sizes.sum()), "cell"), fontsize=11)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("mean probability", fontsize=style.SMALL)
    bar.ax.tick_params(labelsize=style.SMALL)
    return ax
