"""How training went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrosc.pl import _style as style
from pyrosc.train.history import kept_epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyrosc.models.base import Model

_EARLY = 0.1  # share of each curve, its lowest values, that may lie below the picture


def training_curve(model: Model | pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Train and held-out ELBO at each epoch, in nats per cell: higher is better.

    The first epochs, which are far below the others, may lie under the picture (a note says how many). The
    epochs in which the KL term is still warming up are shaded. The best epoch, whose weights were kept, is
    marked.

    Parameters
    ----------
    model
        A trained model, or its ``history``.
    ax
        Where to draw; default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The axes drawn into.
    """
    from matplotlib.ticker import MaxNLocator

    history = model if isinstance(model, pd.DataFrame) else model.history
    if history is None or not len(history):
        raise ValueError("there is no training to show yet; call model.fit() first")
    ax = style.new_axes(size=(5.6, 3.8))[0, 0] if ax is None else ax
    epoch = np.arange(1, len(history) + 1)
    curves = [history["elbo_train"].to_numpy(float)]
    mark = "o" if len(history) == 1 else ""
    ax.plot(epoch, curves[0], color=style.GREY, lw=1.3, marker=mark, label="training cells")
    if "elbo_validation" in history:
        held_out = history["elbo_validation"].to_numpy(float)
        curves.append(held_out)
        ax.plot(epoch, held_out, color=style.BLUE, lw=1.8, marker=mark, label="held-out cells")
    below = _limits(ax, curves)
    _warm_up(ax, history, epoch)
    if "elbo_validation" in history:
        _best(ax, history, held_out)
    if below:
        text = style.count(below, "early epoch") + " below the picture"
        ax.plot([], [], "v", ms=5, color="0.5", label=text)
    ax.set_xlim(0.5 if mark else 1, max(1.5, float(epoch[-1])))
    ax.set_xlabel("epoch")
    ax.set_ylabel("ELBO (nats per cell; higher is better)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.grid(True, color="0.92")
    ax.set_axisbelow(True)
    style.despine(ax)
    ax.legend(loc="best", fontsize=style.SMALL, framealpha=0.8, edgecolor="none")
    return ax


def _limits(ax: Axes, curves: list[np.ndarray]) -> int:
    """Set the y limits to the range that matters; the number of epochs that lie below it."""
    shown = [c[np.isfinite(c)] for c in curves]
    top = max((c.max() for c in shown if len(c)), default=0.0)
    # a curve's end must be seen, however low: it is the result
    bottom = min((min(np.quantile(c, _EARLY), *c[-1:]) for c in shown if len(c)), default=0.0)
    lowest = min((c.min() for c in shown if len(c)), default=0.0)
    if top - lowest < 1.2 * (top - bottom):  # little to gain
        bottom = lowest
    margin = 0.06 * (top - bottom) or 1.0
    ax.set_ylim(bottom - margin, top + 2 * margin)
    return int(np.any([c < bottom - margin for c in curves], axis=0).sum())


def _warm_up(ax: Axes, history: pd.DataFrame, epoch: np.ndarray) -> None:
    warm = (history["kl_weight"] < 1).to_numpy()
    edges = np.flatnonzero(np.diff(warm.astype(int), prepend=0, append=0))
    for i, (first, last) in enumerate(edges.reshape(-1, 2)):
        start, end = epoch[first], epoch[min(last, len(epoch) - 1)]
        ax.axvspan(start, end, color="0.94", lw=0, zorder=0)
        if i == 0:
            where = ax.get_xaxis_transform()
            ax.text(
                start, 0.98, "  KL warm-up", transform=where, va="top", fontsize=style.SMALL, color="0.35"
            )


def _best(ax: Axes, history: pd.DataFrame, held_out: np.ndarray) -> None:
    best = kept_epoch(history)
    if best is None:
        return
    label = f"best: {style.number(held_out[best])} (epoch {best + 1:,})"
    ax.plot([best + 1], [held_out[best]], "o", color=style.ORANGE, ms=6, zorder=5, clip_on=False, label=label)
