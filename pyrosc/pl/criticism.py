"""What model criticism found, in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrosc.pl import _style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyrosc.criticism import Calibration, GuideDiagnostics, PredictiveChecks

_LABELS = {
    ("genes", "mean"): "mean of the gene (counts per cell)",
    ("genes", "variance"): "variance of the gene",
    ("genes", "cv"): "coefficient of variation of the gene",
    ("genes", "zeros"): "share of cells with no count",
    ("cells", "library"): "library size of the cell (counts)",
    ("cells", "zeros"): "share of genes with no count",
    ("cells", "cv"): "coefficient of variation over genes",
}


def mean_variance(checks: PredictiveChecks, ax: Axes | None = None) -> Axes:
    """Variance against mean of each gene, observed and replicated, both logarithmic.

    Where the model fits, the two clouds lie on each other.

    Parameters
    ----------
    checks
        Of `pyrosc.criticism.predictive_checks`.
    ax
        Where to draw; default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into.
    """
    ax = style.new_axes(size=(4.6, 4.2))[0, 0] if ax is None else ax
    mean, variance = checks.statistic("mean"), checks.statistic("variance")
    points, colours = [], []
    for column, colour in (("observed", style.GREY), ("replicated", style.ORANGE)):
        xy = np.stack([mean[column], variance[column]], axis=1)
        points.append(xy[(xy > 0).all(1)])
        colours += [colour] * len(points[-1])
        ax.scatter([], [], s=24, color=colour, linewidths=0, label=column)
    xy = np.concatenate(points)
    order = np.random.default_rng(0).permutation(len(xy))  # neither cloud hides the other
    draw: dict[str, Any] = {"s": area(len(order) // 2), "alpha": 0.6, "linewidths": 0, "rasterized": True}
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
    both = (variance["observed"] > 0) & (variance["replicated"] > 0)
    ratio = np.log2((variance["replicated"] / variance["observed"])[both].to_numpy())
    if len(ratio):
        text = f"variance, replicated / observed:\nmedian {2 ** np.median(ratio):.2f}"
        text += f", 90 % of genes {2 ** np.quantile(ratio, 0.05):.2f}–{2 ** np.quantile(ratio, 0.95):.2f}"
        style.note(ax, text, x=0.97, y=0.03)
    style.despine(ax)
    return ax


def statistic(checks: PredictiveChecks, name: str = "cv", of: str = "genes", ax: Axes | None = None) -> Axes:
    """A statistic of each gene or cell: observed, and in data replicated by the model.

    Where the model fits, points lie on the diagonal.

    Parameters
    ----------
    checks
        Of `pyrosc.criticism.predictive_checks`.
    name
        Of ``"genes"``: ``"mean"``, ``"variance"``, ``"cv"`` or ``"zeros"``; of ``"cells"``: ``"library"``,
        ``"zeros"`` or ``"cv"``. All but the shares of zeros are on logarithmic axes.
    of
        ``"genes"`` or ``"cells"``.
    ax
        Where to draw; default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into.
    """
    table = checks.statistic(name, of)
    x, y = table["observed"].to_numpy(), table["replicated"].to_numpy()
    log = name != "zeros"
    shown = np.isfinite(x) & np.isfinite(y) & ((x > 0) & (y > 0) | (not log))
    ax = style.new_axes(size=(4.4, 4.0))[0, 0] if ax is None else ax
    n = int(shown.sum())
    ax.scatter(x[shown], y[shown], s=area(n), color=style.BLUE, alpha=0.55, lw=0, rasterized=True)
    diagonal(ax, x[shown], y[shown], log)
    if log:
        style.log_axis(ax.xaxis)
        style.log_axis(ax.yaxis)
    ax.set_xlabel(f"observed {_LABELS[of, name]}")
    ax.set_ylabel("replicated")
    scores = checks.scores(name, of)
    deviation = f"mean deviation {scores['error']:.3f}"
    if log:
        fold = np.exp(scores["error"])
        deviation = f"typical deviation {fold - 1:.0%}" if fold < 2 else f"typical deviation {fold:.1f}-fold"
    unit = style.count(n, of[:-1])
    style.note(ax, f"{unit}\nrank correlation {scores['spearman']:.3f}\n{deviation}")
    style.despine(ax)
    return ax


def pit(checks: PredictiveChecks, ax: Axes | None = None, *, genes: str = "all") -> Axes:
    """Histogram of the place of observed counts among replicated ones: flat where the model is right.

    A hump in the middle: predictions are too wide; both ends high: too narrow; a slope: shifted.

    Parameters
    ----------
    checks
        Of `pyrosc.criticism.predictive_checks`.
    ax
        Where to draw; default a new figure.
    genes
        Group of genes, as in ``checks.calibration["genes"]``.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into.
    """
    counts = checks.histogram(genes)
    ax = style.new_axes(size=(4.4, 3.2))[0, 0] if ax is None else ax
    edges = np.linspace(0, 1, len(counts) + 1)
    ax.stairs(counts / max(counts.mean(), 1e-300), edges, fill=True, color=style.BLUE, alpha=0.75)
    ax.axhline(1, color=style.GREY, lw=1, ls="--")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, max(1.5, ax.get_ylim()[1]))
    ax.set_xlabel("place of the observed count among replicated ones")
    ax.set_ylabel("density (1: as it should be)")
    style.despine(ax)
    return ax


def intervals(found: PredictiveChecks | Calibration, ax: Axes | None = None) -> Axes:
    """Share of values inside intervals against the level that the intervals promise.

    Above the diagonal intervals are too wide, below it too narrow.

    Parameters
    ----------
    found
        Of `pyrosc.criticism.predictive_checks` (a line per group of genes), or of
        `pyrosc.criticism.simulation_based_calibration` (a line per quantity and their mean).
    ax
        Where to draw; default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into.
    """
    ax = style.new_axes(size=(4.4, 4.0))[0, 0] if ax is None else ax
    ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", zorder=0)
    if hasattr(found, "ranks"):
        for i, name in enumerate(found.ranks):
            level, inside = found.curve(name)
            ax.plot(level, inside, color=style.PALE, lw=1, label="each quantity" if i == 0 else None)
        ax.plot(*found.curve(), color=style.BLUE, lw=2, label="mean")
        ax.set_ylabel("share of true values inside")
        ax.set_xlabel("level of posterior intervals")
    else:
        groups = [g for g in found.calibration["genes"].unique() if found.histogram(g).sum()]
        for name, colour in zip(groups, [style.GREY, *style.colors(len(groups))], strict=False):
            level, inside = found.curve(name)
            label = "all genes" if name == "all" else name
            ax.plot(level, inside, color=colour, lw=2 if name == "all" else 1.4, label=label)
        ax.set_ylabel("share of observed counts inside")
        ax.set_xlabel("level of predictive intervals")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_aspect("equal")
    ax.legend(frameon=False, loc="upper left", fontsize=style.SMALL)
    style.despine(ax)
    return ax


def khat(found: GuideDiagnostics, ax: Axes | None = None) -> Axes:
    """Histogram over cells of the tail shape of importance weights.

    Parameters
    ----------
    found
        Of `pyrosc.criticism.guide_diagnostics`.
    ax
        Where to draw; default a new figure. Values below −0.5 and above 2 are in the end bins.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into.
    """
    values = np.clip(found.cells["khat"].to_numpy(), -0.499, 1.999)
    ax = style.new_axes(size=(4.8, 3.4))[0, 0] if ax is None else ax
    parts = ((-0.5, 0.5, style.PALETTE[2]), (0.5, 0.7, style.PALETTE[1]), (0.7, 2.0, style.ORANGE))
    names = ("below 0.5: close", "0.5 to 0.7: usable", "above 0.7: far")
    for (low, high, colour), name in zip(parts, names, strict=True):
        own = values[(values >= low) & (values < high)]
        label = f"{name} ({len(own) / len(values):.0%})"
        ax.hist(own, bins=list(np.arange(-0.5, 2.01, 0.1)), color=colour, label=label)
    ax.set_xlim(-0.5, 2.0)
    ax.set_xlabel("k-hat of the cell (lower is better)")
    ax.set_ylabel("cells")
    ax.legend(frameon=False, fontsize=style.SMALL, loc="best")
    style.despine(ax)
    return ax


def ranks(
    found: Calibration, quantities: Sequence[str] | None = None, *, columns: int = 4, axes: Any = None
) -> np.ndarray:
    """Histograms of the ranks of true values among posterior draws, a panel per quantity.

    Uniform for the exact posterior: bars then stay in the band, which holds 99 % of the binomial law of a
    bar.

    Parameters
    ----------
    found
        Of `pyrosc.criticism.simulation_based_calibration`.
    quantities
        Which of ``found.ranks``; default all.
    columns
        Panels in a row of a new figure.
    axes
        Where to draw, one per quantity; default a new figure.

    Returns
    -------
    numpy.ndarray
        The axes, one per quantity.
    """
    from scipy.stats import binom

    from pyrosc.criticism.sbc import rank_counts

    wanted = list(found.ranks) if quantities is None else list(quantities)
    if not wanted:
        raise ValueError("quantities is empty; name at least one")
    if absent := [q for q in wanted if q not in found.ranks]:
        raise KeyError(f"there are no ranks of {absent}; there are of {list(found.ranks)}")
    size = (2.6, 2.2)
    panels = (
        style.panels(len(wanted), columns, size)
        if axes is None
        else style.some_axes(axes, len(wanted), "ranks")
    )
    for name, ax in zip(wanted, panels, strict=True):
        counts, expected = rank_counts(found.ranks[name], found.n_draws)
        edges = np.linspace(0, 1, len(counts) + 1)
        n = found.n_simulations
        low, high = binom.ppf(0.005, n, expected / n), binom.ppf(0.995, n, expected / n)
        ax.stairs(high, edges, baseline=low, fill=True, color=style.PALE)
        ax.stairs(counts, edges, color=style.BLUE, lw=1.4)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1.08 * max(counts.max(), high.max()))
        ax.set_title(name, fontsize=style.SMALL + 1)
        ax.set_xlabel("rank of the truth / draws", fontsize=style.SMALL)
        ax.tick_params(labelsize=style.SMALL - 1)
        style.despine(ax)
    return np.array(panels, dtype=object)


def area(n: int) -> float:
    """Area of a point where there are `n`."""
    return float(np.clip(12_000 / max(n, 1), 3.0, 14.0))


def diagonal(ax: Axes, x: np.ndarray, y: np.ndarray, log: bool) -> None:
    """The line on which both are the same, and limits that hold all points."""
    if not len(x):
        return
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        low, high = max(0.0, low - 0.03), min(1.01, high + 0.03)
    ax.plot([low, high], [low, high], color="0.6", lw=1, ls="--", zorder=0)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)


__all__ = ["intervals", "khat", "mean_variance", "pit", "ranks", "statistic"]
