"""The parameters of scvi-tools' networks put into ours; benchmarks/parity/README.md has the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyrosc.data.errors import listed
from pyrosc.models import SCANVI, SCVI, LinearSCVI
from pyrosc.nn import MLP, CategoryTable, CovariateEffects, FlatBatchNorm, NormalEncoder

_EPS = 1e-3  # of their batch normalisation

#: Tensors that a model may have and not use: the encoder of an observed library, heads of other laws.
_IDLE = ("l_encoder.", "decoder.px_dropout_decoder.", "decoder.px_r_decoder.", "y_prior")


class Weights:
    """Tensors by the peer's names, with a record of those taken."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.taken = tensors, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"the saved model has no tensor '{name}', which its options call for")
        self.taken.add(name)
        return self.tensors[name]

    def find(self, name: str) -> Tensor | None:
        """The tensor, or None."""
        self.taken.add(name)
        return self.tensors.get(name)

    def left(self) -> list[str]:
        """Tensors that were not taken and do matter."""
        return [
            name
            for name in self.tensors
            if name not in self.taken and not name.startswith(_IDLE) and "num_batches_tracked" not in name
        ]


@torch.no_grad()
def copy_weights(model: SCVI, tensors: Mapping[str, Tensor]) -> None:
    """Give a model the parameters of the peer's module of the same kind and options.

    Batch normalisation that our network does not have is folded into the linear map before it, which is the
    same network in evaluation.

    Parameters
    ----------
    model
        `SCVI`, `SCANVI` or `LinearSCVI`; changed.
    tensors
        The peer's ``state_dict``.

    Raises
    ------
    ValueError
        If a tensor is missing, has another shape, or is left over; the message names it.
    """
    weights = Weights(tensors)
    _encoder(model.encoder, weights, "z_encoder")
    if isinstance(model, LinearSCVI):
        _linear_head(model.scale_head, weights, "decoder.factor_regressor")
        if model.zi_head is not None:
            _linear_head(model.zi_head, weights, "decoder.px_dropout_decoder")
    else:
        _layers(model.decoder, weights, "decoder.px_decoder")
        _linear(model.scale_head, weights, "decoder.px_scale_decoder.0")
        if model.zi_head is not None:
            _linear(model.zi_head, weights, "decoder.px_dropout_decoder")
    _dispersion(model, weights)
    if isinstance(model.embedding, CategoryTable):
        _put(model.embedding.rows, weights["_embeddings_dict.batch.weight"], "batch embedding")
    if not model.observed_library:
        _encoder(model.library_encoder, weights, "l_encoder")
        prior = [weights["library_log_means"], weights["library_log_vars"]]
        _put(model.library_prior.rows, torch.cat(prior).T, "library prior")
    if isinstance(model, SCANVI):
        _scanvi(model, weights)
    if left := weights.left():
        raise ValueError(f"the saved model has tensors that no option read accounts for: {listed(left)}")


def _scanvi(model: SCANVI, weights: Weights) -> None:
    _encoder(model.z2_encoder, weights, "encoder_z2_z1")
    _layers(model.z_prior.network, weights, "decoder_z1_z2.decoder")
    _linear(model.z_prior.loc, weights, "decoder_z1_z2.mean_decoder")
    _linear(model.z_prior.log_variance, weights, "decoder_z1_z2.var_decoder")
    if isinstance(model.classifier, nn.Sequential):
        network: Any = model.classifier[0]
        _layers(network, weights, "classifier.classifier.0")
        _linear(model.classifier[1], weights, "classifier.classifier.1")
    else:
        _linear(model.classifier, weights, "classifier.classifier.0")
    prior = weights.find("y_prior")
    if prior is not None and prior.max() - prior.min() > 1e-6:
        raise ValueError("the saved model has a prior of its own over labels (y_prior); SCANVI's is uniform")


def _dispersion(model: SCVI, weights: Weights) -> None:
    log_theta: Any = model.log_theta
    if model.dispersion == "gene-cell":
        _linear(log_theta, weights, "decoder.px_r_decoder")
    elif model.dispersion == "gene":
        _put(log_theta.values, weights["px_r"], "px_r")
    elif model.dispersion == "gene-batch":
        _put(log_theta.rows, weights["px_r"].T, "px_r")
    else:  # unlabelled cells, of which the peer has none here, get the mean over labels
        rows = weights["px_r"].T
        _put(log_theta.rows, torch.cat([rows, rows.mean(0, keepdim=True)]), "px_r")


def _encoder(encoder: NormalEncoder, weights: Weights, prefix: str) -> None:
    _layers(encoder.network, weights, f"{prefix}.encoder")
    _linear(encoder.loc, weights, f"{prefix}.mean_encoder")
    _linear(encoder.log_variance, weights, f"{prefix}.var_encoder")


def _layers(network: MLP, weights: Weights, prefix: str) -> None:
    for i, module in enumerate(network.layers):
        layer: Any = module
        base = f"{prefix}.fc_layers.Layer {i}"
        weight, bias = weights[f"{base}.0.weight"], weights[f"{base}.0.bias"]
        if isinstance(layer.norm, FlatBatchNorm):
            _batch_norm(layer.norm, weights, f"{base}.1")
        elif f"{base}.1.running_var" in weights:
            gain = weights[f"{base}.1.weight"] / (weights[f"{base}.1.running_var"] + _EPS).sqrt()
            bias = (bias - weights[f"{base}.1.running_mean"]) * gain + weights[f"{base}.1.bias"]
            weight = weight * gain[:, None]
        _put(layer.linear.bias, bias, base)
        _columns(layer.linear.weight, layer.effects, weight, base, first=i == 0)


def _columns(own: Tensor, effects: CovariateEffects, weight: Tensor, name: str, first: bool) -> None:
    """Columns of the peer's weight: own input [with continuous columns in layer 0], then one-hots."""
    at = own.shape[1]
    _put(own, weight[:, :at], name)
    if effects.values is not None:
        if first:
            _put(effects.values, weight[:, at : at + len(effects.values)].T, name)
            at += len(effects.values)
        else:  # the peer does not inject continuous covariates again
            effects.values.zero_()
    for table in effects.tables:
        assert isinstance(table, CategoryTable)
        if table.n_categories > 1:  # the peer has no column for a constant
            _put(table.rows, weight[:, at : at + table.n_categories].T, name)
            at += table.n_categories
        else:
            table.rows.zero_()
    if at != weight.shape[1]:
        raise ValueError(
            f"'{name}' of the saved model has {weight.shape[1]} inputs where its registry accounts for {at}"
        )


def _linear_head(head: Any, weights: Weights, prefix: str) -> None:
    base = f"{prefix}.fc_layers.Layer 0"
    bias = weights.find(f"{base}.0.bias")
    _columns(head.weight, head.effects, weights[f"{base}.0.weight"], base, first=True)
    if head.norm is None:
        _put(head.intercept, torch.zeros_like(head.intercept) if bias is None else bias, base)
        return
    _batch_norm(head.norm, weights, f"{base}.1")
    if bias is not None:  # a constant before the normalisation
        head.norm.running_mean.sub_(bias)


def _batch_norm(norm: Any, weights: Weights, prefix: str) -> None:
    for key in ("weight", "bias", "running_mean", "running_var"):
        _put(getattr(norm, key), weights[f"{prefix}.{key}"], f"{prefix}.{key}")


def _linear(linear: Any, weights: Weights, prefix: str) -> None:
    _put(linear.weight, weights[f"{prefix}.weight"], f"{prefix}.weight")
    _put(linear.bias, weights[f"{prefix}.bias"], f"{prefix}.bias")


def _put(target: Tensor, value: Tensor, name: str) -> None:
    if target.shape != value.shape:
        raise ValueError(
            f"'{name}' of the saved model has the shape {tuple(value.shape)}; its options and registry say "
            f"{tuple(target.shape)}"
        )
    target.copy_(value)
