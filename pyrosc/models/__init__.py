"""Models, one file each."""

from pyrosc.models.autozi import AUTOZI
from pyrosc.models.base import Model
from pyrosc.models.cellassign import CellAssign
from pyrosc.models.linear_scvi import LinearSCVI
from pyrosc.models.peakvi import PEAKVI
from pyrosc.models.scanvi import SCANVI
from pyrosc.models.scvi import SCVI
from pyrosc.models.solo import Solo
from pyrosc.models.spatial_stereoscope import SpatialStereoscope
from pyrosc.models.stereoscope import RNAStereoscope
from pyrosc.models.totalvi import TOTALVI

__all__ = [
    "AUTOZI",
    "PEAKVI",
    "SCANVI",
    "SCVI",
    "TOTALVI",
    "CellAssign",
    "LinearSCVI",
    "Model",
    "RNAStereoscope",
    "Solo",
    "SpatialStereoscope",
]
