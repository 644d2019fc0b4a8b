"""Statistics of the data beside those of the replicates: the tables, and how far the two agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pyrosc.criticism.tally import ratio


def compared(statistics: dict[str, np.ndarray], names: Any, unit: str) -> pd.DataFrame:
    """A row per gene or cell and statistic, as `PredictiveChecks.genes` has them.

    Parameters
    ----------
    statistics
        (1 + samples, n) each; the first row is the data's.
    names
        Of the genes or cells, (n,).
    unit
        Heading of their column.
    """
    parts = []
    for name, values in statistics.items():
        observed, drawn = values[0], values[1:]
        with np.errstate(invalid="ignore"):
            above = (drawn > observed).sum(0) + 0.5 * (drawn == observed).sum(0)
        p = np.where(np.isnan(observed), np.nan, (above + 0.5) / (len(drawn) + 1))
        low, high = _quantiles(drawn)
        parts.append(
            pd.DataFrame(
                {
                    unit: np.asarray(names, dtype=object),
                    "statistic": name,
                    "observed": observed,
                    "replicated": _mean(drawn),
                    "low": low,
                    "high": high,
                    "p_value": p,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _mean(drawn: np.ndarray) -> np.ndarray:
    """Mean over the draws that have a value; NaN where none has."""
    known = ~np.isnan(drawn)
    return ratio(np.where(known, drawn, 0).sum(0), known.sum(0).astype(float))


def _quantiles(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = np.full((2, drawn.shape[1]), np.nan)
    some = ~np.isnan(drawn).all(0)
    if some.any():
        out[:, some] = np.nanquantile(drawn[:, some], [0.05, 0.95], axis=0)
    return out[0], out[1]


def agreement(statistics: dict[str, np.ndarray], table: pd.DataFrame, of: str) -> pd.DataFrame:
    """A row per statistic, as `PredictiveChecks.summary` has them.

    Parameters
    ----------
    statistics
        (1 + samples, n) each; the first row is the data's.
    table
        What `compared` made of them.
    of
        ``"genes"`` or ``"cells"``.
    """
    rows = {}
    for name, values in statistics.items():
        part = table[table["statistic"] == name]
        scaled = values
        if name != "zeros":
            with np.errstate(divide="ignore", invalid="ignore"):
                scaled = np.log(values)
        scaled = np.where(np.isfinite(scaled), scaled, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            y = part["replicated"].to_numpy() if name == "zeros" else np.log(part["replicated"].to_numpy())
        y = np.where(np.isfinite(y), y, np.nan)
        # the data, then each replicate as if it were the data
        errors = _mean((np.abs(scaled - y)).T)
        inside = (part["observed"] >= part["low"]) & (part["observed"] <= part["high"])
        both = np.isfinite(scaled[0]) & np.isfinite(y)
        a, b, n = scaled[0][both], y[both], int(both.sum())
        varied = n > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
        rank_a, rank_b = (pd.Series(v).rank().to_numpy(float) for v in (a, b))
        rows[(of, name)] = {
            "error": errors[0],
            "expected": float(_mean(errors[1:, None])[0]),
            "bias": (b - a).mean() if n else np.nan,
            "pearson": np.corrcoef(a, b)[0, 1] if varied else np.nan,
            "spearman": np.corrcoef(rank_a, rank_b)[0, 1] if varied else np.nan,
            "inside": float(inside[both].mean()) if n else np.nan,
            "n": n,
        }
    found = pd.DataFrame.from_dict(rows, orient="index")
    found.index = pd.MultiIndex.from_tuples(found.index, names=["of", "statistic"])
    return found
