"""Looking at a model without leaving a trace: evaluation mode, and noise of a seed of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pyrosc.models.base import Model


@contextmanager
def evaluating(model: Model, seed: int | None = None) -> Iterator[None]:
    """Evaluation mode, and the model's own mode again afterwards.

    Parameters
    ----------
    model
        The model.
    seed
        Of torch's generators inside; those outside are not moved. None leaves them alone.
    """
    was = model.training
    model.eval()
    try:
        if seed is None:
            yield
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                yield
    finally:
        model.train(was)
