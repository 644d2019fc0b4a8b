"""Reading a training record."""

from __future__ import annotations

import numpy as np
import pandas as pd


def kept_epoch(history: pd.DataFrame) -> int | None:
    """Row of the epoch whose weights were kept: the best of the last run, after its warm-up."""
    if "elbo_validation" not in history:
        return None
    steps = history["steps"].to_numpy()
    start = int(np.flatnonzero(np.diff(steps, prepend=np.inf) <= 0)[-1])
    values = history["elbo_validation"].where(history["kl_weight"] >= 1).to_numpy(float)[start:]
    return None if np.isnan(values).all() else start + int(np.nanargmax(values))


def kept_elbo(history: pd.DataFrame) -> float | None:
    """Held-out ELBO per cell (nats) of the weights that were kept; None where nothing was held out."""
    if "elbo_validation" not in history:
        return None
    row = kept_epoch(history)
    return float(history["elbo_validation"].iloc[-1 if row is None else row])
