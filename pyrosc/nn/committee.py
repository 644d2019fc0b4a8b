"""Several small networks of one shape, run side by side."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Committee(nn.Module):
    """Independent fully connected networks with one output each.

    Linear map, normalisation (`LayerNorm` without parameters), ReLU and dropout per hidden layer.

    Parameters
    ----------
    n_in, n_hidden, n_layers
        Widths and depth of each network.
    n_networks
        How many.
    dropout
        Share of hidden units left out while training, in [0, 1).
    """

    def __init__(
        self, n_in: int, n_hidden: int = 64, n_layers: int = 1, n_networks: int = 5, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if min(n_in, n_hidden, n_layers, n_networks) < 1:
            raise ValueError("widths, depth and number of networks are at least 1")
        widths = [n_in, *[n_hidden] * n_layers, 1]
        self.weights = nn.ParameterList(
            torch.empty(n_networks, a, b).uniform_(-(a**-0.5), a**-0.5) for a, b in pairwise(widths)
        )
        self.biases = nn.ParameterList(torch.zeros(n_networks, 1, b) for b in widths[1:])
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, p) to (..., n, networks)."""
        h = x.unsqueeze(-3)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = h @ weight + bias
            if i < last:
                h = F.relu(F.layer_norm(h, h.shape[-1:]))
                h = F.dropout(h, self.dropout, self.training)
        return h.squeeze(-1).transpose(-1, -2)
