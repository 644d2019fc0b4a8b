"""How long and how fast to train, by default: in steps, whatever the number of cells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Plan:
    """Training defaults of a model; every one is an argument of `fit`.

    Attributes
    ----------
    steps
        Optimiser steps wanted, from which the number of epochs follows.
    min_epochs, max_epochs
        Bounds on the epochs that follow from `steps`.
    batch_size
        Cells per minibatch.
    lr
        Highest learning rate.
    schedule
        ``"one_cycle"``: cosine rise over `rise` of the run, then cosine fall to `lr` · 1e-3;
        ``"constant"``.
    rise
        Share of the run in which the learning rate rises.
    warmup
        Share of the run over which the weight of the KL rises from 0 to 1; 0 for none.
    betas, eps, weight_decay
        Of Adam.
    clip
        Greatest norm of the gradient; None for no clipping.
    train_size
        Share of the cells that train.
    early_stopping
        Stop when the held-out ELBO has not risen for `patience` epochs after the warm-up.
    patience
        Epochs; None for a tenth of the planned epochs, at least 5.
    """

    steps: int = 3000
    min_epochs: int = 10
    max_epochs: int = 150
    batch_size: int = 128
    lr: float = 2e-3
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    rise: float = 0.3
    warmup: float = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    train_size: float = 0.9
    early_stopping: bool = True
    patience: int | None = None

    def epochs(self, steps_per_epoch: int) -> int:
        """Number of epochs for about `steps` steps."""
        wanted = math.ceil(self.steps / max(steps_per_epoch, 1))
        return max(self.min_epochs, min(wanted, self.max_epochs))


def learning_rate(plan_schedule: str, lr: float, rise: float, progress: float) -> float:
    """Learning rate at a share `progress` of the run."""
    if plan_schedule == "constant":
        return lr
    if plan_schedule != "one_cycle":
        raise ValueError(f"schedule is 'one_cycle' or 'constant', not {plan_schedule!r}")
    low_start, low_end = lr / 25, lr * 1e-3
    if progress < rise:
        return low_start + (lr - low_start) * (1 - math.cos(math.pi * progress / rise)) / 2
    share = min(1.0, (progress - rise) / max(1 - rise, 1e-12))
    return low_end + (lr - low_end) * (1 + math.cos(math.pi * share)) / 2


def kl_weight(warmup: float, progress: float) -> float:
    """Weight of the KL at a share `progress` of the run; always 1 at its end."""
    return 1.0 if warmup <= 0 else min(1.0, progress / warmup)
