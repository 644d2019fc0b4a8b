"""Models, one file each."""

from pyrosc.models.autozi import AUTOZI
from pyrosc.models.base import Model
from pyrosc.models.cellassign import CellAssign
from pyrosc.models.scanvi import SCANVI
from pyrosc.models.scvi import SCVI

__all__ = [
    "AUTOZI",
    "SCANVI",
    "SCVI",
    "CellAssign",
    "Model",
]
