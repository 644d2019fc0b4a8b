"""Data with known truth, drawn from a model's own generative process."""

from pyrosc.simulate._autozi import autozi
from pyrosc.simulate._cellassign import cellassign
from pyrosc.simulate._doublets import doublets
from pyrosc.simulate._linear_scvi import linear_scvi
from pyrosc.simulate._peakvi import peakvi
from pyrosc.simulate._scanvi import scanvi
from pyrosc.simulate._scvi import scvi
from pyrosc.simulate._stereoscope import SimulatedSpots, stereoscope
from pyrosc.simulate._totalvi import totalvi
from pyrosc.simulate.core import Simulated, design_for, from_model

__all__ = [
    "Simulated",
    "SimulatedSpots",
    "autozi",
    "cellassign",
    "design_for",
    "doublets",
    "from_model",
    "linear_scvi",
    "peakvi",
    "scanvi",
    "scvi",
    "stereoscope",
    "totalvi",
]
