"""Models of other programs as models of pyrosc."""

from pyrosc.convert.scvi_tools import from_scvi_tools

__all__ = ["from_scvi_tools"]
