"""Differential expression: how large and how sure, and where leading genes are expressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pyrosc.data.errors import one_of
from pyrosc.pl import _style as style
from pyrosc.tools.de.table import scale_of, sure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_LEAST_ERROR = 1e-12  # of a probability: what is nearer to 1 is drawn there


def volcano(
    de: pd.DataFrame,
    comparison: str | Sequence[str] | None = None,
    axes: Any = None,
    *,
    n_labels: int = 12,
    genes: Sequence[str] = (),
) -> np.ndarray:
    """Log-fold change of each gene against how sure it is; called genes in colour.

    The height is −log10(1 − proba_de), with the probability that the change is at least δ: unlike that of a
    p-value, it does not grow with small changes of which one can be sure.

    Parameters
    ----------
    de
        What `pyrosc.differential_expression` returned.
    comparison
        Names in the column ``comparison``; default all.
    axes
        As many axes as comparisons; default a new figure.
    n_labels
        Genes with names: those surest to be changed much. Names that would cover others are left out.
    genes
        Genes that are named in any case, where they are in the table.

    Returns
    -------
    numpy.ndarray
        The axes, one per comparison.
    """
    names = _comparisons(de, comparison)
    if axes is None:
        axes = style.panels(len(names), min(_COLUMNS, len(names)), size=(4.2, 3.6))
    found = style.some_axes(axes, len(names), "volcano")
    notes = de.attrs.get("differential_expression", {}).get("comparisons", {})
    chosen = []
    for ax, name in zip(found, names, strict=True):
        table = de[de["comparison"] == name]
        delta = _note(notes, name, table).get("delta")
        chosen.append(_panel(ax, table, delta, n_labels, set(genes)))
        ax.set_title(name, fontsize=11)
    for figure in filter(None, {ax.get_figure(root=True) for ax in found}):
        figure.draw_without_rendering()  # lays out the panels, so that it is known where names fit
    for ax, points in zip(found, chosen, strict=True):
        _labels(ax, points)
    return np.array(found, dtype=object)


def _panel(
    ax: Axes, table: pd.DataFrame, delta: float | None, n_labels: int, wanted: set[str]
) -> list[tuple[float, float, str]]:
    """Draw the genes of a comparison; returns those to name."""
    scale = scale_of(table)
    table = table[table["proba_de"].notna()]  # without features that were measured in one group only
    x = table[f"{scale.name}_mean"].to_numpy()
    y = -np.log10(np.maximum(1 - table["proba_de"].to_numpy(), _LEAST_ERROR))
    called = table["is_de_fdr"].to_numpy(bool) if "is_de_fdr" in table else np.zeros(len(table), bool)
    sides = ((~called, style.PALE), (called & (x > 0), style.ORANGE), (called & (x < 0), style.BLUE))
    for chosen, colour in sides:
        ax.scatter(x[chosen], y[chosen], s=9, c=colour, linewidths=0, rasterized=len(table) > 5000)
    if delta:
        for side in (-delta, delta):
            ax.axvline(side, color=style.GREY, lw=0.8, ls=":", zorder=0)
    reach = 1.15 * max(float(np.abs(x).max(initial=0)), 2 * (delta or 0.1))
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-0.03 * max(y.max(initial=0), 1), 1.12 * max(y.max(initial=0), 1))
    ax.set_xlabel(scale.words, fontsize=style.SMALL)
    ax.set_ylabel("\N{MINUS SIGN}log10(1 \N{MINUS SIGN} probability)", fontsize=style.SMALL)
    if called.any():
        up, down = int((called & (x > 0)).sum()), int((called & (x < 0)).sum())
        style.note(ax, f"{down:,} down, {up:,} up", x=0.03, y=0.03)
    style.despine(ax)
    order = np.argsort(-np.abs(sure(table)), kind="stable")
    first = [i for i in range(len(table)) if table.index[i] in wanted]
    rest = [i for i in order[:n_labels] if called[i] and i not in first]
    return [(float(x[i]), float(y[i]), str(table.index[i])) for i in [*first, *rest]]


def _labels(ax: Axes, points: list[tuple[float, float, str]]) -> None:
    """Names beside points; one that finds no room is left out."""
    taken: list[tuple[float, float, float, float]] = []
    scale = 72 / ax.figure.dpi
    size = style.SMALL - 2
    for x, y, text in points:
        across, up = (float(v) * scale for v in ax.transData.transform((x, y)))
        width, height = 0.74 * size * len(text), 1.2 * size
        to_left = x < 0
        for dx, dy in ((4, 0), (4, -height), (4, height), (-4, height), (-4, -height)):
            toward_left = to_left == (dx > 0)
            left = across - abs(dx) - width if toward_left else across + abs(dx)
            box = (left, up + dy - height / 2, left + width, up + dy + height / 2)
            if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                continue
            taken.append(box)
            ax.annotate(
                text,
                (x, y),
                xytext=(-abs(dx) if toward_left else abs(dx), dy),
                textcoords="offset points",
                ha="right" if toward_left else "left",
                va="center",
                fontsize=size,
                color=style.GREY,
                annotation_clip=False,
            )
            break


def heatmap(
    de: pd.DataFrame,
    n_genes: int = 5,
    ax: Axes | None = None,
    *,
    genes: Sequence[str] | None = None,
    values: Literal["z", "log2"] = "z",
    cmap: str = "RdBu_r",
) -> Axes:
    """Mean expression by group, according to the model, of the genes that lead each comparison.

    Parameters
    ----------
    de
        What `pyrosc.differential_expression` returned: each group against the rest, or groups in pairs, also
        in several cell types (``within=``).
    n_genes
        Genes per comparison: those that are raised, the surest to be changed much first; of a single pair of
        groups, as many lowered ones.
    ax
        Where to draw; default a new figure.
    genes
        Genes to draw in place of these.
    values
        ``"z"``: log expression of each gene, centred and scaled over the groups; ``"log2"``: only centred, in
        log2-fold units.
    cmap
        Colour map, diverging.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into: rows are genes, columns groups.
    """
    one_of("values", values, ("z", "log2"))
    if n_genes < 1:
        raise ValueError(f"n_genes is at least 1; not {n_genes}")
    scale_of(de)  # says so if the table is another
    means = _group_means(de)
    chosen = _leading(de, n_genes) if genes is None else list(genes)
    if absent := [g for g in chosen if g not in means.index]:
        raise KeyError(f"the table has no genes {absent}")
    if not chosen:
        raise ValueError("no gene of the table is raised; name some with genes=")
    shown = means.loc[chosen]
    shown = shown.sub(shown.mean(axis=1), axis=0)
    if values == "z":
        shown = shown.div(shown.std(axis=1).replace(0, 1), axis=0)
    if ax is None:
        size = (2.4 + 0.42 * shown.shape[1], 1.3 + 0.19 * len(shown))
        ax = style.new_axes(size=size)[0, 0]
    reach = max(float(np.quantile(np.abs(shown.to_numpy()), 0.99)), 1e-6)
    image = ax.imshow(shown.to_numpy(), cmap=cmap, vmin=-reach, vmax=reach, aspect="auto")
    ax.set_yticks(range(len(shown)), [str(g) for g in shown.index], fontsize=style.SMALL - 1)
    ax.set_xticks(
        range(shown.shape[1]),
        [str(c) for c in shown.columns],
        fontsize=style.SMALL,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    ax.tick_params(length=0)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, shrink=0.6)
    label = "z-score of log expression" if values == "z" else "log2-fold of the mean"
    bar.set_label(label, fontsize=style.SMALL)
    bar.ax.tick_params(labelsize=style.SMALL)
    return ax


def _comparisons(de: pd.DataFrame, wanted: str | Sequence[str] | None) -> list[str]:
    known = list(de["comparison"].unique())
    chosen = known if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    if absent := [c for c in chosen if c not in known]:
        raise KeyError(f"the table has no comparisons {absent}; it has {known}")
    if not chosen:
        raise ValueError("comparison is empty; name some, or leave it out for all")
    return chosen


def _note(notes: Mapping[str, Any], name: str, table: pd.DataFrame) -> Mapping[str, Any]:
    """What is noted of a comparison, in the one modality that the table is of."""
    if "field" not in table:
        return notes.get(name, {})
    if table["field"].nunique() > 1:
        raise ValueError(
            f"the table has features of several modalities ({', '.join(table['field'].unique())}); show "
            f"one, for example de[de['field'] == '{table['field'].iloc[0]}']"
        )
    return notes.get(f"{name} ({table['field'].iloc[0]})", {})


def _group_means(de: pd.DataFrame) -> pd.DataFrame:
    """log2 of mean expression, genes × groups; the rest is no group of its own among several."""
    notes = de.attrs.get("differential_expression", {}).get("comparisons", {})
    columns: dict[str, pd.Series] = {}
    several = de["comparison"].nunique() > 1
    for name, table in de.groupby("comparison", sort=False):
        epsilon = _note(notes, str(name), table).get("pseudocount", 1e-12)
        place = f" in {table['within'].iloc[0]}" if "within" in table else ""
        for i in (1, 2):
            label = str(table[f"group{i}"].iloc[0])
            if i == 2 and several and label == "rest" and not place:
                continue
            columns[label + place] = np.log2(table[f"scale{i}"] + epsilon)
    return pd.DataFrame(columns)


def _leading(de: pd.DataFrame, n_genes: int) -> list[str]:
    single = de["comparison"].nunique() == 1
    found: dict[str, None] = {}
    for _, table in de.groupby("comparison", sort=False):
        score = pd.Series(sure(table), index=table.index)
        if "is_de_fdr" in table:
            score = score[table["is_de_fdr"]]
        ordered = score.sort_values(ascending=False, kind="stable")
        found |= dict.fromkeys(ordered[ordered > 0].index[:n_genes])
        if single:
            found |= dict.fromkeys(ordered[ordered < 0].index[-n_genes:])
    return list(found)
