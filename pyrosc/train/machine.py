"""What a run takes of the machine: its device, and how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pyrosc.models.base import Model
    from pyrosc.train.plan import Plan

_SMALL = 2**17  # values in a minibatch of counts up to which one thread trains


def choose_device(device: str) -> torch.device:
    """A device by name; ``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


@contextmanager
def few_threads(model: Model, plan: Plan) -> Iterator[None]:
    """One thread where minibatches are small: sharing out such short work costs about what it saves, and on
    a machine that is busy with other things many times more."""
    before = torch.get_num_threads()
    widest = max((m.shape[1] for d in model.datasets.values() for m in d.matrices.values()), default=0)
    small = plan.batch_size * widest <= _SMALL and model.device.type == "cpu"
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
