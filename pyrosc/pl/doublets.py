"""Scores of droplets beside those of simulated doublets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyrosc.pl import _style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyrosc.models.solo import Solo


def doublets(model: Solo, ax: Axes | None = None, *, bins: int = 50) -> Axes:
    """Histogram of the scores of real droplets, and of simulated doublets at the estimated rate.

    The score is the log of how much likelier a droplet is among doublets than among all droplets. Where
    the two histograms agree, on the right, droplets are doublets; what the doublets' has under the main
    peak of the real ones is doublets that cannot be told, mostly of two cells of one kind. Bars of the real
    droplets that stay below the doublets' mean that real doublets are less typical than simulated ones,
    or a rate that is too high.

    Parameters
    ----------
    model
        A trained `Solo`.
    ax
        Where to draw; default a new figure.
    bins
        Number of bins.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into.
    """
    rate = model.get_doublet_rate()
    real = model.posterior("log_ratio")["log_ratio"]
    made = model.posterior("log_ratio_simulated", source="simulated")["log_ratio_simulated"]
    ax = style.new_axes(size=(5.6, 3.8))[0, 0] if ax is None else ax
    low, high = style.bounds(np.concatenate([real, made]), 0.002, 0.998)
    edges = np.linspace(low, high, bins + 1).tolist()
    real, made = np.clip(real, low, high), np.clip(made, low, high)
    ax.hist(real, edges, color=style.PALE, edgecolor="none", label=f"{style.count(real, 'droplet')}")
    share = np.full(len(made), rate.estimate * len(real) / len(made))
    name = f"doublets expected at the rate {rate.estimate:.1%}"
    ax.hist(made, edges, weights=share, histtype="step", color=style.ORANGE, lw=1.6, label=name)
    ax.set_yscale("symlog", linthresh=max(5.0, 0.02 * len(real) / bins))
    ax.set_ylim(0, None)
    even = -np.log(2 * rate.estimate)
    called = float((real > even).mean())
    if low < even < high:
        ax.axvline(even, color=style.GREY, lw=1, ls="--")
        text = f"P(doublet) > ½: {called:.1%}"
        place: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        ax.text(even, 1.01, text, fontsize=style.SMALL, color=style.GREY, **place)
    fixed = model.expected_doublet_rate is not None
    what = "rate given" if fixed else f"rate {rate.estimate:.1%} (90 %: {rate.lower:.1%}–{rate.upper:.1%})"
    ax.set_title(what, fontsize=11, pad=20)
    ax.set_xlabel("score: log p(droplet | doublet) / p(droplet)")
    ax.set_ylabel("droplets per bin")
    ax.legend(frameon=False, fontsize=style.SMALL)
    style.despine(ax)
    return ax
