"""The training record: adding to it, and reading it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pyrosc.data.errors import warn


def extended(history: pd.DataFrame | None, records: list[dict[str, Any]]) -> pd.DataFrame | None:
    """A history with the epochs of one more run."""
    if not records:
        return history
    new = pd.DataFrame(records).set_index("epoch")
    return new if history is None else pd.concat([history, new])


def kept_epoch(history: pd.DataFrame) -> int | None:
    """Row of the epoch whose weights were kept: the best of the last run, after its warm-up."""
    if "elbo_validation" not in history:
        return None
    run = last_run(history)
    start = len(history) - len(run)
    values = run["elbo_validation"].where(run["kl_weight"] >= 1).to_numpy(float)
    return None if np.isnan(values).all() else start + int(np.nanargmax(values))


def kept_elbo(history: pd.DataFrame) -> float | None:
    """Held-out ELBO per cell (nats) of the weights that were kept; None where nothing was held out."""
    if "elbo_validation" not in history:
        return None
    row = kept_epoch(history)
    return float(history["elbo_validation"].iloc[-1 if row is None else row])


#: Rise over the last tenth of the epochs, relative to the ELBO, above which a run was too short.
STILL_RISING = 2e-3


def last_run(history: pd.DataFrame) -> pd.DataFrame:
    """Rows of the last call of `fit`."""
    steps = history["steps"].to_numpy()
    return history.iloc[int(np.flatnonzero(np.diff(steps, prepend=np.inf) <= 0)[-1]) :]


def late_gain(run: pd.DataFrame) -> tuple[float, int] | None:
    """By how much the held-out ELBO rose at the end of a run that ended too early, and in how many epochs.

    None where it was flat, or where there are too few epochs at full weight of the KL to tell.
    """
    if "elbo_validation" not in run:
        return None
    values = run.loc[run["kl_weight"] == 1, "elbo_validation"].dropna().to_numpy(float)
    tail = max(1, len(run) // 10)
    if len(values) <= 2 * tail:
        return None
    gain = float(values[-tail:].max() - values[:-tail].max())
    return (gain, tail) if gain > STILL_RISING * abs(values[-1]) else None


def hint(records: list[dict[str, Any]]) -> None:
    """Warn where the held-out ELBO was still rising at the end of a run."""
    if not records or (late := late_gain(pd.DataFrame(records))) is None:
        return
    gain, epochs = late
    warn(
        f"the held-out ELBO was still rising at the end (by {gain:.1f} nats per cell over the last "
        f"{epochs} epochs); train longer: fit(max_epochs={2 * len(records)})",
        UserWarning,
    )
