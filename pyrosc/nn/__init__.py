"""Building blocks of models and guides; each acts on the last dim with any leading dims."""

from pyrosc.nn.committee import Committee
from pyrosc.nn.covariates import CategoryTable, CovariateEffects, Covariates, CovariateSpec
from pyrosc.nn.layers import MLP, CellTable, FlatBatchNorm, Layer, NormalEncoder
from pyrosc.nn.random_effects import RandomEffects
from pyrosc.nn.sparse import SparseLinear, SparseRows

__all__ = [
    "MLP",
    "CategoryTable",
    "CellTable",
    "Committee",
    "CovariateEffects",
    "CovariateSpec",
    "Covariates",
    "FlatBatchNorm",
    "Layer",
    "NormalEncoder",
    "RandomEffects",
    "SparseLinear",
    "SparseRows",
]
