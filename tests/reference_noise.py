"""The noise of the reference implementation (scvi-tools) in place of our draws, for parity tests."""

from __future__ import annotations

import torch
from pyro.poutine.messenger import Messenger

from pyrosc.infer.handlers import is_latent


class Noise(Messenger):
    """Put loc + scale · eps in place of the guide's draws."""

    def __init__(self, eps: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.eps = eps

    def _pyro_sample(self, msg) -> None:
        if is_latent(msg) and not msg["done"] and msg["name"] in self.eps:
            fn = msg["fn"]
            msg["value"], msg["done"] = fn.mean + fn.stddev * self.eps[msg["name"]], True
