"""Cells in two dimensions, coloured by what is known or inferred about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pyrosc.data.encode import category_names, category_order, encode
from pyrosc.data.errors import listed
from pyrosc.pl import _style as style

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

    from pyrosc.models.base import Model

_MANY = len(style.PALETTE)  # categories above which colours repeat and numbers tell them apart


def latent(
    data: AnnData | np.ndarray,
    color: str | Sequence[Any] | np.ndarray | pd.Series | None = None,
    basis: str = "X_umap",
    ax: Axes | None = None,
    *,
    scale: Literal["linear", "log1p"] = "linear",
    clip: float = 0.01,
    vmin: float | None = None,
    vmax: float | None = None,
    palette: Mapping[str, str] | Sequence[str] | None = None,
    cmap: str = "viridis",
    size: float | None = None,
    title: str | None = None,
    label: str | None = None,
    legend: bool = True,
    seed: int = 0,
) -> Axes:
    """Scatter plot of an embedding.

    Points are drawn in random order, so that no group hides another by coming last.

    Parameters
    ----------
    data
        AnnData with the embedding in ``obsm[basis]``, or coordinates (n, 2); further columns are ignored.
    color
        Column of ``obs``, or a value per cell. Text, categories and truth values get colours and a legend;
        numbers a colour bar. Cells without a value are pale grey. None for plain points.
    basis
        Key of ``obsm``; it also names the axes.
    ax
        Where to draw; default a new figure.
    scale
        Of the colours of numbers: as they are, or by log1p (the colour bar shows the numbers).
    clip
        Share of numbers at each end that get the end's colour, so that a few extremes do not wash out the
        rest.
    vmin, vmax
        Numbers that get the first and the last colour, in place of those that `clip` gives.
    palette
        Colours by category, or in the order of the categories. Default: twenty colours that colour-blind
        readers can tell apart; where there are more categories, each also gets a number.
    cmap
        Colour map of numbers.
    size
        Area of a point in square points; default by the number of cells.
    title
        Default: the name of the column.
    label
        Of the colour bar.
    legend
        Whether to draw the legend or colour bar.
    seed
        Of the order of the points.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into.

    Raises
    ------
    KeyError
        If there is no such embedding or column.
    """
    xy, axis_name = _coordinates(data, basis)
    values = _values(data, color, len(xy))
    if title is None:
        title = color if isinstance(color, str) else str(getattr(color, "name", None) or "")
    if ax is None:
        beside = style.legend_width(categories(values)) if legend and values is not None else 0.0
        ax = style.new_axes(size=(4.4 + beside, 4.2))[0, 0]
    order = np.random.default_rng(seed).permutation(len(xy))
    area = size if size is not None else float(np.clip(15_000 / max(len(xy), 1), 1.0, 16.0))
    draw: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": True}
    if values is None:
        ax.scatter(xy[order, 0], xy[order, 1], color=style.BLUE, **draw)
    elif _is_numeric(values):
        numbers = values.to_numpy(float, na_value=np.nan)
        points, extend = _numbers(ax, xy, numbers, order, draw, scale, clip, (vmin, vmax), cmap)
        if legend:
            _color_bar(ax, points, scale, extend, label)
    else:
        _categories(ax, xy, values, order, draw, palette, legend)
    ax.set_title(title, fontsize=11)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel(f"{axis_name} 1", fontsize=style.SMALL, loc="left")
    ax.set_ylabel(f"{axis_name} 2", fontsize=style.SMALL, loc="bottom")
    style.despine(ax)
    return ax


def expression(
    model: Model,
    genes: Sequence[str],
    adata: AnnData | None = None,
    *,
    basis: str = "X_umap",
    library_size: float = 1e4,
    clip: float = 0.01,
    columns: int = 3,
    cmap: str = "viridis",
    batch_size: int = 512,
    seed: int = 0,
    axes: Any = None,
) -> np.ndarray:
    """Normalised expression of genes on an embedding, a panel per gene.

    Expression is the model's, without the noise of counting, per `library_size` counts. Colours follow log1p,
    up to the 99th percentile of the gene.

    Parameters
    ----------
    model
        A trained model with normalised expression.
    genes
        Names of genes.
    adata
        Cells with the embedding; default those the model was made with.
    basis
        Key of ``obsm``.
    library_size
        Counts per cell that expression is scaled to.
    clip
        Share of the highest values that get the last colour.
    columns
        Panels in a row of a new figure.
    cmap
        Colour map.
    batch_size
        Cells decoded at a time.
    seed
        Of the order of the points.
    axes
        Where to draw, one per gene; default a new figure.

    Returns
    -------
    numpy.ndarray
        The axes, one per gene.
    """
    if isinstance(genes, str):
        raise TypeError(f"genes is a list of names; write ['{genes}']")
    genes = list(genes)
    if not genes:
        raise ValueError("genes is empty; name at least one")
    if adata is None:
        adata = model.dataset().data
    assert adata is not None
    _coordinates(adata, basis)  # before the work, not after it
    if axes is None:
        found = style.panels(len(genes), columns, size=(3.6, 3.1))
    else:
        found = style.some_axes(axes, len(genes), "expression")
    values = model.get_normalized_expression(
        adata, gene_list=genes, library_size=library_size, batch_size=batch_size, as_numpy=True
    )
    for i, (gene, ax) in enumerate(zip(genes, found, strict=True)):
        per = f"per {library_size:,.0f} counts" if library_size != 1 else "share of counts"
        latent(
            adata,
            np.asarray(values)[:, i],
            basis,
            ax,
            scale="log1p" if library_size > 1 else "linear",
            clip=clip,
            vmin=0.0,
            cmap=cmap,
            title=gene,
            label=per,
            seed=seed,
        )
    return np.array(found, dtype=object)


def _coordinates(data: AnnData | np.ndarray, basis: str) -> tuple[np.ndarray, str]:
    """Points (n, 2) and the name of the axes."""
    if hasattr(data, "obsm"):
        if basis not in data.obsm:
            hint = "" if basis != "X_umap" else "; sc.tl.umap(adata) makes one"
            raise KeyError(f"there is no obsm['{basis}']; there are {listed(data.obsm) or 'none'}{hint}")
        found = np.asarray(data.obsm[basis])
        name = basis.removeprefix("X_").split("_")[0]
        name = {"umap": "UMAP", "tsne": "t-SNE", "pca": "PC"}.get(name, name)
    else:
        found, name = np.asarray(data), "dimension"
    if found.ndim != 2 or found.shape[1] < 2:
        raise ValueError(
            f"an embedding has a row per cell and at least two columns, not the shape {found.shape}"
        )
    return found[:, :2].astype(float), name


def _values(data: Any, color: Any, n: int) -> pd.Series | None:
    if color is None:
        return None
    if isinstance(color, str):
        if not hasattr(data, "obs"):
            raise TypeError(f"color={color!r} names a column; with coordinates pass a value per cell")
        if color not in data.obs:
            raise KeyError(
                f"obs has no column '{color}'; it has {listed(data.obs.columns, 12) or 'no columns'}"
            )
        return data.obs[color].reset_index(drop=True)
    values = color.reset_index(drop=True) if isinstance(color, pd.Series) else pd.Series(color)
    if len(values) != n:
        raise ValueError(f"color has {len(values):,} values for {n:,} cells")
    return values


def _is_numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def categories(values: pd.Series) -> tuple[str, ...]:
    """The entries that a legend of these values would have; none for numbers."""
    return () if _is_numeric(values) else category_order(values)


def _numbers(
    ax: Axes,
    xy: np.ndarray,
    values: np.ndarray,
    order: np.ndarray,
    draw: dict[str, Any],
    scale: str,
    clip: float,
    limits: tuple[float | None, float | None],
    cmap: str,
) -> tuple[PathCollection, str]:
    """Draw the points; they and the ends at which the colour bar goes on."""
    if scale not in ("linear", "log1p"):
        raise ValueError(f"scale is 'linear' or 'log1p', not {scale!r}")
    given: list[float | None] = list(limits)
    if scale == "log1p":
        values, given = np.log1p(values), [None if v is None else float(np.log1p(v)) for v in limits]
    found = style.bounds(values, clip, 1 - clip)
    low, high = (f if g is None else g for f, g in zip(found, given, strict=True))
    known = np.isfinite(values)
    missing, present = order[~known[order]], order[known[order]]
    if len(missing):
        ax.scatter(xy[missing, 0], xy[missing, 1], color=style.PALE, **draw)
    shown = values[present]
    points = ax.scatter(xy[present, 0], xy[present, 1], c=shown, cmap=cmap, vmin=low, vmax=high, **draw)
    beyond = bool(np.any(shown < low)), bool(np.any(shown > high))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    return points, extend[beyond]


def _color_bar(ax: Axes, points: PathCollection, scale: str, extend: str, label: str | None) -> None:
    bar = ax.figure.colorbar(points, ax=ax, shrink=0.65, aspect=16, pad=0.02, extend=extend)
    if scale == "log1p":
        ticks = style.ticks_log1p(*points.get_clim())
        bar.set_ticks([float(np.log1p(t)) for t in ticks], labels=[f"{t:,g}" for t in ticks])
        bar.minorticks_off()
    bar.ax.tick_params(labelsize=style.SMALL - 1, length=2)
    bar.outline.set_visible(False)
    if label:
        bar.set_label(label, fontsize=style.SMALL)


def _categories(
    ax: Axes,
    xy: np.ndarray,
    values: pd.Series,
    order: np.ndarray,
    draw: dict[str, Any],
    palette: Mapping[str, str] | Sequence[str] | None,
    legend: bool,
) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    names = category_order(values)
    codes = encode(category_names(values), names)
    if isinstance(palette, Mapping):
        if absent := [n for n in names if n not in palette]:
            raise KeyError(f"palette has no colour for {listed(absent)}")
        chosen = [palette[n] for n in names]
    elif palette is not None:
        chosen = [palette[i % len(palette)] for i in range(len(names))]
    else:
        chosen = style.colors(len(names))
    rgba = np.array([to_rgba(c) for c in [*chosen, style.PALE]])  # code -1: no value
    ax.scatter(xy[order, 0], xy[order, 1], c=rgba[codes[order]], **draw)
    if not legend:
        return
    numbered = palette is None and len(names) > _MANY
    entries = [f"{i + 1}  {n}" if numbered else n for i, n in enumerate(names)]
    if (codes < 0).any():
        entries.append("no value")
    shown = rgba[[*range(len(names)), -1][: len(entries)]]
    handles = [
        Line2D([], [], ls="", marker="o", ms=6, mew=0, color=c, label=e)
        for c, e in zip(shown, entries, strict=True)
    ]
    ax.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=style.SMALL,
        ncols=style.legend_columns(entries),
        handletextpad=0.1,
        borderaxespad=0.2,
        labelspacing=0.35,
        columnspacing=0.8,
    )
    if numbered:
        _numbers_on_groups(ax, xy, codes, len(names))


def _numbers_on_groups(ax: Axes, xy: np.ndarray, codes: np.ndarray, n: int) -> None:
    """Write the number of each category where its cells are thickest."""
    from matplotlib.patheffects import withStroke

    for i in range(n):
        own = xy[codes == i]
        middle = np.median(own, axis=0)
        at = own[np.argmin(((own - middle) ** 2).sum(1))]  # on a cell, not in the gap of a split group
        halo = [withStroke(linewidth=2, foreground="white")]
        ax.text(
            at[0], at[1], str(i + 1), fontsize=8, weight="bold", ha="center", va="center", path_effects=halo
        )
