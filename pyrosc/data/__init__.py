"""From AnnData to minibatches: schema, registry, data set, loader, checks."""

from pyrosc.data.dataset import Dataset
from pyrosc.data.errors import DataError, DataWarning
from pyrosc.data.preflight import preflight
from pyrosc.data.registry import FieldState, Registry
from pyrosc.data.schema import (
    MAIN,
    Batch,
    Categorical,
    CategoricalCovariates,
    Continuous,
    ContinuousCovariates,
    Counts,
    Field,
    Fragments,
    Index,
    Labels,
    Protein,
    ProteinMask,
    SizeFactor,
    Total,
    Values,
    schema,
)

__all__ = [
    "MAIN",
    "Batch",
    "Categorical",
    "CategoricalCovariates",
    "Continuous",
    "ContinuousCovariates",
    "Counts",
    "DataError",
    "DataWarning",
    "Dataset",
    "Field",
    "FieldState",
    "Fragments",
    "Index",
    "Labels",
    "Protein",
    "ProteinMask",
    "Registry",
    "SizeFactor",
    "Total",
    "Values",
    "preflight",
    "schema",
]
