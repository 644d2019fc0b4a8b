"""Models, one file each."""

from pyrosc.models.base import Model
from pyrosc.models.scvi import SCVI

__all__ = ["SCVI", "Model"]
