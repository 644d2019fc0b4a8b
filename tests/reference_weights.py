"""Copy weights and noise of the reference implementation (scvi-tools) into our networks, for parity tests."""

from __future__ import annotations

import torch
from pyro.poutine.messenger import Messenger

from pyrosc.infer.handlers import is_latent
from pyrosc.nn import CategoryTable


class Noise(Messenger):
    """Put loc + scale · eps in place of the guide's draws."""

    def __init__(self, eps: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.eps = eps

    def _pyro_sample(self, msg) -> None:
        if is_latent(msg) and not msg["done"] and msg["name"] in self.eps:
            fn = msg["fn"]
            msg["value"], msg["done"] = fn.mean + fn.stddev * self.eps[msg["name"]], True


def copy_linear(linear, weights, prefix) -> None:
    linear.weight.copy_(weights[f"{prefix}.weight"])
    linear.bias.copy_(weights[f"{prefix}.bias"])


def copy_encoder(encoder, weights, prefix) -> None:
    copy_layers(encoder.network, weights, f"{prefix}.encoder")
    copy_linear(encoder.loc, weights, f"{prefix}.mean_encoder")
    copy_linear(encoder.log_variance, weights, f"{prefix}.var_encoder")


def copy_layers(network, weights, prefix) -> None:
    """Columns of the peer's weight: own input [with continuous columns in layer 0], then one-hots."""
    for i, layer in enumerate(network.layers):
        base = f"{prefix}.fc_layers.Layer {i}"
        weight = weights[f"{base}.0.weight"]
        layer.linear.bias.copy_(weights[f"{base}.0.bias"])
        at = layer.linear.in_features
        layer.linear.weight.copy_(weight[:, :at])
        values = layer.effects.values
        if values is not None:
            if i == 0:
                values.copy_(weight[:, at : at + len(values)].T)
                at += len(values)
            else:  # the peer does not inject continuous covariates again
                values.zero_()
        for table in layer.effects.tables:
            assert isinstance(table, CategoryTable)
            if table.n_categories > 1:  # the peer has no column for a constant
                table.rows.copy_(weight[:, at : at + table.n_categories].T)
                at += table.n_categories
            else:
                table.rows.zero_()
        assert at == weight.shape[1], "some columns of the peer's weight were not used"
        if f"{base}.1.weight" in weights:
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(layer.norm, key).copy_(weights[f"{base}.1.{key}"])
