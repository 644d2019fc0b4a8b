"""The pictures of a trained model, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrosc.data.encode import category_names, category_order
from pyrosc.pl._style import legend_width
from pyrosc.pl.embedding import expression, latent
from pyrosc.pl.predictive import predictive_check
from pyrosc.pl.training import training_curve

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

    from pyrosc.models.base import Model

_DPI = 150
_MOST_ENTRIES = 66  # of a legend


def draw(
    model: Model, adata: AnnData, folder: Path, *, groups: Sequence[str], markers: Sequence[str], basis: str
) -> list[str]:
    """Draw training, embedding, markers and predictive check into a folder, without pyplot.

    Parameters
    ----------
    model
        A trained model with library sizes and normalised expression.
    adata
        The cells it was made with, and their embedding.
    folder
        Where the files go.
    groups
        Columns of obs to colour the embedding by; a panel with the library size comes last.
    markers
        Genes to show.
    basis
        Key of the embedding in obsm.

    Returns
    -------
    list of str
        Names of the files.
    """
    figures = {
        "training_curve.png": _training(model),
        "umap.png": _embedding(model, adata, groups, basis),
        "markers.png": _markers(model, adata, markers, basis),
        "predictive_check.png": _check(model),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI)
    return list(figures)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    return figure


def _training(model: Model) -> Figure:
    figure = _figure(6.0, 4.0)
    training_curve(model, figure.subplots())
    return figure


def _embedding(model: Model, adata: AnnData, groups: Sequence[str], basis: str) -> Figure:
    panels = {key: _categorical(adata.obs[key]) for key in groups}
    beside = [legend_width(list(values.cat.categories)) for values in panels.values()]
    figure = _figure(sum(3.9 + width for width in beside) + 4.7, 4.2)
    axes = np.ravel(figure.subplots(1, len(panels) + 1))
    for ax, (key, values) in zip(axes[:-1], panels.items(), strict=True):
        latent(adata, values, basis, ax, title=key, legend=len(values.cat.categories) <= _MOST_ENTRIES)
    library = model.get_latent_library_size()
    latent(adata, library, basis, axes[-1], scale="log1p", title="library size", label="counts per cell")
    return figure


def _categorical(values: pd.Series) -> pd.Series:
    """Groups, also where their names are numbers."""
    return pd.Series(pd.Categorical(category_names(values), categories=list(category_order(values))))


def _markers(model: Model, adata: AnnData, genes: Sequence[str], basis: str) -> Figure:
    n_columns = min(3, len(genes))
    n_rows = -(-len(genes) // n_columns)
    figure = _figure(3.7 * n_columns, 3.2 * n_rows)
    axes = np.ravel(figure.subplots(n_rows, n_columns))
    for left_over in axes[len(genes) :]:
        left_over.remove()
    expression(model, genes, adata, basis=basis, axes=axes[: len(genes)])
    return figure


def _check(model: Model) -> Figure:
    figure = _figure(9.4, 4.3)
    predictive_check(model, axes=figure.subplots(1, 2))
    return figure
