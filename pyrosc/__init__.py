"""pyrosc: Pyro-first probabilistic models of single-cell omics."""

from importlib.metadata import PackageNotFoundError, version

from pyrosc import convert, criticism, data, datasets, distributions, nn, pl, simulate
from pyrosc.checks import ContractError, check_model
from pyrosc.criticism import report
from pyrosc.data import DataError, DataWarning
from pyrosc.infer import Amortized, PathwiseELBO, auto
from pyrosc.io import load, save
from pyrosc.models import (
    AUTOZI,
    PEAKVI,
    SCANVI,
    SCVI,
    TOTALVI,
    CellAssign,
    LinearSCVI,
    Model,
    RNAStereoscope,
    Solo,
    SpatialStereoscope,
)
from pyrosc.models.objective import cells
from pyrosc.tools.annotate import annotate
from pyrosc.tools.compare import compare
from pyrosc.tools.correlation import feature_correlation
from pyrosc.tools.de import differential_expression, rank_genes_groups
from pyrosc.tools.predict import predict
from pyrosc.tools.proteins import foreground_probability, normalized_protein
from pyrosc.tools.surgery import surgery
from pyrosc.tools.transfer import transfer_labels
from pyrosc.train import Plan, TrainingError

try:
    __version__ = version("pyrosc")
except PackageNotFoundError:  # run from a folder that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AUTOZI",
    "PEAKVI",
    "SCANVI",
    "SCVI",
    "TOTALVI",
    "Amortized",
    "CellAssign",
    "ContractError",
    "DataError",
    "DataWarning",
    "LinearSCVI",
    "Model",
    "PathwiseELBO",
    "Plan",
    "RNAStereoscope",
    "Solo",
    "SpatialStereoscope",
    "TrainingError",
    "annotate",
    "auto",
    "cells",
    "check_model",
    "compare",
    "convert",
    "criticism",
    "data",
    "datasets",
    "differential_expression",
    "distributions",
    "feature_correlation",
    "foreground_probability",
    "load",
    "nn",
    "normalized_protein",
    "pl",
    "predict",
    "rank_genes_groups",
    "report",
    "save",
    "simulate",
    "surgery",
    "transfer_labels",
]
