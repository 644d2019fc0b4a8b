"""Cell types in space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrosc.data.encode import table
from pyrosc.data.errors import listed
from pyrosc.pl import _style as style

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrosc.models.base import Model


def proportions(
    data: AnnData | Model,
    cell_types: Sequence[str] | None = None,
    *,
    key: str = "stereoscope_proportions",
    basis: str = "spatial",
    clip: float = 0.01,
    vmax: float | None = None,
    columns: int = 4,
    size: float | None = None,
    cmap: str = "viridis",
    image_coordinates: bool = True,
    axes: Any = None,
) -> np.ndarray:
    """Proportions of cell types over the spots of a tissue, a panel per type.

    Each panel has a colour scale of its own, from 0 to the 99th percentile of its type, since a rare type
    would not show on a common one; `vmax` gives a common one.

    Parameters
    ----------
    data
        AnnData annotated by a deconvolution model (``model.annotate(adata)``), or such a model, whose
        ``get_proportions()`` of the registered spots is drawn.
    cell_types
        Types to draw, in this order; default all, the most common first.
    key
        Key of ``obsm`` with the proportions, where `data` is an AnnData.
    basis
        Key of ``obsm`` with the coordinates.
    clip
        Share of the highest values of a type that get the last colour.
    vmax
        Proportion that gets the last colour, in place of `clip`.
    columns
        Panels in a row of a new figure.
    size
        Diameter of a spot in units of the coordinates; default nine tenths of the usual distance to the
        nearest spot.
    cmap
        Colour map.
    image_coordinates
        Whether y grows downwards, as in images.
    axes
        Where to draw, one per type; default a new figure.

    Returns
    -------
    numpy.ndarray
        The axes, one per type.

    Raises
    ------
    KeyError
        If there are no proportions, coordinates, or such a type.
    """
    adata, frame = _proportions(data, key)
    if basis not in adata.obsm:
        raise KeyError(
            f"there is no obsm['{basis}'] with coordinates; there are {listed(adata.obsm) or 'none'}"
        )
    xy = np.asarray(adata.obsm[basis], dtype=float)[:, :2]
    if isinstance(cell_types, str):
        raise TypeError(f"cell_types is a list of names; write ['{cell_types}']")
    names = list(frame.mean().sort_values(ascending=False).index) if cell_types is None else list(cell_types)
    if strange := [c for c in names if c not in frame]:
        raise KeyError(f"there is no cell type {listed(strange)}; there are {listed(frame.columns, 50)}")
    if not names:
        raise ValueError("cell_types is empty; name at least one")
    found = _axes(axes, len(names), columns, xy)
    diameter = size if size is not None else 0.9 * _spacing(xy)
    for name, ax in zip(names, found, strict=True):
        _panel(ax, xy, frame[name].to_numpy(float), diameter, clip, vmax, cmap, image_coordinates)
        ax.set_title(f"{name} (mean {frame[name].mean():.1%})".replace("%", " %"), fontsize=10)
    return np.array(found, dtype=object)


def _proportions(data: Any, key: str) -> tuple[AnnData, pd.DataFrame]:
    if hasattr(data, "get_proportions"):
        frame = data.get_proportions()
        return data.dataset().data, frame
    if not hasattr(data, "obsm"):
        raise TypeError(
            f"proportions are drawn of an AnnData or a deconvolution model, not {type(data).__name__}"
        )
    if key not in data.obsm:
        raise KeyError(
            f"there is no obsm['{key}']; there are {listed(data.obsm) or 'none'}. model.annotate(adata) "
            "writes proportions"
        )
    values, names = table(data, key)
    return data, pd.DataFrame(values, index=data.obs_names, columns=list(names))


def _axes(axes: Any, n: int, columns: int, xy: np.ndarray) -> list[Any]:
    if axes is not None:
        return style.some_axes(axes, n, "proportions")
    width, height = np.ptp(xy, axis=0)
    aspect = float(np.clip(height / width, 0.4, 2.5)) if width > 0 else 1.0
    return style.panels(n, columns, size=(3.0, 2.4 * aspect + 0.4))


def _spacing(xy: np.ndarray) -> float:
    """Median distance of a spot to the nearest other one; 1 where there is none."""
    from scipy.spatial import cKDTree

    if len(xy) < 2:
        return 1.0
    nearest = cKDTree(xy).query(xy, k=2)[0][:, 1]
    positive = nearest[nearest > 0]
    return float(np.median(positive)) if len(positive) else 1.0


def _panel(
    ax: Any,
    xy: np.ndarray,
    values: np.ndarray,
    diameter: float,
    clip: float,
    vmax: float | None,
    cmap: str,
    image_coordinates: bool,
) -> None:
    from matplotlib.collections import EllipseCollection

    high = style.bounds(values, 0.0, 1 - clip)[1] if vmax is None else vmax
    widths = np.full(len(xy), diameter)
    spots = EllipseCollection(
        widths,
        widths,
        np.zeros(len(xy)),
        units="xy",
        offsets=xy,
        offset_transform=ax.transData,
        cmap=cmap,
        linewidths=0,
    )
    spots.set_array(values)
    spots.set_clim(0.0, high)
    ax.add_collection(spots)
    (left, bottom), (right, top) = xy.min(0) - diameter, xy.max(0) + diameter
    ax.set_xlim(left, right)
    ax.set_ylim(*((top, bottom) if image_coordinates else (bottom, top)))
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    style.despine(ax, "top", "right", "left", "bottom")
    extend = "max" if np.nanmax(values, initial=0.0) > high else "neither"
    bar = ax.figure.colorbar(spots, ax=ax, shrink=0.7, aspect=18, pad=0.02, extend=extend)
    bar.ax.tick_params(labelsize=style.SMALL - 1, length=2)
    bar.outline.set_visible(False)
