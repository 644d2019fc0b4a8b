"""What the pictures share: axes, colours and the scales of colour bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

#: Twenty colours that stay apart with red-green blindness, the clearest first: six of Okabe and Ito (2008),
#: then, one at a time, the colour furthest (OKLab distance, as seen with normal, protanopic and deuteranopic
#: vision) from those before it.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#660011"),
    *("#002277", "#77EEBB", "#775555", "#99BB88", "#444499", "#99DDFF", "#5588EE"),
    *("#004455", "#CCDD55", "#AA3300", "#AA4488", "#22CCCC", "#880033"),
)
BLUE, ORANGE, GREY, PALE = PALETTE[0], PALETTE[4], "#4D4D4D", "#D9D9D9"
SMALL = 9  # points; text inside panels


def new_axes(n_rows: int = 1, n_columns: int = 1, size: tuple[float, float] = (4.5, 3.6)) -> np.ndarray:
    """Axes of a new figure, (n_rows, n_columns), each panel of `size` inches."""
    import matplotlib.pyplot as plt

    shape = (size[0] * n_columns, size[1] * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=shape, layout="constrained", squeeze=False)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.08, h_pad=0.06)  # type: ignore[call-arg]
    return axes


def panels(n: int, columns: int, size: tuple[float, float]) -> list[Axes]:
    """`n` axes of a new figure, at most `columns` in a row, each of `size` inches."""
    columns = min(columns, n)
    grid = new_axes(-(-n // columns), columns, size=size).ravel()
    for left_over in grid[n:]:
        left_over.remove()
    return list(grid[:n])


def some_axes(axes: Any, n: int, what: str) -> list[Axes]:
    """The `n` axes that a user gave, flat."""
    found = [a for a in np.asarray(axes, dtype=object).ravel() if a is not None]
    if len(found) < n:
        raise ValueError(f"{what} draws {n} panels; axes= holds {len(found)}")
    return found[:n]


def colors(n: int) -> list[str]:
    """`n` colours; above 20 they repeat."""
    return [PALETTE[i % len(PALETTE)] for i in range(n)]


def bounds(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Quantiles of the finite values, never equal."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    bottom, top = (float(v) for v in np.quantile(finite, [low, high]))
    if top <= bottom:  # mostly one value: show what differs from it
        bottom, top = float(finite.min()), float(finite.max())
    return (bottom, top) if top > bottom else (bottom - 0.5, top + 0.5)


def ticks_log1p(low: float, high: float) -> list[float]:
    """A few round numbers x with log1p(x) spread evenly over [low, high] (both log1p already)."""
    gap = (high - low) / 5.5
    chosen: list[float] = []
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        steps = [float(f"{m}e{e}") for e in range(-4, 8) for m in digits]
        chosen = [0.0] if low <= 1e-9 else []
        least = gap if chosen else low - 1e-9
        above: list[float] = []
        for x in reversed(steps):  # from the top, where the eye goes first
            fits = least <= np.log1p(x) <= high + 1e-9
            if fits and (not above or np.log1p(above[-1]) - np.log1p(x) > gap):
                above.append(x)
        chosen += above[::-1]
        if len(chosen) > 2:
            break
    return chosen


def log_axis(axis: Any) -> None:
    """A logarithmic axis with a few plain numbers: 1, 2, 5 where it spans little, powers of ten else."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) if 0 < low < high else 1.0
    subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_formatter(NullFormatter())
    if decades < 5:
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))


def legend_columns(entries: Sequence[str]) -> int:
    """Columns of a legend with many entries."""
    return -(-len(entries) // 22)


def legend_width(entries: Sequence[str]) -> float:
    """About how wide a legend beside a panel will be, in inches."""
    if not entries:
        return 0.0
    return legend_columns(entries) * (0.35 + 0.075 * max(len(e) for e in entries))


def number(value: float) -> str:
    """One decimal, with a true minus sign.

    Examples
    --------
    >>> number(-1280.25)
    '−1,280.2'
    """
    return f"{value:,.1f}".replace("-", "\N{MINUS SIGN}")


def note(ax: Axes, text: str, *, x: float = 0.03, y: float = 0.97) -> None:
    """Small text in a panel, in axes coordinates, on a ground that keeps it readable."""
    vertical, horizontal = ("top" if y > 0.5 else "bottom"), ("right" if x > 0.5 else "left")
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
    ax.text(x, y, text, transform=ax.transAxes, va=vertical, ha=horizontal, fontsize=SMALL, bbox=ground)


def despine(ax: Axes, *sides: str) -> None:
    """Hide the frame on some sides; default top and right."""
    for side in sides or ("top", "right"):
        ax.spines[side].set_visible(False)


def count(values: Sequence[Any] | np.ndarray | int, word: str) -> str:
    """``"1 gene"``, ``"1,200 genes"``."""
    n = values if isinstance(values, int) else len(values)
    return f"{n:,} {word}" + ("" if n == 1 else "s")
